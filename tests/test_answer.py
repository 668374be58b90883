from __future__ import annotations

import json

import pytest
import torch

from finch_rag.answer import Answer, citations, report
from finch_rag.engine import Finch
from finch_rag.models.cache import CompressedCache
from finch_rag.models.cached_document import CachedDocument, ReadingFigures
from finch_rag.prompts.passages import Passage

from .small import chat_tokenizer, texts

QUESTION = "When was the lighthouse built?"
FIGURES = ReadingFigures(
    model="m",
    selection="passage",
    reread=True,
    heads=((0, 1),),
    budget=4,
    chunk_size=8,
    chunk_size_planned=8,
    chunks=2,
    scanned_layers=2,
    prefill_seconds=0.5,
)


def cache_of(kept: list[list[int]], lengths: tuple[int, ...], shares: tuple[float, ...]) -> CompressedCache:
    cache = CompressedCache(2, 16)
    for layer in cache.layers:
        layer.update(torch.zeros(1, 2, 3 + len(kept[0]), 4), torch.zeros(1, 2, 3 + len(kept[0]), 4))
    cache.prefix, cache.kept = 3, torch.tensor(kept, dtype=torch.long)
    count = len(lengths)
    cache.document = CachedDocument(
        tuple(f"id {n}" for n in range(count)), (None,) * count, lengths, shares, "q", "f", FIGURES
    )
    return cache


def test_citations_come_by_falling_share_with_the_tokens_kept_of_each() -> None:
    cache = cache_of([[0, 5, 6, 8]], (3, 4, 2), (0.2, 0.5, 0.3))
    cited = [(c.index, c.passage_id, c.share, c.kept_tokens, c.passage_tokens) for c in citations(cache)]
    assert cited == [(1, "id 1", 0.5, 2, 4), (2, "id 2", 0.3, 1, 2), (0, "id 0", 0.2, 1, 3)]


def test_passages_of_which_nothing_was_kept_are_cited_only_on_demand() -> None:
    cache = cache_of([[3, 4, 5, 6]], (3, 4, 2), (0.2, 0.5, 0.3))
    assert [c.index for c in citations(cache, kept_only=True)] == [1]
    assert [c.index for c in citations(cache)] == [1, 2, 0]
    assert report(cache, 5).passages_kept == 1


def test_where_layers_differ_kept_tokens_are_their_mean_rounded_up() -> None:
    cache = cache_of([[0, 1, 2, 3], [2, 3, 4, 5]], (3, 3, 3), (0.3, 0.6, 0.1))
    assert {c.index: c.kept_tokens for c in citations(cache)} == {0: 2, 1: 2, 2: 0}
    lonely = cache_of([[0, 1, 2, 3], [0, 1, 2, 8]], (3, 3, 3), (0.3, 0.6, 0.1))
    assert {c.index: c.kept_tokens for c in citations(lonely)} == {0: 3, 1: 1, 2: 1}


def test_equal_shares_stay_in_the_callers_order() -> None:
    assert [c.index for c in citations(cache_of([[0]], (1, 1, 1), (0.2, 0.4, 0.4)))] == [1, 2, 0]


def test_the_report_adds_up() -> None:
    figures = report(cache_of([[0, 5, 6]], (3, 4, 2), (0.2, 0.5, 0.3)), question_tokens=5)
    assert (figures.prefix_tokens, figures.context_tokens, figures.kept_tokens, figures.question_tokens) == (3, 9, 3, 5)
    assert figures.compression_factor == 3.0
    assert figures.compression_ratio == pytest.approx(2 / 3)
    per_token = 2 * 2 * 2 * 4 * 4
    assert (figures.kv_bytes_full, figures.kv_bytes_kept) == (9 * per_token, 3 * per_token)
    assert figures.heads == ((0, 1),)


def test_a_report_without_context_compresses_nothing() -> None:
    figures = report(cache_of([[]], (), ()), question_tokens=5)
    assert (figures.compression_factor, figures.compression_ratio) == (1.0, 0.0)
    assert (figures.passages, figures.passages_kept, figures.kv_bytes_full) == (0, 0, 0)


@pytest.fixture(scope="module")
def answer(finch: Finch) -> Answer:
    passages = [Passage(text, id=f"id {n}", title=f"title {n}", metadata={"n": n}) for n, text in enumerate(texts(9))]
    return finch.ask(QUESTION, passages)


def test_a_real_report_says_what_was_read_kept_and_made(finch: Finch, answer: Answer) -> None:
    made = answer.report
    assert (made.model, made.selection, made.heads) == ("small", "passage", ((0, 1), (1, 2)))
    assert (made.budget, made.chunk_size, made.kept_tokens) == (60, 64, 60)
    assert (made.passages, made.passages_kept) == (9, len(answer.citations))
    assert made.context_tokens == sum(len(finch.prompts.encode([f"title {n}\n{text}\n\n"])[0])
                                      for n, text in enumerate(texts(9)))  # fmt: skip
    assert made.compression_factor == made.context_tokens / 60
    assert made.chunks >= made.context_tokens / 64
    assert 1 <= made.new_tokens <= 8
    assert made.stop_reason in ("eos", "length")
    assert made.prefill_seconds > 0
    assert made.decode_seconds > 0


def test_citations_hand_back_ids_and_titles_and_hold_all_kept_tokens(answer: Answer) -> None:
    for citation in answer.citations:
        assert citation.passage_id == f"id {citation.index}"
        assert citation.title == f"title {citation.index}"
        assert 1 <= citation.kept_tokens <= citation.passage_tokens
    assert sum(citation.kept_tokens for citation in answer.citations) == answer.report.kept_tokens


def test_everything_can_be_written_as_json(answer: Answer) -> None:
    content = json.loads(json.dumps(answer.to_dict()))
    assert content["text"] == answer.text
    assert content["citations"][0]["passage_id"] == answer.citations[0].passage_id
    assert content["report"]["heads"] == [[0, 1], [1, 2]]
    assert content["report"]["compression_factor"] == answer.report.compression_factor
    assert content["report"]["compression_ratio"] == answer.report.compression_ratio


def test_the_end_of_an_answer_is_reported(finch: Finch) -> None:
    whole = finch.ask(QUESTION, texts(3), max_new_tokens=12)
    assert whole.report.new_tokens == 12 or whole.report.stop_reason == "eos"
    middle = whole.text[len(whole.text) // 2 :][:2]
    stopped = finch.ask(QUESTION, texts(3), max_new_tokens=12, stop=middle)
    assert stopped.report.stop_reason == "stop"
    assert stopped.text == whole.text[: whole.text.index(middle)].strip()
    assert chat_tokenizer().eos_token not in stopped.text
