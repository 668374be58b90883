from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from finch_rag.prefill.selection import SELECTIONS, select_passages, select_to_re_prefill, select_tokens


@st.composite
def documents(draw: st.DrawFn) -> tuple[torch.Tensor, list[int], int]:
    """Distinct whole scores, whose sums are exact, of all columns, the passage of each, and a budget."""
    sizes = draw(st.lists(st.integers(1, 9), min_size=1, max_size=8))
    names = sorted(draw(st.sets(st.integers(0, 30), min_size=len(sizes), max_size=len(sizes))))  # gaps: evicted ones
    columns = sum(sizes)
    order = draw(st.permutations(range(columns)))
    passage_of = [name for name, size in zip(names, sizes, strict=True) for _ in range(size)]
    return torch.tensor(order) + 1.0, passage_of, draw(st.integers(1, columns + 3))


def reference(scores: list[float], passage_of: list[int], budget: int) -> list[int]:
    """Whole passages by their sums while they fit, then the best tokens of the first that does not."""
    members = {name: [c for c, own in enumerate(passage_of) if own == name] for name in set(passage_of)}
    ranked = sorted(members, key=lambda name: (-sum(scores[c] for c in members[name]), name))
    kept: list[int] = []
    for name in ranked:
        room = budget - len(kept)
        kept += sorted(members[name], key=lambda c: -scores[c])[:room]
        if len(members[name]) >= room:
            break
    return sorted(kept)


@given(documents())
def test_passages_are_kept_whole_by_rank_then_tokens_of_the_next(case: tuple[torch.Tensor, list[int], int]) -> None:
    scores, passage_of, budget = case
    kept = select_passages(scores, torch.tensor(passage_of), budget, 31).tolist()
    assert kept == reference(scores.tolist(), passage_of, budget)
    assert len(kept) == min(budget, len(passage_of))


@given(documents())
def test_each_layer_keeps_its_own_best_tokens(case: tuple[torch.Tensor, list[int], int]) -> None:
    scores, _, budget = case
    layers = torch.stack((scores, scores.flip(0)))
    kept = select_tokens(layers, budget)
    assert kept.shape == (2, min(budget, len(scores)))
    for row, layer in zip(kept.tolist(), layers.tolist(), strict=True):
        assert row == sorted(sorted(range(len(layer)), key=lambda c: -layer[c])[:budget])


def test_a_later_passage_does_not_jump_over_one_that_is_too_large() -> None:
    scores = torch.tensor([1.0, 1.0, 9.0, 1.0, 9.0, 1.0, 2.0])  # sums 2, 20, 2 of sizes 2, 4, 1
    assert select_passages(scores, torch.tensor([0, 0, 1, 1, 1, 1, 2]), 3, 3).tolist() == [2, 3, 4]


def test_of_equal_passages_the_earlier_is_kept() -> None:
    assert select_passages(torch.ones(6), torch.tensor([0, 0, 1, 1, 2, 2]), 4, 3).tolist() == [0, 1, 2, 3]


def test_the_names_of_the_selections() -> None:
    assert SELECTIONS == ("passage", "token")


def reread(attention: list[float], budget: int = 100, cutoff: float = 0.0, kept: Sequence[int] = range(8)) -> list[int]:
    passage_of = torch.tensor([0, 0, 1, 1, 1, 2, 3, 3])
    return select_to_re_prefill(torch.tensor(list(kept)), passage_of, torch.tensor(attention), budget, cutoff).tolist()


def test_the_best_passage_is_read_last() -> None:
    assert reread([0.3, 0.0, 0.1, 0.2]) == [2, 3, 4, 5, 6, 7, 0, 1]


@pytest.mark.parametrize(
    ("budget", "expected"), [(8, [5, 6, 7, 0, 1, 2, 3, 4]), (7, [6, 7, 0, 1, 2, 3, 4]), (6, [0, 1, 2, 3, 4]), (2, [])]
)
def test_the_best_passages_that_fit_whole_are_read_again(budget: int, expected: list[int]) -> None:
    assert reread([0.3, 0.4, 0.1, 0.2], budget) == expected


def test_fragments_are_not_read_again_beside_whole_passages() -> None:
    assert reread([0.1, 0.9, 0.2, 0.0], kept=[0, 1, 2, 4, 5]) == [0, 1, 5]


def test_where_no_passage_was_kept_whole_those_of_which_a_part_was_are_read_whole() -> None:
    assert reread([0.3, 0.4, 0.9, 0.2], kept=[1, 3, 6]) == [6, 7, 0, 1, 2, 3, 4]


def test_passages_far_below_the_best_are_not_read_again() -> None:
    assert reread([0.4, 0.09, 0.1, 0.09], cutoff=0.25) == [5, 0, 1]


def test_passages_without_tokens_are_no_obstacle() -> None:
    assert reread([0.4, 0.3, 0.2, 0.1, 0.5], 5) == [2, 3, 4, 0, 1]
    nothing = torch.zeros(0, dtype=torch.long)
    assert select_to_re_prefill(nothing, nothing, torch.zeros(0), 5, 0.0).tolist() == []
