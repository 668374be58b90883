"""Attention that is written out, in all the ways in which model files do it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from finch_rag.models.products import ProductWindow, is_plain, scaling_of

SCALING = 0.3
_FUTURE = torch.full((6, 6), torch.finfo(torch.float32).min).triu(1)


def states(heads: int = 4, kv_heads: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values of two sequences, shape [2, heads, 6, 8]."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, count, 6, 8, generator=generator) for count in (heads, kv_heads, kv_heads))
    return query, key, value


def scaled_products(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return nn.functional.softmax(query @ key.transpose(-1, -2) * SCALING + _FUTURE, dim=-1) @ value


def masked_first(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    scores = torch.matmul(query, key.transpose(-1, -2)).masked_fill(_FUTURE < 0, float("-inf"))
    return torch.matmul(nn.Softmax(dim=-1)(scores / (1 / SCALING)), value)


def scaled_queries_by_head(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    query, key, value = (each.flatten(0, 1) for each in (query * SCALING, key, value))
    scores = torch.bmm(query, key.transpose(1, 2)).view(2, 4, 6, 6) + _FUTURE
    return torch.bmm(scores.softmax(-1).view(8, 6, 6), value)


def added_to_nothing(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    query, key, value = (each.flatten(0, 1) for each in (query, key, value))
    scores = torch.zeros(8, 6, 6).baddbmm(batch1=query, batch2=key.transpose(1, 2), beta=1.0, alpha=SCALING)
    return torch.bmm(torch.softmax(scores + _FUTURE, dim=-1), value)


@pytest.mark.parametrize(
    ("attend", "kv_heads", "scaling"),
    [
        (scaled_products, 4, SCALING),
        (scaled_products, 1, SCALING),
        (masked_first, 4, SCALING),
        (scaled_queries_by_head, 4, 1.0),
        (added_to_nothing, 4, SCALING),
    ],
)
def test_products_are_seen(attend: Callable[..., torch.Tensor], kv_heads: int, scaling: float) -> None:
    query, key, value = states(kv_heads=kv_heads)
    found: list[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]] = []
    expected = attend(query, key, value)
    with ProductWindow(2, lambda *seen: found.append(seen)):
        for _ in range(2):
            assert torch.equal(attend(query, key, value), expected)
    attend(query, key, value)
    assert [layer for layer, *_ in found] == [0, 1]
    for _, queries, keys, scores in found:
        torch.testing.assert_close(queries, query * SCALING if scaling == 1 else query)
        torch.testing.assert_close(keys, key)
        assert is_plain(queries, keys, scores)
        assert scaling_of(queries, keys, scores) == pytest.approx(scaling, rel=1e-5)


def test_the_choice_of_experts_is_no_attention() -> None:
    query, key, value = states()
    layers: list[int] = []
    with ProductWindow(2, lambda layer, *seen: layers.append(layer)):
        hidden = scaled_products(query, key, value)
        torch.softmax(hidden[:, 0, :, :3], -1)
        torch.softmax(hidden.flatten(0, 2), -1)
        torch.softmax(hidden.flatten(0, 1) @ torch.ones(8, 3), -1).softmax(-1)
        torch.softmax(query @ key.transpose(-1, -2), -1).softmax(-1)  # of products once
    assert layers == [0, 1]


@pytest.mark.parametrize("slope", [0.01, 0.5])
def test_what_tells_distances_is_not_plain(slope: float) -> None:
    query, key, _ = states()
    products = query @ key.transpose(-1, -2)
    assert is_plain(query, key, products)
    assert not is_plain(query, key, products + slope * torch.arange(6))
    assert not is_plain(query, key, 5 * torch.tanh(products / 5))
    assert not is_plain(query, key, products.tril().triu(-2) + _FUTURE)
