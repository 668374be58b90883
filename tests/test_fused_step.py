"""The fused step computes what the model's own forward does.

Its kernels run on the GPU where there is one, and else in Triton's interpreter.
"""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import pytest
import torch

from finch_rag.decode import static_step
from finch_rag.decode.cuda_graphs import CudaGraphs
from finch_rag.decode.fused_step import can_fuse
from finch_rag.decode.static_step import StaticStep
from finch_rag.models.attention import use_finch_attention

from .small import ARCHITECTURES, small_finch, small_model, texts
from .test_cuda_graphs import filled, plain

pytest.importorskip("triton", reason="Triton is not made for this platform")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cuts the work into fewer programs: the interpreter takes milliseconds for each."""
    if DEVICE == "cpu":
        monkeypatch.setattr("finch_rag.decode.kernels.products._ROWS", 32)
        monkeypatch.setattr("finch_rag.decode.kernels.attention._PROGRAMS", 4)
        monkeypatch.setattr("finch_rag.decode.kernels.attention._PROGRAMS_OF_SEVERAL", 12)


def model_of(kind: str = "llama", **changes: Any) -> Any:
    model = small_model(kind, **changes).to(DEVICE)
    use_finch_attention(model)
    return model


def check(model: Any, length: int, capacity: int = 256) -> None:
    """Three tokens by a fused step, on a cache of so many tokens, against passes on the cache itself."""
    cache = filled(model, [token % 390 for token in range(7, 7 + length)])
    step = StaticStep(model, cache, 1, capacity, fused=True)
    step.load([cache])
    for token, expected in zip([5, 9, 300], plain(model, cache, [5, 9, 300]), strict=True):
        torch.testing.assert_close(step([token]), expected.float(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_fused_step_computes_what_the_model_computes(kind: str) -> None:
    check(model_of(kind), 137)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_several_answers_each_go_on_from_their_own_cache(kind: str) -> None:
    check_several(model_of(kind), [137, 3, 64])


def check_several(model: Any, lengths: list[int]) -> None:
    """Three tokens each by a fused step with an empty place, against passes on the caches themselves."""
    caches = [filled(model, [token % 390 for token in range(7, 7 + length)]) for length in lengths]
    step = StaticStep(model, caches[0], len(caches) + 1, 256, fused=True)
    step.clear(1)
    places = [0, *range(2, len(caches) + 1)]
    for place, cache in zip(places, caches, strict=True):
        step.load_one(place, cache)
    tokens = [5, 9, 300]
    expected = [plain(model, cache, tokens) for cache in caches]
    for number, token in enumerate(tokens):
        logits = step([token] * (len(caches) + 1))
        for place, own in zip(places, expected, strict=True):
            torch.testing.assert_close(logits[place : place + 1], own[number].float(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("length", [1, 62, 63, 64, 65, 190])
def test_a_cache_of_any_length_is_split_among_programs(length: int) -> None:
    check(model_of(), length)


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_bias": True, "mlp_bias": True},
        {"num_key_value_heads": 4},
        {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2},
        {"head_dim": 32},
        {"hidden_size": 36, "head_dim": 16, "intermediate_size": 70},
        {"intermediate_size": 1100},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
        {"tie_word_embeddings": True},
    ],
    ids=["biases", "a key for each head", "three heads a key", "wide heads", "odd sizes", "two tiles", "rope", "tied"],
)
def test_shapes_may_be_any(changes: dict[str, Any]) -> None:
    model = model_of(**changes)
    for parameter in model.parameters():  # biases and norms are made as zeros and ones
        if parameter.dim() == 1:
            drawn = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
            parameter.data.copy_(1 + 0.3 * drawn)
    assert can_fuse(model)
    check(model, 70)
    check_several(model, [70, 5])


def test_what_it_writes_into_the_cache_is_what_a_pass_writes() -> None:
    model = model_of("qwen3")
    cache = filled(model, list(range(20, 57)))
    step = StaticStep(model, cache, 1, 64, fused=True)
    step.load([cache])
    step([5])
    plain(model, cache, [5])
    for (keys, values), layer in zip(step.buffers, cache.layers, strict=True):
        for buffer, states in ((keys, layer.keys), (values, layer.values)):
            assert states is not None
            torch.testing.assert_close(buffer[:, :, :38], states[:, :, :38], atol=1e-5, rtol=1e-5)
            assert not buffer[:, :, 38:].any()


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float16,
        pytest.param(
            torch.bfloat16,
            marks=pytest.mark.skipif(DEVICE == "cpu", reason="Triton's interpreter multiplies bfloat16 as integers"),
        ),
    ],
)
def test_half_precision_differs_by_rounding_alone(dtype: torch.dtype) -> None:
    model = model_of().to(dtype)
    cache = filled(model, list(range(20, 157)))
    step = StaticStep(model, cache, 1, 256, fused=True)
    step.load([cache])
    got, expected = step([5]).float(), plain(model, cache, [5])[0].float()
    assert (got - expected).norm() < 0.02 * expected.norm()


def test_only_what_it_computes_exactly_is_fused() -> None:
    assert can_fuse(model_of())
    assert not can_fuse(model_of(hidden_act="gelu"))
    assert not can_fuse(model_of(hidden_size=96, head_dim=24))
    assert not can_fuse(model_of(head_dim=8))
    model = model_of()

    class Other(type(model)):  # type: ignore[misc]
        """It could compute something else."""

    model.__class__ = Other
    assert not can_fuse(model)


@pytest.mark.parametrize("name", ["self_attn.k_proj", "self_attn.o_proj", "mlp.down_proj"])
def test_quantised_and_adapted_weights_are_not_fused(name: str) -> None:
    class Adapted(torch.nn.Linear):
        """As bitsandbytes and PEFT do."""

    model = model_of()
    model.model.layers[1].get_submodule(name).__class__ = Adapted
    assert not can_fuse(model)
    model = model_of()
    linear = model.model.layers[1].get_submodule(name)
    linear.weight = torch.nn.Parameter(linear.weight.t().contiguous().t())
    assert not can_fuse(model)


def test_without_triton_models_decode_by_their_own_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else find_spec(name))
    assert not can_fuse(model_of())


@pytest.fixture
def fused_steps(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of every step that is made, whether it is fused."""
    made: list[bool] = []
    init = StaticStep.__init__

    def noted(step: StaticStep, *args: Any, **options: Any) -> None:
        made.append(options.get("fused", False))
        init(step, *args, **options)

    monkeypatch.setattr(StaticStep, "__init__", noted)
    return made


