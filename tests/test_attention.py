from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import StaticCache

from finch_rag.models.attention import (
    attention_forward,
    attention_mask,
    causal_attention,
    one_query_attention,
    use_finch_attention,
)
from finch_rag.models.cache import CompressedLayer

from .small import ARCHITECTURES, chat_tokenizer, small_model

SLIDING = {"sliding_window": 8}
CASES = [*((kind, {}) for kind in ARCHITECTURES), ("mistral", SLIDING), ("mistral", {"sliding_window": None})]


def pair(kind: str, changes: dict[str, Any]) -> tuple[Any, Any]:
    """The same model with SDPA and with Finch's attention."""
    finch = small_model(kind, **changes)
    use_finch_attention(finch)
    return small_model(kind, "sdpa", **changes), finch


def left_padded_batch() -> dict[str, torch.Tensor]:
    tokenizer = chat_tokenizer()
    tokenizer.padding_side = "left"
    batch = ["who built the bridge?", "The museum opened in 1931 and holds a large collection of instruments", "coast"]
    return dict(tokenizer(batch, return_tensors="pt", padding=True))


def by_hand(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
    """Attention row by row."""
    rows, columns, group = query.shape[2], key.shape[2], query.shape[1] // key.shape[1]
    output = torch.zeros(*query.shape[:3], value.shape[-1])
    for head in range(query.shape[1]):
        for row in range(rows):
            seen = columns - rows + row + 1
            weights = (query[0, head, row] @ key[0, head // group, :seen].T * scaling).softmax(-1)
            output[0, head, row] = weights @ value[0, head // group, :seen]
    return output


def test_masks_are_asked_for_in_the_words_of_all_versions_of_transformers_5() -> None:
    new = attention_mask(1, q_length=3, kv_length=9, q_offset=6)
    old = attention_mask(1, cache_position=torch.arange(6, 9), kv_length=9)
    assert new is None
    assert old is None
    layer = CompressedLayer(12)
    layer.length = 6
    assert layer.get_mask_sizes(3) == (9, 0)
    assert layer.get_mask_sizes(torch.arange(6, 9)) == (9, 0)
    assert layer.get_max_cache_shape() == layer.get_max_length() == 12


def test_up_to_transformers_5_2_nobody_asks_the_device_for_the_rows_positions() -> None:
    out_of_reach = torch.arange(6, 9, device="meta")  # raises when asked for a number
    layer = CompressedLayer(12)
    layer.length = 6
    columns, offset = layer.get_mask_sizes(out_of_reach)
    assert attention_mask(1, cache_position=out_of_reach, kv_length=columns, kv_offset=offset) is None
    with pytest.raises(RuntimeError, match="meta"):  # another cache may show more columns than are filled
        attention_mask(1, cache_position=out_of_reach, kv_length=9)


@pytest.mark.parametrize("heads", [(4, 2), (6, 1), (4, 4)])
@pytest.mark.parametrize("additive", [False, True])
def test_one_row_sees_what_the_mask_lets_it_see(heads: tuple[int, int], additive: bool) -> None:
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(1, count, tokens, 8) for count, tokens in ((heads[0], 1), (heads[1], 9), (heads[1], 9))
    )
    mask = torch.arange(9)[None, None, None] <= 5
    seen = torch.zeros(1, 1, 1, 9).masked_fill(~mask, float("-inf")) if additive else mask
    found = one_query_attention(query, key, value, seen, 0.3)
    expected = by_hand(query, key[:, :, :6], value[:, :, :6], 0.3).transpose(1, 2)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    # and so it does in a batch, each row with a mask of its own
    both = one_query_attention(
        query.expand(2, -1, -1, -1), key.expand(2, -1, -1, -1), value.expand(2, -1, -1, -1),
        torch.cat((mask, torch.arange(9)[None, None, None] <= 2)), 0.3,
    )  # fmt: skip
    torch.testing.assert_close(both[:1], expected, atol=1e-6, rtol=1e-5)
    shorter = by_hand(query, key[:, :, :3], value[:, :, :3], 0.3).transpose(1, 2)
    torch.testing.assert_close(both[1:], shorter, atol=1e-6, rtol=1e-5)


@given(st.integers(1, 9), st.integers(0, 9), st.sampled_from([(4, 4), (4, 2), (3, 1)]))
@settings(deadline=None, max_examples=40)
def test_causal_attention_sees_the_past_and_no_future(rows: int, past: int, heads: tuple[int, int]) -> None:
    torch.manual_seed(rows * 100 + past)
    query = torch.randn(1, heads[0], rows, 8)
    key, value = torch.randn(2, 1, heads[1], past + rows, 8)
    output = causal_attention(query, key, value, 0.3)
    torch.testing.assert_close(output, by_hand(query, key, value, 0.3), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [255, 256, 257, 600])
def test_causal_attention_in_blocks_of_rows_is_the_same(rows: int) -> None:
    torch.manual_seed(0)
    query, (key, value) = torch.randn(1, 2, rows, 8), torch.randn(2, 1, 1, rows + 70, 8)
    scores = query @ key.transpose(2, 3) * 0.3
    future = torch.ones(rows, rows + 70, dtype=torch.bool).triu(70 + 1)
    expected = scores.masked_fill(future, -math.inf).softmax(-1) @ value
    torch.testing.assert_close(causal_attention(query, key, value, 0.3), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("kind", "changes"), CASES)
def test_a_forward_equals_eager_attention(kind: str, changes: dict[str, Any]) -> None:
    tokens = torch.arange(5, 45)[None]
    _, finch = pair(kind, changes)
    with torch.inference_mode():
        expected = small_model(kind, "eager", **changes)(tokens).logits
        torch.testing.assert_close(finch(tokens).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("kind", "changes"), CASES)
def test_an_ordinary_left_padded_generate_is_unharmed(kind: str, changes: dict[str, Any]) -> None:
    plain, finch = pair(kind, changes)
    batch = left_padded_batch()
    options: dict[str, Any] = {
        "max_new_tokens": 16,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    expected, found = plain.generate(**batch, **options), finch.generate(**batch, **options)
    assert found.sequences.tolist() == expected.sequences.tolist()
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), atol=1e-4, rtol=1e-4)


def test_a_static_cache_is_unharmed() -> None:
    plain, finch = pair("llama", {})
    tokens = torch.arange(5, 25)[None]
    logits = []
    for model in (plain, finch):
        cache = StaticCache(config=model.config, max_cache_len=40)
        with torch.inference_mode():
            first = model(tokens, past_key_values=cache).logits
            logits.append(torch.cat((first, model(tokens[:, :3], past_key_values=cache).logits), dim=1))
    torch.testing.assert_close(logits[1], logits[0], atol=1e-4, rtol=1e-4)


def test_an_observer_sees_each_layers_rotated_queries_and_keys_once() -> None:
    seen: list[tuple[int, tuple[int, ...], tuple[int, ...], float]] = []

    def observe(layer: int, query: torch.Tensor, key: torch.Tensor, scaling: float) -> None:
        seen.append((layer, tuple(query.shape), tuple(key.shape), scaling))

    _, finch = pair("llama", {"num_hidden_layers": 3})
    with torch.inference_mode():
        finch(torch.arange(5, 12)[None], finch_observer=observe)
    assert seen == [(layer, (1, 4, 7, 16), (1, 2, 7, 16), 0.25) for layer in range(3)]


def test_a_later_call_without_observer_is_not_observed() -> None:
    seen: list[int] = []
    _, finch = pair("llama", {})
    with torch.inference_mode():
        finch(torch.arange(5, 12)[None], finch_observer=lambda layer, *rest: seen.append(layer))
        finch(torch.arange(5, 12)[None])
    assert seen == [0, 1]


def test_attention_that_is_not_causal_stays_so() -> None:
    torch.manual_seed(0)
    query, (key, value) = torch.randn(1, 4, 6, 8), torch.randn(2, 1, 4, 6, 8)
    module = torch.nn.Module()
    module.is_causal = False  # type: ignore[assignment]
    output, _ = attention_forward(module, query, key, value, None, scaling=0.3, is_causal=False)
    expected = (query @ key.transpose(2, 3) * 0.3).softmax(-1) @ value
    torch.testing.assert_close(output.transpose(1, 2), expected, atol=1e-5, rtol=1e-5)
