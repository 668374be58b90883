from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AttentionMaskInterface

from finch_rag.errors import DeviceMemoryError
from finch_rag.models.attention import ATTENTION_NAME, AppendedLength, SeenEnough, attention_mask, use_finch_attention
from finch_rag.models.cache import CompressedCache
from finch_rag.models.forward import forward, forward_varlen, on_device, varlen_logits
from finch_rag.models.varlen import VarlenSequence
from finch_rag.prefill.scoring import StopAt

from .small import ARCHITECTURES, small_model

SEQUENCES = ([5, 9, 300, 7], [11], list(range(20, 60)))


def model_of(kind: str) -> Any:
    model = small_model(kind)
    use_finch_attention(model)
    return model


def empty(model: Any) -> CompressedCache:
    return CompressedCache(model.config.num_hidden_layers, 64)


@pytest.mark.parametrize("kind", ARCHITECTURES)
@torch.inference_mode()
def test_sequences_side_by_side_are_read_as_each_alone(kind: str) -> None:
    model = model_of(kind)
    batched, alone = ([empty(model) for _ in SEQUENCES] for _ in range(2))
    for length in (3, 0):  # onto caches that hold something already, of different lengths
        for mine, theirs, tokens in zip(batched, alone, SEQUENCES, strict=True):
            for cache in (mine, theirs):
                if cache.length == 0:
                    forward(model, torch.tensor(tokens[:length]), cache)
    sequences = [VarlenSequence.onto(cache, torch.tensor(ids)) for cache, ids in zip(batched, SEQUENCES, strict=True)]
    logits = varlen_logits(model, sequences)
    for row, cache, mine, tokens in zip(logits, alone, batched, SEQUENCES, strict=True):
        expected = model(torch.tensor([tokens]), past_key_values=cache, use_cache=True).logits[0, -1]
        torch.testing.assert_close(row, expected, atol=1e-4, rtol=1e-4)
        for found, other in zip(mine.layers, cache.layers, strict=True):
            torch.testing.assert_close(found.in_use(), other.in_use(), atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_an_observer_sees_its_own_rows_and_what_they_see() -> None:
    model = model_of("llama")
    seen: dict[str, list[tuple[int, int, int]]] = {"first": [], "second": []}

    def watch(name: str) -> Any:
        return lambda layer, query, key, scaling: seen[name].append((layer, query.shape[2], key.shape[2]))

    first, second = empty(model), empty(model)
    forward(model, torch.tensor([8, 9]), second)
    forward_varlen(
        model,
        [
            VarlenSequence.onto(first, torch.tensor([3, 4, 5]), watch("first")),
            VarlenSequence.onto(second, torch.tensor([6]), watch("second")),
        ],
    )
    assert seen == {"first": [(0, 3, 3), (1, 3, 3)], "second": [(0, 1, 3), (1, 1, 3)]}


@torch.inference_mode()
def test_a_pass_that_has_seen_enough_ends_with_every_sequence_in_its_cache() -> None:
    model = model_of("llama")
    caches = [CompressedCache(1, 8), CompressedCache(1, 8)]  # no layer above the first is asked for
    forward_varlen(model, [VarlenSequence.onto(cache, torch.tensor([3, 4]), StopAt(0)) for cache in caches])
    assert [cache.length for cache in caches] == [2, 2]


@torch.inference_mode()
def test_a_sequence_may_see_what_another_has_just_appended() -> None:
    model = model_of("llama")
    text, expected = empty(model), empty(model)
    forward(model, torch.tensor([5, 9, 300, 7, 8]), expected)

    def behind(layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = text.layers[layer].in_use()
        torch.testing.assert_close(key, expected.layers[layer].in_use()[0][:, :, 3:], atol=1e-4, rtol=1e-4)
        return torch.cat((keys, key), dim=2), torch.cat((values, value), dim=2)

    question = VarlenSequence(torch.tensor([7, 8]), torch.tensor([3, 4]), behind)
    forward_varlen(model, [VarlenSequence.onto(text, torch.tensor([5, 9, 300])), question])
    assert text.length == 3


def test_memory_that_runs_out_says_how_much_was_tried() -> None:
    model = model_of("llama")

    def fail(layer: int, query: torch.Tensor, key: torch.Tensor, scaling: float) -> None:
        raise torch.OutOfMemoryError("out of memory")

    sequences = [VarlenSequence.onto(empty(model), torch.tensor([3, 4]), fail) for _ in range(2)]
    with pytest.raises(DeviceMemoryError, match="4 tokens in 2 sequences"), torch.inference_mode():
        forward_varlen(model, sequences)


def test_other_signals_of_an_observer_pass() -> None:
    model = model_of("llama")

    def fail(layer: int, query: torch.Tensor, key: torch.Tensor, scaling: float) -> None:
        raise KeyError

    with pytest.raises(KeyError), torch.inference_mode():
        forward_varlen(model, [VarlenSequence.onto(empty(model), torch.tensor([3]), fail)])
    assert not issubclass(KeyError, SeenEnough)


def test_every_pass_tells_the_mask_that_its_columns_end_with_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama")
    told: list[object] = []

    def spy(*args: Any, **kwargs: Any) -> torch.Tensor | None:
        told.append(kwargs["kv_length"])
        return attention_mask(*args, **kwargs)

    monkeypatch.setitem(AttentionMaskInterface._global_mapping, ATTENTION_NAME, spy)
    cache, tokens = empty(model), torch.tensor([3, 4])
    with torch.inference_mode():
        forward(model, tokens, cache)
        forward(model, tokens, cache)
        varlen_logits(model, [VarlenSequence.onto(cache, tokens), VarlenSequence.onto(empty(model), tokens)])
    assert told == [2, 4, 4]
    assert all(isinstance(columns, AppendedLength) for columns in told)


def test_numbers_are_put_on_a_device() -> None:
    for numbers in ([3, 4], []):
        tensor = on_device(numbers, torch.device("cpu"))
        assert (tensor.tolist(), tensor.dtype) == (numbers, torch.int64)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_numbers_are_put_on_a_gpu_while_it_is_busy() -> None:
    torch.cuda._sleep(1_000_000_000)  # cycles, half a second or so
    tensor = on_device([3, 4], torch.device("cuda"))
    assert not torch.cuda.current_stream().query()
    assert tensor.tolist() == [3, 4]
    assert on_device([], torch.device("cuda")).tolist() == []