def graphs_of(model: Any) -> CudaGraphs:
    """Its steps are lent on any device."""
    graphs = CudaGraphs(model)
    graphs.enabled = graphs.fused = True
    return graphs


def test_an_answer_is_decoded_by_fused_steps(monkeypatch: pytest.MonkeyPatch, fused_steps: list[bool]) -> None:
    expected = small_finch(max_new_tokens=12).ask("When?", texts(8)).text
    finch = small_finch(max_new_tokens=12)
    torch.nn.Module.to(finch.model, DEVICE)
    monkeypatch.setattr(finch.runtime, "graphs", graphs_of(finch.model))
    assert finch.ask("When?", texts(8)).text == expected
    assert fused_steps == [True]


def test_several_answers_are_decoded_by_a_fused_step(fused_steps: list[bool]) -> None:
    graphs = graphs_of(model_of())
    cache = filled(graphs.model, [3, 4])
    with graphs.lend([cache, cache], 8):
        assert fused_steps == [True]


def test_where_triton_fails_models_decode_by_their_own_kernels(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fused_steps: list[bool]
) -> None:
    def fail(model: Any, answers: int) -> None:
        raise OSError("no C compiler")

    monkeypatch.setattr(static_step, "FusedStep", fail)
    graphs = graphs_of(model_of())
    cache = filled(graphs.model, [3, 4])
    with caplog.at_level(logging.WARNING), graphs.lend([cache], 8) as first, graphs.lend([cache], 8) as second:
        assert first is not None
        assert second is not None
    assert fused_steps == [True, False, False]
    assert [record.message for record in caplog.records] == [
        "LlamaForCausalLM decodes by its own kernels, which is slower, because Triton's failed: no C compiler"
    ]


def test_memory_that_runs_out_is_no_failure_of_tritons(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(model: Any, answers: int) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(static_step, "FusedStep", fail)
    graphs = graphs_of(model_of())
    with graphs.lend([filled(graphs.model, [3, 4])], 8) as step:
        assert step is None
    assert graphs.fused
