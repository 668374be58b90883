from __future__ import annotations

import asyncio
import copy
import threading
from typing import Any

import pytest
from langchain_classic.retrievers import ContextualCompressionRetriever
from langchain_core.documents import Document
from langchain_core.language_models import FakeListLLM
from langchain_finch import ChatFinch, FinchLLM, FinchReranker
from langchain_finch._convert import passages_of
from lc_support import QUESTION, SETTINGS, Fixed, one_line

from finch_rag import Finch, InputError, SettingsError


def scores(documents: list[Document]) -> list[float]:
    return [document.metadata["relevance_score"] for document in documents]


def test_documents_come_back_in_the_engines_order(chat: ChatFinch, documents: list[Document], shared: Finch) -> None:
    ranked = FinchReranker(llm=chat).compress_documents(documents, QUESTION)
    expected = shared.rank(QUESTION, passages_of(documents), chunk_size=64)
    assert [d.id for d in ranked] == [citation.passage_id for citation in expected]
    assert scores(ranked) == [citation.share for citation in expected]
    assert sum(scores(ranked)) == pytest.approx(1)
    assert [d.id for d in ranked] != [d.id for d in documents]


def test_metadata_is_kept_and_the_documents_are_not_changed(llm: FinchLLM, documents: list[Document]) -> None:
    before = copy.deepcopy(documents)
    ranked = FinchReranker(llm=llm, top_n=4).compress_documents(documents, QUESTION)
    assert documents == before
    assert len(ranked) == 4
    by_id = {document.id: document for document in documents}
    for document in ranked:
        rest = {name: value for name, value in document.metadata.items() if name != "relevance_score"}
        assert rest == by_id[document.id].metadata
        assert document.page_content == by_id[document.id].page_content


def test_a_budget_keeps_whole_documents_and_at_least_one(chat: ChatFinch, documents: list[Document]) -> None:
    everything = FinchReranker(llm=chat).compress_documents(documents, QUESTION)
    sizes = {c.passage_id: c.passage_tokens for c in chat.engine.rank(QUESTION, passages_of(documents), chunk_size=64)}
    lengths = [sizes[document.id] for document in everything]
    for budget in (1, lengths[0], lengths[0] + 1, lengths[0] + lengths[1], sum(lengths) - 1, sum(lengths)):
        kept = FinchReranker(llm=chat, budget=budget).compress_documents(documents, QUESTION)
        assert kept == everything[: len(kept)]
        assert len(kept) == 1 or sum(lengths[: len(kept)]) <= budget
        assert len(kept) == len(lengths) or sum(lengths[: len(kept) + 1]) > budget
    both = FinchReranker(llm=chat, budget=sum(lengths), top_n=2).compress_documents(documents, QUESTION)
    assert both == everything[:2]


async def test_it_serves_a_compression_retriever(chat: ChatFinch, documents: list[Document]) -> None:
    reranker = FinchReranker(llm=chat, top_n=3)
    retriever = ContextualCompressionRetriever(base_compressor=reranker, base_retriever=Fixed(found=documents))
    expected = reranker.compress_documents(documents, QUESTION)
    assert retriever.invoke(QUESTION) == expected
    assert await retriever.ainvoke(QUESTION) == expected
    assert retriever.batch([QUESTION, QUESTION]) == [expected, expected]


async def test_documents_without_text_are_never_kept_before_others(chat: ChatFinch, documents: list[Document]) -> None:
    blank = [Document(" ", id="blank"), Document("", id="empty")]
    reranker = FinchReranker(llm=chat)
    expected = [document.id for document in reranker.compress_documents(documents, QUESTION)]
    ranked = reranker.compress_documents([blank[0], *documents, blank[1]], QUESTION)
    assert [document.id for document in ranked][: len(documents)] == expected
    assert sum(scores(ranked)) == pytest.approx(1)
    assert (await reranker.acompress_documents([*blank, documents[0]], QUESTION))[0].id == documents[0].id
    assert scores(reranker.compress_documents(blank, QUESTION)) == [0, 0]


async def test_no_documents_give_none(folder: str) -> None:
    reranker = FinchReranker(llm=ChatFinch(model="no/such-model"))
    assert reranker.compress_documents([], QUESTION) == []
    assert await reranker.acompress_documents([], QUESTION) == []


async def test_a_cancelled_ranking_stops_reading(folder: str, documents: list[Document]) -> None:
    read: list[int] = []
    reading, go_on = threading.Event(), threading.Event()
    engine = ChatFinch(model=folder, **SETTINGS).engine
    own = Finch(engine.model, engine.tokenizer, heads="all", on_progress=lambda stage, done, total: progress(done))

    def progress(done: int) -> None:
        read.append(done)
        reading.set()
        go_on.wait(10)

    reranker = FinchReranker(llm=ChatFinch(engine=own, chunk_size=32))
    task = asyncio.create_task(reranker.acompress_documents(documents, QUESTION))
    await asyncio.to_thread(reading.wait, 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    go_on.set()
    await asyncio.sleep(0.3)
    assert len(read) == 1


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "FinchReranker needs a FinchLLM or a ChatFinch, not NoneType"),
        ({"llm": FakeListLLM(responses=["a"])}, "FinchReranker needs a FinchLLM or a ChatFinch, not FakeListLLM"),
        ({"llm": ChatFinch(model="m"), "top_n": 0}, "top_n is 0: the least is 1"),
        ({"llm": ChatFinch(model="m"), "budget": -3}, "budget is -3: the least is 1"),
        ({"llm": ChatFinch(model="m"), "top_n": "3"}, "top_n is '3'"),
        ({"llm": ChatFinch(model="m"), "topn": 3}, "unknown setting topn: use llm, top_n, budget"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError) as raised:
        FinchReranker(**settings)
    assert one_line(raised).startswith(said)


async def test_bad_input_is_told_in_one_line(chat: ChatFinch, documents: list[Document]) -> None:
    reranker = FinchReranker(llm=chat)
    for found, query, said in ((documents, " ", "the question is empty"),):
        with pytest.raises(InputError, match=said) as raised:
            reranker.compress_documents(found, query)
        one_line(raised)
        with pytest.raises(InputError, match=said):
            await reranker.acompress_documents(found, query)
    with pytest.raises(InputError, match="more than max_context_tokens=10"):
        FinchReranker(llm=ChatFinch(engine=chat.engine, max_context_tokens=10)).compress_documents(documents, QUESTION)
