from __future__ import annotations

import gc
import logging
import weakref
from typing import Any

import pytest
import torch

from finch_rag.decode import cuda_graphs
from finch_rag.decode.cuda_graphs import CudaGraphs
from finch_rag.decode.static_step import StaticStep
from finch_rag.errors import NumericsError
from finch_rag.models.attention import use_finch_attention
from finch_rag.models.cache import CompressedCache
from finch_rag.models.forward import forward

from .small import ARCHITECTURES, small_finch, small_model, texts

CUDA = torch.cuda.is_available()


def filled(model: Any, tokens: list[int], room: int = 10) -> CompressedCache:
    cache = CompressedCache(model.config.num_hidden_layers, len(tokens) + room)
    with torch.inference_mode():
        forward(model, torch.tensor(tokens, device=model.device), cache)
    return cache


def plain(model: Any, cache: CompressedCache, tokens: list[int]) -> list[torch.Tensor]:
    """Logits after each token, by passes on the cache itself."""
    ids = torch.tensor(tokens, device=model.device)[:, None, None]
    with torch.inference_mode():
        return [model(token, past_key_values=cache, use_cache=True).logits[:, -1] for token in ids]


def model_of(kind: str) -> Any:
    model = small_model(kind)
    use_finch_attention(model)
    return model


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_static_step_computes_what_a_pass_on_the_cache_computes(kind: str) -> None:
    model = model_of(kind)
    cache = filled(model, list(range(20, 57)))
    step = StaticStep(model, cache, 1, 64)
    step.load([cache])
    for token, expected in zip([5, 9, 300], plain(model, cache, [5, 9, 300]), strict=True):
        torch.testing.assert_close(step([token]), expected, atol=1e-4, rtol=1e-4)


def test_what_a_longer_cache_left_behind_is_not_seen() -> None:
    model = model_of("llama")
    step = StaticStep(model, filled(model, [3]), 1, 64)
    step.load([filled(model, list(range(20, 77)))])
    step([8])
    short = filled(model, [3, 4, 5])
    step.load([short])
    torch.testing.assert_close(step([5]), plain(model, short, [5])[0], atol=1e-4, rtol=1e-4)


def test_a_cpu_decodes_without_cuda_graphs() -> None:
    model = model_of("llama")
    with CudaGraphs(model).lend([filled(model, [3, 4])], 8) as step:
        assert step is None


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> CudaGraphs:
    """Steps that are lent on any device; on a CPU they run uncaptured."""
    made = CudaGraphs(model_of("llama"))
    monkeypatch.setattr(made, "enabled", True)
    return made


def test_a_step_is_used_again_by_an_answer_of_its_size(graphs: CudaGraphs) -> None:
    cache = filled(graphs.model, [3, 4])
    with graphs.lend([cache], 8) as first:
        pass
    with graphs.lend([cache], 400) as again, graphs.lend([cache], 8) as beside:
        assert again is first
        assert beside not in (None, first)  # one answer at a time
    with graphs.lend([cache], 600) as larger:
        assert larger is not None
        assert larger.capacity == 1024


def test_a_step_that_is_dropped_frees_its_buffers_at_once(graphs: CudaGraphs) -> None:
    with graphs.lend([filled(graphs.model, [3, 4])], 8) as step:
        dropped = weakref.ref(step)
    del step
    gc.disable()
    try:
        graphs.idle.clear()
        assert dropped() is None
    finally:
        gc.enable()


def test_a_step_goes_back_when_its_answer_fails(graphs: CudaGraphs) -> None:
    with pytest.raises(KeyError), graphs.lend([filled(graphs.model, [3, 4])], 8):
        raise KeyError
    assert len(graphs.idle) == 1


def test_long_caches_are_decoded_as_they_are(graphs: CudaGraphs) -> None:
    with graphs.lend([filled(graphs.model, [3, 4])], cuda_graphs.LARGEST) as step:
        assert step is None


