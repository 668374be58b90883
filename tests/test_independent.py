"""Independent reading: each passage alone, once for all questions, and the best of them into the cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import pytest
import torch

from finch_rag import Finch, InputError, Passage, WindowError
from finch_rag.models.cache import CompressedCache
from finch_rag.models.forward import forward
from finch_rag.prefill import alone
from finch_rag.prefill.alone import NEUTRAL, AloneReader, Asked
from finch_rag.prefill.independent import AloneQuestion, rank_independently
from finch_rag.prefill.shortlists import prefill_best
from finch_rag.reading import planned
from finch_rag.request import Cancelled
from finch_rag.resolving import resolve

from .small import chat_tokenizer, small_model, texts

QUESTION = "who built the bridge?"
HEADS = [(0, 1), (1, 2)]
OTHER_QUESTIONS = ["when was the harbour dug?", "what is kept in the old museum, and since when?"]


def new_finch(**changes: Any) -> Finch:
    model = small_model(max_position_embeddings=changes.pop("window", 4096))
    settings = {"alone_heads": HEADS, "heads": [(1, 0)], "budget": 80, "max_new_tokens": 4, **changes}
    return Finch(model, chat_tokenizer(), name="small", **settings)


@pytest.fixture(scope="module")
def finch() -> Finch:
    return new_finch()


def named(count: int, seed: int = 0) -> list[Passage]:
    return [Passage(text, f"p{n}", f"T{n}") for n, text in enumerate(texts(count, seed))]


def pairs(answer: Any) -> dict[int, tuple[float, int]]:
    return {cited.index: (cited.share, cited.kept_tokens) for cited in answer.citations}


def assert_same(found: Any, expected: Any) -> None:
    assert found.text == expected.text
    assert pairs(found).keys() == pairs(expected).keys()
    for index, (share, kept) in pairs(expected).items():
        assert pairs(found)[index][0] == pytest.approx(share, rel=1e-3)
        assert pairs(found)[index][1] == kept


class Encoded(list[int]):
    """Tokens of passages in each pass that reads them alone."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        encode = AloneReader.encode

        def counted(reader: AloneReader, passages: Sequence[Sequence[int]]) -> torch.Tensor:
            self.append(sum(map(len, passages)))
            return encode(reader, passages)

        monkeypatch.setattr(AloneReader, "encode", counted)


# What it computes


def reader_of(finch: Finch) -> AloneReader:
    return finch.runtime.alone_reader()


def asked(finch: Finch, question: str) -> Asked:
    return Asked.by(finch.prompts, question)


def ranked(finch: Finch, *questions: tuple[str, Sequence[Sequence[int]]]) -> list[torch.Tensor]:
    read = [AloneQuestion(asked(finch, question), passages) for question, passages in questions]
    return rank_independently(reader_of(finch), read, asked(finch, NEUTRAL))[0]


