"""Heads for passages that are read alone: found on pooled examples, stored beside those of the loop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finch_rag import Finch, InputError
from finch_rag.heads import stored
from finch_rag.heads.alone import find_alone_heads
from finch_rag.heads.examples import HeadExample
from finch_rag.heads.search import HeadScore
from finch_rag.heads.stored import load_heads, resolve_alone_heads, save_heads
from finch_rag.models.embedded import EMBEDDED

from .small import CONVERTS, chat_tokenizer, small_model

EXAMPLES = [
    HeadExample("who built the bridge?", ("The bridge was built by Novak.", "The museum opened in 1931."), 0),
    HeadExample("when did the museum open?", ("A drought came.", "The museum opened in 1931."), 1),
]


def roomy_model() -> Any:
    return small_model(max_position_embeddings=8192)


def test_heads_are_found_the_best_first_and_the_same_each_time() -> None:
    told: list[tuple[int, int]] = []
    found = find_alone_heads(roomy_model(), chat_tokenizer(), 5, EXAMPLES, lambda *done: told.append(done))
    assert [head.score for head in found] == sorted((head.score for head in found), reverse=True)
    assert len({(head.layer, head.head) for head in found}) == 5
    assert found == find_alone_heads(roomy_model(), chat_tokenizer(), 5, EXAMPLES)
    assert told == [(1, 2), (2, 2)]


def test_a_score_is_the_mean_reciprocal_rank_of_the_right_passage() -> None:
    everything = find_alone_heads(roomy_model(), chat_tokenizer(), 8, EXAMPLES)
    assert len(everything) == 8
    ranks = [1, 1 / 2, 1 / 3, 1 / 4]  # of four passages
    means = {round((one + other) / 2, 5) for one in ranks for other in ranks}
    assert {round(head.score, 5) for head in everything} <= means
    twice = [HeadExample("who?", ("The same text.", "The same text."), 0)]
    for head in find_alone_heads(roomy_model(), chat_tokenizer(), 8, twice):
        assert head.score == pytest.approx(1 / 2)  # of equals none is first


@pytest.mark.parametrize(
    ("n", "examples", "reason"), [(0, EXAMPLES, "n is 0"), (99, EXAMPLES, "n is 99"), (1, [], "no ex")]
)
def test_what_cannot_be_found_is_refused(n: int, examples: list[HeadExample], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        find_alone_heads(roomy_model(), chat_tokenizer(), n, examples)


def test_both_uses_stand_in_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = roomy_model()
    file = save_heads(model, "small", [HeadScore(0, 1, 0.5)])
    assert load_heads(model, "alone") is None
    save_heads(model, "small", [HeadScore(1, 2, 0.25)], "alone")
    assert (load_heads(model), load_heads(model, "alone")) == ([(0, 1)], [(1, 2)])
    save_heads(model, "small", [HeadScore(0, 3, 0.5)])
    assert (load_heads(model), load_heads(model, "alone")) == ([(0, 3)], [(1, 2)])
    assert set(json.loads(file.read_text())) == {"format", "model", "heads", "alone_heads"}


def test_heads_are_found_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls: list[int] = []

    def find(model: Any, tokenizer: Any, n: int, **options: Any) -> list[HeadScore]:
        calls.append(n)
        return [HeadScore(1, 2, 0.25), HeadScore(0, 3, 0.5)]

    monkeypatch.setattr(stored, "find_alone_heads", find)
    finch = Finch(roomy_model(), chat_tokenizer())
    with finch.open_store() as store, finch.open_store() as other:
        assert store.heads == other.heads == ((0, 3), (1, 2))
    assert resolve_alone_heads("auto", roomy_model(), chat_tokenizer(), "small") == {0: [3], 1: [2]}
    assert calls == [8]  # all that the model has in the lower two thirds of its layers


@CONVERTS
@pytest.mark.embedded
def test_the_embedded_models_heads_are_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    finch = Finch.from_pretrained(EMBEDDED)
    pairs = load_heads(finch.model, "alone")
    assert pairs is not None
    assert len(pairs) == 12
    with finch.open_store() as store:
        store.add(["The lighthouse was lit in 1902.", "The bridge was built by Clara Novak.", "The museum is closed."])
        assert store.search("Who built the bridge?", 1)[0].index == 1