def test_a_model_that_cannot_be_captured_decodes_without(
    graphs: CudaGraphs, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*args: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(StaticStep, "__init__", refuse)
    cache = filled(graphs.model, [3, 4])
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            with graphs.lend([cache], 8) as step:
                assert step is None
    assert [record.message for record in caplog.records] == [
        "LlamaForCausalLM cannot be captured as a CUDA graph, so it decodes slower: operation not permitted when "
        "stream is capturing"
    ]


@pytest.mark.parametrize("options", [{}, {"temperature": 0.8, "seed": 3}])
def test_answers_are_the_same_with_and_without(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    finch = small_finch(max_new_tokens=12)
    expected = [finch.ask(question, texts(8), **options).text for question in ("When?", "Who was it?")]
    monkeypatch.setattr(finch.runtime.graphs, "enabled", True)
    assert [finch.ask(question, texts(8), **options).text for question in ("When?", "Who was it?")] == expected
    assert len(finch.runtime.graphs.idle) == 1  # both answers had the same


def test_a_stream_that_is_closed_gives_its_step_back(monkeypatch: pytest.MonkeyPatch) -> None:
    finch = small_finch(max_new_tokens=12)
    monkeypatch.setattr(finch.runtime.graphs, "enabled", True)
    with finch.stream("When?", texts(8)) as stream:
        next(stream)
        next(stream)
        assert not finch.runtime.graphs.idle
    assert len(finch.runtime.graphs.idle) == 1


@pytest.mark.skipif(not CUDA, reason="there is no CUDA device")
def test_a_captured_step_gives_the_same_answer_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    finch = small_finch(max_new_tokens=12)
    expected = finch.ask("When?", texts(8)).text
    on_gpu = small_finch(max_new_tokens=12)
    torch.nn.Module.to(on_gpu.model, "cuda")
    graphs = CudaGraphs(on_gpu.model)
    monkeypatch.setattr(on_gpu.runtime, "graphs", graphs)
    assert [on_gpu.ask("When?", texts(8)).text for _ in range(2)] == [expected] * 2
    assert graphs.idle
    assert graphs.idle[0].captured


def test_a_larger_step_serves_smaller_answers_and_takes_the_place_of_their_own(graphs: CudaGraphs) -> None:
    cache = filled(graphs.model, [3, 4])
    for new_tokens in (600, 1100, 700):  # 1,024 and 1,536 columns, of which the larger do for 1,024
        with graphs.lend([cache], new_tokens) as step:
            pass
    assert step is not None
    assert [kept.capacity for kept in graphs.idle] == [1536]
    with graphs.lend([cache], 400) as small:  # 1,536 columns for 402 tokens would be waste
        assert small is not None
        assert small.capacity == 512
    with graphs.lend([cache, cache], 700) as pair:
        assert pair is not None
        assert (pair.answers, pair.capacity) == (2, 1024)
    assert len(graphs.idle) == cuda_graphs.MOST_IDLE < 3


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_step_of_several_answers_computes_what_each_alone_computes(kind: str) -> None:
    model = model_of(kind)
    caches = [filled(model, tokens) for tokens in (list(range(20, 57)), [3], [9, 300, 8, 8])]
    step = StaticStep(model, caches[0], 3, 64)
    step.load(caches)
    alone = [plain(model, cache, tokens) for cache, tokens in zip(caches, ([5, 9], [6, 7], [300, 4]), strict=True)]
    for place, tokens in enumerate(([5, 6, 300], [9, 7, 4])):
        expected = torch.cat([logits[place] for logits in alone])
        torch.testing.assert_close(step(tokens), expected, atol=1e-4, rtol=1e-4)


def test_nan_that_a_failed_answer_left_behind_is_not_seen() -> None:
    model = model_of("llama")
    step = StaticStep(model, filled(model, [3]), 1, 64)
    broken = filled(model, list(range(20, 57)))
    with torch.inference_mode():
        for layer in broken.layers:
            for states in layer.in_use():
                states.fill_(float("nan"))
    step.load([broken])
    step([8])
    healthy = filled(model, [3, 4, 5])
    step.load([healthy])
    torch.testing.assert_close(step([5]), plain(model, healthy, [5])[0], atol=1e-4, rtol=1e-4)


def test_an_answer_after_one_that_failed_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    finch = small_finch(max_new_tokens=12)
    expected = finch.ask("When?", texts(8)).text
    monkeypatch.setattr(finch.runtime.graphs, "enabled", True)
    norm = finch.model.get_parameter("model.layers.0.input_layernorm.weight")
    good = norm.detach().clone()
    with finch.stream("When?", texts(20)) as stream, torch.no_grad():
        next(stream)
        norm.fill_(float("nan"))
        with pytest.raises(NumericsError):
            list(stream)
        norm.copy_(good)
    assert len(finch.runtime.graphs.idle) == 1
    assert finch.ask("When?", texts(8)).text == expected


@pytest.mark.parametrize("hidden", [False, True])
def test_memory_that_runs_out_once_leaves_graphs_on(
    graphs: CudaGraphs, hidden: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def starve(*args: Any) -> None:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        except torch.OutOfMemoryError as error:
            if hidden:  # as the end of a capture reports it
                raise RuntimeError("operation failed due to a previous error during capture") from error
            raise

    cache = filled(graphs.model, [3, 4])
    with graphs.lend([cache], 8):
        pass
    with monkeypatch.context() as starved, caplog.at_level(logging.WARNING):
        starved.setattr(StaticStep, "__init__", starve)
        with graphs.lend([cache], 8000) as step:
            assert step is None
    assert "no memory for a CUDA graph" in caplog.text
    assert graphs.idle == []  # their memory is what the next attempt may need
    with graphs.lend([cache], 8) as step:
        assert step is not None