def test_attention_is_that_of_a_question_over_all_passages_at_once(finch: Finch) -> None:
    """By a plain reference: each passage behind the prefix in a cache of its own, one softmax over all of them."""
    reader, passages = reader_of(finch), finch.prompts.encode(texts(7))
    keys = []
    for passage in passages:
        cache = CompressedCache(2, len(reader.prefix) + len(passage))
        with torch.inference_mode():
            forward(finch.model, torch.tensor([*reader.prefix, *passage]), cache)
        keys.append(
            [layer.in_use()[0][0, :, len(reader.prefix) :] for layer in cache.layers]
        )  # [kv_heads, tokens, dim]
    look = reader.look(asked(finch, QUESTION), asked(finch, NEUTRAL), max(map(len, passages)))
    own, totals = look.own_tokens, []
    for group, (layer, kv_head) in enumerate(reader.groups):
        head_keys = torch.cat([of_layers[layer][kv_head] for of_layers in keys])
        for head in look.present[group].nonzero().flatten().tolist():
            start = head * (look.queries.shape[1] // look.present.shape[1])
            rows = look.queries[group, start : start + look.queries.shape[1] // look.present.shape[1]]
            outside = look.elsewhere[group, start : start + len(rows), None]
            weights = torch.cat((outside, rows @ head_keys.T * look.scaling), 1).softmax(1)[:, 1:]
            sums = torch.stack([part.sum(1) for part in weights.split(list(map(len, passages)), 1)], 1)
            question, neutral = sums[:own].mean(0), sums[own:].mean(0)
            totals.append(own * ((question - neutral).relu() + 1e-3 * question))
    expected = torch.stack(totals).sum(0)
    torch.testing.assert_close(ranked(finch, (QUESTION, passages))[0], expected, atol=1e-5, rtol=1e-3)


def test_passes_questions_and_empty_passages_make_no_difference(finch: Finch, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = finch.prompts.encode(texts(9)), finch.prompts.encode(texts(6, seed=1))
    mixed = [second[2], [], first[4], second[0], second[2]]
    lists = [(QUESTION, first), (OTHER_QUESTIONS[0], second), (OTHER_QUESTIONS[1], mixed), (QUESTION, second)]
    one_by_one = [ranked(finch, each)[0] for each in lists]
    read = Encoded(monkeypatch)
    monkeypatch.setattr(alone, "_TOKENS_PER_PASS", {"cpu": 40})
    together = ranked(finch, *lists)
    assert sum(read) == sum(map(len, [*first, *second]))  # each text once, though three lists have some of them
    assert len(read) > 4
    for found, expected in zip(together, one_by_one, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-3)
    assert together[2][1] == 0
    assert together[2][0] == together[2][4] > 0


def test_the_answer_is_a_stores(finch: Finch) -> None:
    passages = named(20)
    answer = finch.ask(QUESTION, passages)
    with finch.open_store() as store:
        known = finch.ask(QUESTION, passages, store=store)
        assert_same(known, answer)
    assert (answer.report.strategy, known.report.strategy) == ("independent", "independent")
    assert answer.report.heads == known.report.heads == tuple(HEADS)
    assert (answer.report.known_tokens, answer.report.stored_tokens) == (0, 0)
    assert answer.report.chunks == 1
    assert answer.report.chunk_size == answer.report.chunk_size_planned
    assert 0 < answer.report.kept_tokens <= 80 < answer.report.context_tokens
    assert sum(cited.share for cited in finch.rank(QUESTION, passages, strategy="independent")) == pytest.approx(1)


def test_the_stream_and_the_cache_are_the_answers(finch: Finch) -> None:
    answer = finch.ask(QUESTION, named(20))
    assert "".join(finch.stream(QUESTION, named(20))) == answer.text
    assert_same(finch.ask_cached(finch.compress(QUESTION, named(20))), answer)


# Several questions


@pytest.mark.parametrize("options", [{}, {"shortlist_tokens": 128}, {"store": True}, {"budget": 20}])
def test_several_questions_get_the_answers_of_each(options: dict[str, Any]) -> None:
    finch = new_finch(budget=options.get("budget", 80))
    lists = [named(20), named(2), named(15, seed=1), [*named(20, seed=1)[3:], Passage(" ", "blank")]]
    questions = [QUESTION, *OTHER_QUESTIONS, QUESTION]
    options = {**options, "store": finch.open_store() if options.get("store") else None}
    together = finch.ask_many(questions, lists, **options)
    for question, passages, found in zip(questions, lists, together, strict=True):
        alone_answer = finch.ask(question, passages, **options)
        assert_same(found, alone_answer)
        assert found.report.strategy == alone_answer.report.strategy


def test_a_list_that_all_share_is_read_once(finch: Finch, monkeypatch: pytest.MonkeyPatch) -> None:
    passages, questions = named(30), [QUESTION, *OTHER_QUESTIONS] * 4
    one_by_one = {question: finch.ask(question, passages) for question in questions}
    read = Encoded(monkeypatch)
    answers = finch.ask_many(questions, passages)
    assert sum(read) == answers[0].report.context_tokens
    for question, answer in zip(questions, answers, strict=True):
        assert_same(answer, one_by_one[question])


def test_a_store_reads_the_lists_of_several_questions_once(finch: Finch) -> None:
    """Also where two of them use one id for different texts."""
    lists = [named(20), named(20, seed=1), named(20)]
    expected = finch.ask_many([QUESTION] * 3, lists)
    with finch.open_store() as store:
        answers = finch.ask_many([QUESTION] * 3, lists, store=store)
        read = [answer.report.stored_tokens for answer in answers]
        assert read == [answers[0].report.context_tokens, answers[1].report.context_tokens, 0]
        assert answers[2].report.known_tokens == read[0]
        again = finch.ask_many([QUESTION] * 3, lists, store=store)
        assert all(answer.report.stored_tokens == 0 for answer in again)
    with finch.open_store(max_bytes=store.bytes_per_token * (max(read) + 40)) as small:
        squeezed = finch.ask_many([QUESTION] * 3, lists, store=small)
    for found, best in zip([*answers, *again, *squeezed], [*expected] * 3, strict=True):
        assert_same(found, best)


# Which strategy a call takes


def strategy_of(finch: Finch, passages: Sequence[str | Passage], ranks_only: bool = False, **options: Any) -> str:
    checked = [Passage(passage) if isinstance(passage, str) else passage for passage in passages]
    settings = finch.settings.updated(options)
    return planned(finch.runtime, resolve(finch.runtime, QUESTION, checked, settings, ranks_only=ranks_only)).strategy


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "independent"),
        ({"strategy": "independent", "budget": 2000}, "independent"),
        ({"strategy": "loop"}, "loop"),
        ({"budget": 2000}, "loop"),  # nothing has to be left out
        ({"budget": 8}, "loop"),  # most passages are longer
        ({"selection": "token"}, "loop"),
        ({"reread": False}, "loop"),
        ({"store": True}, "independent"),
        ({"store": True, "budget": 8}, "independent"),
    ],
)
def test_a_call_takes_the_strategy_that_fits(finch: Finch, options: dict[str, Any], expected: str) -> None:
    assert strategy_of(finch, named(20), **options) == expected


