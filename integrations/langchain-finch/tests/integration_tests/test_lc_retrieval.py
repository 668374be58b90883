"""Real use: a FAISS store with MiniLM embeddings over the example corpus, answered by the embedded model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from langchain_classic.chains import create_retrieval_chain
from langchain_classic.retrievers import ContextualCompressionRetriever
from langchain_community.cache import SQLiteCache
from langchain_community.vectorstores import FAISS
from langchain_core.documents import Document
from langchain_core.globals import set_llm_cache
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import RunnablePassthrough
from langchain_finch import ChatFinch, FinchLLM, FinchReranker, create_finch_documents_chain
from lc_support import Listener, MiniLM, ids

from finch_rag import Finch
from finch_rag.corpus import load_questions, read_corpus
from finch_rag.corpus.example import example_corpus
from finch_rag.corpus.retrieval import embedding_model_folder

pytestmark = [
    pytest.mark.embedded,
    pytest.mark.filterwarnings("ignore::PendingDeprecationWarning"),  # how SQLiteCache calls langchain-core
]

QUESTION = "Who is the captain of the ferry that is licensed for 38 passengers?"
GOLD = "ferries.md#mv-tystie"
SETTINGS: dict[str, Any] = {"budget": 256, "max_tokens": 20}


@pytest.fixture(scope="module")
def store() -> FAISS:
    passages = read_corpus(example_corpus()).passages
    documents = [
        Document(
            passage.text, id=passage.id, metadata={"title": passage.title, "source": str(passage.id).split("#")[0]}
        )
        for passage in passages
    ]
    return FAISS.from_documents(documents, MiniLM(str(embedding_model_folder())))


@pytest.fixture(scope="module")
def chat() -> ChatFinch:
    return ChatFinch(model="embedded", **SETTINGS)


def retriever(store: FAISS, k: int) -> BaseRetriever:
    return store.as_retriever(search_kwargs={"k": k})


@pytest.fixture(scope="module")
def asked(store: FAISS, chat: ChatFinch) -> tuple[dict[str, Any], Listener]:
    """What a retrieval chain says to the question, and what LangChain told about it."""
    listener = Listener()
    chain = create_retrieval_chain(retriever(store, 20), create_finch_documents_chain(chat, with_citations=True))
    return chain.invoke({"input": QUESTION}, config={"callbacks": [listener]}), listener


def test_a_retrieval_chain_finds_what_the_retriever_ranks_low_in_one_call(asked: Any) -> None:
    result, listener = asked
    assert listener.calls == 1
    assert GOLD not in [document.id for document in result["context"][:3]]
    assert "Nan Corrigall" in result["answer"]["text"]
    [citation, *_] = result["answer"]["citations"]
    assert (citation["passage_id"], citation["title"], citation["source"]) == (GOLD, "MV Tystie", "ferries.md")
    report = result["answer"]["report"]
    assert (report["passages"], report["model"]) == (20, "SmolLM2-135M-Instruct")
    assert report["context_tokens"] > 15 * report["kept_tokens"]


async def test_an_async_stream_gives_the_same_in_one_call(store: FAISS, chat: ChatFinch, asked: Any) -> None:
    listener = Listener()
    chain = create_retrieval_chain(retriever(store, 20), create_finch_documents_chain(chat))
    stream = chain.astream({"input": QUESTION}, config={"callbacks": [listener]})
    pieces = [piece["answer"] async for piece in stream if "answer" in piece]
    assert len(pieces) > 5
    assert "".join(pieces) == asked[0]["answer"]["text"]
    assert listener.calls == 1


def test_an_expression_with_a_plain_prompt_is_taken_apart(store: FAISS) -> None:
    prompt = ChatPromptTemplate.from_messages(
        [
            (
                "system",
                "Use the following pieces of context to answer the user's question.\n----------------\n{context}",
            ),
            ("human", "{question}"),
        ]
    )
    joined = retriever(store, 20) | (lambda found: "\n\n".join(document.page_content for document in found))
    llm = FinchLLM(model="embedded", **SETTINGS)
    pieces = list(({"context": joined, "question": RunnablePassthrough()} | prompt | llm).stream(QUESTION))
    assert "Nan Corrigall" in "".join(pieces)


def test_a_batch_of_three(store: FAISS, chat: ChatFinch) -> None:
    questions = load_questions(example_corpus() / "questions.jsonl")[
        :3
    ]  # their passages are the retriever's 5th to 9th
    listener = Listener()
    chain = create_retrieval_chain(retriever(store, 15), create_finch_documents_chain(chat, with_citations=True))
    results = chain.batch([{"input": q.question} for q in questions], config={"callbacks": [listener]})
    assert listener.calls == 3
    for question, result in zip(questions, results, strict=True):
        assert result["input"] == question.question
        cited, found = ids(result["answer"]["citations"]), [document.id for document in result["context"]]
        assert set(cited) <= set(found)
        assert set(question.gold_ids) & set(cited)


@pytest.fixture
def cache(database: str) -> Iterator[None]:
    set_llm_cache(SQLiteCache(database))
    yield
    set_llm_cache(None)


@pytest.mark.usefixtures("cache")
def test_a_cache_hits_only_for_equal_settings(store: FAISS, chat: ChatFinch, monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[Any] = []
    stream = Finch.stream_chat

    def recorded(finch: Finch, *args: Any, **options: Any) -> Any:
        answers.append(options)
        return stream(finch, *args, **options)

    monkeypatch.setattr(Finch, "stream_chat", recorded)
    found = retriever(store, 3).invoke(QUESTION)
    first = chat.bind(documents=found).invoke(QUESTION)
    again = ChatFinch(model="embedded", **SETTINGS).bind(documents=found).invoke(QUESTION)
    assert (again.content, again.response_metadata) == (first.content, first.response_metadata)
    assert len(answers) == 1
    chat.bind(documents=found[:2]).invoke(QUESTION)
    chat.bind(documents=found, budget=128).invoke(QUESTION)
    ChatFinch(model="embedded", **{**SETTINGS, "max_tokens": 4}).bind(documents=found).invoke(QUESTION)
    assert len(answers) == 4


def test_the_reranker_puts_the_passage_first(store: FAISS, chat: ChatFinch) -> None:
    reranked = ContextualCompressionRetriever(
        base_compressor=FinchReranker(llm=chat, top_n=3), base_retriever=retriever(store, 12)
    )
    found = reranked.invoke(QUESTION)
    assert len(found) == 3
    assert found[0].id == GOLD
    assert found[0].metadata["title"] == "MV Tystie"
    assert 1 >= found[0].metadata["relevance_score"] > found[1].metadata["relevance_score"] > 0
