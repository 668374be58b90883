"""What a retriever's order is worth beside the attention."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from finch_rag import InputError, Passage
from finch_rag.prefill.prior import agreement, weighted
from finch_rag.prompts.passages import as_passages, ranks_of
from finch_rag.resolving import resolve, with_store

from .small import small_finch, texts

QUESTION = "who built the bridge?"


def falling(count: int, noise: float = 0.0, seed: int = 0) -> torch.Tensor:
    rng = random.Random(seed)
    return torch.tensor([math.exp(-5 * place / count) * math.exp(noise * rng.gauss(0, 1)) for place in range(count)])


def test_an_order_that_the_attention_agrees_with_counts_for_all() -> None:
    attention = falling(100)
    assert agreement(attention, range(100)) == 1
    expected = attention / (torch.arange(100) + 10).sqrt()
    torch.testing.assert_close(weighted(attention, range(100)), expected)


def test_an_order_that_carries_nothing_changes_little() -> None:
    rng, trusts = random.Random(0), []
    for seed in range(200):
        ranks = list(range(100))
        rng.shuffle(ranks)
        trusts.append(agreement(falling(100, 1.0, seed), ranks))
    assert sum(trust == 0 for trust in trusts) > 120
    assert sum(trusts) / 200 < 0.15


def test_an_order_from_worst_to_best_counts_for_nothing() -> None:
    attention = falling(50)
    assert weighted(attention, range(49, -1, -1)) is attention
    assert weighted(attention, None) is attention


@pytest.mark.parametrize("count", [0, 1, 2])
def test_two_passages_say_nothing_about_an_order(count: int) -> None:
    assert agreement(falling(count), range(count)) == 0


def test_attention_that_is_the_same_everywhere_agrees_with_no_order() -> None:
    assert agreement(torch.ones(50), range(50)) == 0
    half = torch.tensor([1.0] * 25 + [0.5] * 25)
    assert agreement(half, range(50)) == 1
    assert agreement(half, [*range(1, 50, 2), *range(0, 50, 2)]) == 0


@given(st.lists(st.floats(0, 1), min_size=3, max_size=40), st.randoms())
def test_weights_lie_between_those_of_no_order_and_of_all_of_it(paid: list[float], rng: random.Random) -> None:
    ranks = list(range(len(paid)))
    rng.shuffle(ranks)
    attention = torch.tensor(paid)
    found = weighted(attention, ranks)
    most = (torch.tensor(ranks) + 10.0).sqrt()
    assert (found <= attention).all()
    assert (found >= attention / most * (1 - 1e-5)).all()


def test_scores_rank_passages_where_all_have_one() -> None:
    scored = [Passage("a", score=0.1), Passage("b", score=7), Passage("c", score=0.1), Passage("d", score=-2.0)]
    assert ranks_of(scored) == [1, 0, 2, 3]
    assert ranks_of([*scored, Passage("e")]) == [0, 1, 2, 3, 4]
    assert ranks_of([]) == []


@pytest.mark.parametrize("score", [math.nan, math.inf, "high", True])
def test_a_score_is_a_finite_number(score: Any) -> None:
    with pytest.raises(InputError, match=r"the score of passage 1 is .*: pass a finite number, or None"):
        as_passages(["a", Passage("b", score=score)])


@pytest.mark.parametrize("store", [None, True])
def test_the_order_reaches_what_is_answered_from(store: Any) -> None:
    finch = small_finch(reread=True, budget=120)
    passages = [Passage(text, id=str(n)) for n, text in enumerate(texts(40))]

    def shares(given: list[Passage], **options: Any) -> dict[str | None, float]:
        cited = finch.rank(QUESTION, given, strategy="independent", store=store, **options)
        return {citation.passage_id: citation.share for citation in cited}

    plain = shares(passages, prior="none")
    best_first = sorted(passages, key=lambda passage: -plain[passage.id])
    assert shares(best_first, prior="none") == pytest.approx(plain, abs=1e-5)
    sharper = shares(best_first)
    best, worst = best_first[0].id, best_first[-1].id
    assert sharper[best] > plain[best] * 1.2
    assert sharper[worst] < plain[worst]
    by_score = [Passage(p.text, p.id, score=-float(place)) for place, p in enumerate(best_first)]
    assert shares(by_score[::-1]) == pytest.approx(sharper, abs=1e-5)
    answered = finch.ask(QUESTION, best_first, strategy="independent", store=store, cutoff=0.25)
    assert answered.citations[0].share == pytest.approx(sharper[best], abs=1e-5)
    assert finch.ask(QUESTION, passages, prior="none", strategy="independent", store=store).citations


def test_only_a_retrievers_order_counts() -> None:
    finch = small_finch(reread=True, budget=60, alone_heads=[(0, 1)])
    passages = as_passages(texts(12))

    def ranks(**changes: Any) -> Any:
        settings = finch.settings.updated(changes)
        return resolve(finch.runtime, QUESTION, passages, settings).ranks

    assert ranks() == tuple(range(12))
    assert ranks(prior="none") is None
    history = [{"role": "user", "content": "Who built it? " * 12}, {"role": "assistant", "content": "Clara. " * 12}]
    assert ranks(history=history * 3) is None  # older turns stand among the passages
    whole = replace(finch.settings, reading=replace(finch.settings.reading, whole_text=True))
    assert resolve(finch.runtime, QUESTION, passages, whole).ranks is None
    store = finch.open_store()
    store.add(passages)
    found, settings = with_store(finch.runtime, QUESTION, [], finch.settings.updated({"store": store}))
    assert found
    assert resolve(finch.runtime, QUESTION, found, settings).ranks is None
