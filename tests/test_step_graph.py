from __future__ import annotations

import gc
import logging
import weakref
from typing import Any

import pytest
import torch

from finch_rag import step_graph
from finch_rag.attention import use_finch_attention
from finch_rag.cache import CompressedCache
from finch_rag.forward import forward
from finch_rag.step_graph import FixedStep, StepGraphs

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
def test_a_fixed_step_computes_what_a_pass_on_the_cache_computes(kind: str) -> None:
    model = model_of(kind)
    cache = filled(model, list(range(20, 57)))
    step = FixedStep(model, cache, 1, 64)
    step.load([cache])
    for token, expected in zip([5, 9, 300], plain(model, cache, [5, 9, 300]), strict=True):
        torch.testing.assert_close(step([token]), expected, atol=1e-4, rtol=1e-4)


def test_what_a_longer_cache_left_behind_is_not_seen() -> None:
    model = model_of("llama")
    step = FixedStep(model, filled(model, [3]), 1, 64)
    step.load([filled(model, list(range(20, 77)))])
    step([8])
    short = filled(model, [3, 4, 5])
    step.load([short])
    torch.testing.assert_close(step([5]), plain(model, short, [5])[0], atol=1e-4, rtol=1e-4)


def test_a_cpu_decodes_without_recorded_steps() -> None:
    model = model_of("llama")
    with StepGraphs(model).lend([filled(model, [3, 4])], 8) as step:
        assert step is None


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> StepGraphs:
    """Steps that are lent on any device; on a CPU they run unrecorded."""
    made = StepGraphs(model_of("llama"))
    monkeypatch.setattr(made, "_usable", True)
    return made


def test_a_step_is_used_again_by_an_answer_of_its_size(graphs: StepGraphs) -> None:
    cache = filled(graphs._model, [3, 4])
    with graphs.lend([cache], 8) as first:
        pass
    with graphs.lend([cache], 400) as again, graphs.lend([cache], 8) as beside:
        assert again is first
        assert beside not in (None, first)  # one answer at a time
    with graphs.lend([cache], 600) as larger:
        assert larger is not None
        assert larger.capacity == 1024


def test_a_step_that_is_dropped_frees_its_buffers_at_once(graphs: StepGraphs) -> None:
    with graphs.lend([filled(graphs._model, [3, 4])], 8) as step:
        dropped = weakref.ref(step)
    del step
    gc.disable()
    try:
        graphs._free.clear()
        assert dropped() is None
    finally:
        gc.enable()


def test_a_step_goes_back_when_its_answer_fails(graphs: StepGraphs) -> None:
    with pytest.raises(KeyError), graphs.lend([filled(graphs._model, [3, 4])], 8):
        raise KeyError
    assert len(graphs._free) == 1


def test_long_caches_are_decoded_as_they_are(graphs: StepGraphs) -> None:
    with graphs.lend([filled(graphs._model, [3, 4])], step_graph._LARGEST) as step:
        assert step is None


def test_a_model_that_cannot_be_recorded_decodes_without(
    graphs: StepGraphs, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*args: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(FixedStep, "__init__", refuse)
    cache = filled(graphs._model, [3, 4])
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            with graphs.lend([cache], 8) as step:
                assert step is None
    assert [record.message for record in caplog.records] == [
        "LlamaForCausalLM cannot be recorded as a CUDA graph, so it decodes slower: operation not permitted when "
        "stream is capturing"
    ]


@pytest.mark.parametrize("options", [{}, {"temperature": 0.8, "seed": 3}])
def test_answers_are_the_same_with_and_without(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    finch = small_finch(max_new_tokens=12)
    expected = [finch.ask(question, texts(8), **options).text for question in ("When?", "Who was it?")]
    monkeypatch.setattr(finch.step_graphs, "_usable", True)
    assert [finch.ask(question, texts(8), **options).text for question in ("When?", "Who was it?")] == expected
    assert len(finch.step_graphs._free) == 1  # both answers had the same


def test_a_stream_that_is_closed_gives_its_step_back(monkeypatch: pytest.MonkeyPatch) -> None:
    finch = small_finch(max_new_tokens=12)
    monkeypatch.setattr(finch.step_graphs, "_usable", True)
    with finch.stream("When?", texts(8)) as stream:
        next(stream)
        next(stream)
        assert not finch.step_graphs._free
    assert len(finch.step_graphs._free) == 1


@pytest.mark.skipif(not CUDA, reason="there is no CUDA device")
def test_a_recorded_step_gives_the_same_answer_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    finch = small_finch(max_new_tokens=12)
    expected = finch.ask("When?", texts(8)).text
    on_gpu = small_finch(max_new_tokens=12)
    torch.nn.Module.to(on_gpu.model, "cuda")
    graphs = StepGraphs(on_gpu.model)
    monkeypatch.setattr(on_gpu, "step_graphs", graphs)
    assert [on_gpu.ask("When?", texts(8)).text for _ in range(2)] == [expected] * 2
    assert graphs._free
    assert graphs._free[0]._graph is not None


def test_a_larger_step_serves_smaller_answers_and_takes_the_place_of_their_own(graphs: StepGraphs) -> None:
    cache = filled(graphs._model, [3, 4])
    for new_tokens in (600, 1100, 700):  # 1,024 and 1,536 columns, of which the larger do for 1,024
        with graphs.lend([cache], new_tokens) as step:
            pass
    assert step is not None
    assert [kept.capacity for kept in graphs._free] == [1536]
    with graphs.lend([cache], 400) as small:  # 1,536 columns for 402 tokens would be waste
        assert small is not None
        assert small.capacity == 512
    with graphs.lend([cache, cache], 700) as pair:
        assert pair is not None
        assert (pair.answers, pair.capacity) == (2, 1024)
    assert len(graphs._free) == step_graph._KEPT < 3


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_step_of_several_answers_computes_what_each_alone_computes(kind: str) -> None:
    model = model_of(kind)
    caches = [filled(model, tokens) for tokens in (list(range(20, 57)), [3], [9, 300, 8, 8])]
    step = FixedStep(model, caches[0], 3, 64)
    step.load(caches)
    alone = [plain(model, cache, tokens) for cache, tokens in zip(caches, ([5, 9], [6, 7], [300, 4]), strict=True)]
    for place, tokens in enumerate(([5, 6, 300], [9, 7, 4])):
        expected = torch.cat([logits[place] for logits in alone])
        torch.testing.assert_close(step(tokens), expected, atol=1e-4, rtol=1e-4)