def test_a_ranking_takes_the_loop_and_may_take_the_other(finch: Finch) -> None:
    assert strategy_of(finch, named(20), ranks_only=True) == "loop"
    assert strategy_of(finch, named(20), ranks_only=True, strategy="independent") == "independent"


def test_heads_of_the_loop_ask_for_the_loop() -> None:
    assert strategy_of(new_finch(alone_heads="auto"), named(20)) == "loop"
    assert strategy_of(new_finch(alone_heads="auto", heads="all"), named(20)) == "loop"
    assert strategy_of(new_finch(strategy="loop"), named(20)) == "loop"
    assert new_finch(strategy="loop").strategy == "loop"


def test_passages_that_the_window_cannot_hold_alone_are_the_loops() -> None:
    finch = new_finch(window=512, max_new_tokens=1)
    tokens = finch.count_tokens("word " * 100) // 100
    long = " ".join(["word"] * (400 // tokens))
    assert strategy_of(finch, [*texts(9), long]) == "loop"
    with pytest.raises(WindowError, match=r"passage 9 has \d+ tokens, .*window of 512 has room for \d+"):
        finch.ask(QUESTION, [*texts(9), long], strategy="independent")


def test_a_long_question_leaves_less_room() -> None:
    finch = new_finch(window=512, max_new_tokens=1)
    prefix = len(finch.runtime.alone_prefix)

    def of(word: str, tokens: int) -> str:
        """So many tokens of a word, or a few less."""
        return " ".join([word] * next(n for n in range(512) if finch.count_tokens(" ".join([word] * (n + 1))) > tokens))

    passages = [Passage(text) for text in [*texts(9), of("word", 512 - 2 * prefix - 4)]]
    question = of("why?", prefix + 20)

    def planned_for(question: str) -> str:
        plan = resolve(finch.runtime, question, passages, finch.settings).plan
        assert plan is not None
        return plan.strategy

    assert (planned_for(QUESTION), planned_for(question)) == ("independent", "loop")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"strategy": "independent", "selection": "token"}, 'ranks whole passages: use selection="passage"'),
        ({"strategy": "independent", "reread": False}, "use reread=True, or strategy="),
        ({"strategy": "loop", "store": True}, 'a store reads each passage alone: use strategy="auto"'),
        ({"strategy": "loop", "store": True, "selection": "token"}, "store=None for this call"),
    ],
)
def test_what_cannot_go_together_is_refused(finch: Finch, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        finch.ask(QUESTION, named(3), **options)
    assert finch.ask(QUESTION, **{**options, "store": None}).report.strategy == "none"  # nothing is read


# Its edges


def test_of_a_best_passage_that_is_too_long_the_loop_keeps_what_matters(finch: Finch) -> None:
    ranked_passages = finch.rank(QUESTION, named(12), strategy="independent")
    shorter = [cited.index for cited in ranked_passages if cited.passage_tokens < ranked_passages[0].passage_tokens]
    passages = [named(12)[index] for index in [*shorter, ranked_passages[0].index]]
    best = finch.rank(QUESTION, passages, strategy="independent")[0]
    assert best.index == len(shorter) > 1
    budget = best.passage_tokens - 1
    answer = finch.ask(QUESTION, passages, budget=budget)
    assert answer.report.strategy == "independent"
    assert answer.report.heads == ((1, 0),)  # those of the loop, which has looked at a shortlist
    beginning = finch.ask(QUESTION, passages, budget=budget, shortlist_tokens=0)
    assert beginning.report.heads == tuple(HEADS)
    assert [(cited.index, cited.kept_tokens) for cited in beginning.citations] == [(best.index, budget)]


def test_the_best_passage_comes_last_or_all_stay_in_their_order(finch: Finch) -> None:
    request = resolve(finch.runtime, QUESTION, named(20), finch.settings)
    assert request.plan is not None
    attention = torch.ones(20).index_fill(0, torch.tensor([3]), 2.0)
    plans = [replace(request.plan, budget=200, in_order=in_order) for in_order in (False, True)]
    by_rank, in_order = prefill_best(finch.model, [request.prompt] * 2, [attention] * 2, plans)
    starts = [0, *accumulate(request.passage_tokens)]
    assert by_rank.cache.kept[0, -1] == starts[4] - 1
    assert in_order.cache.kept[0].diff().min() > 0
    assert by_rank.cache.kept.sort().values.equal(in_order.cache.kept)


def test_progress_is_told_and_a_call_can_be_cancelled(finch: Finch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alone, "_TOKENS_PER_PASS", {"cpu": 100})
    told: list[tuple[str, int, int]] = []
    report = finch.ask(QUESTION, named(20), on_progress=lambda *step: told.append(step)).report
    assert [stage for stage, _, _ in told] == ["prefill"] * report.chunks
    assert report.chunks > 3
    assert told[-1][1:] == (report.context_tokens, report.context_tokens)
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)
    stream = finch.stream(QUESTION, named(20), on_progress=lambda *step: stream.cancel())
    assert list(stream) == []
    many = resolve(finch.runtime, QUESTION, named(20), finch.settings)
    many.cancellation.cancel()
    with pytest.raises(Cancelled):
        many.on_step("prefill")(1, 2)
