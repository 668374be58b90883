"""Stores in LangChain: documents are read once, and the retriever finds them again as they were."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_core.load import dumpd
from langchain_core.prompts import PromptTemplate
from langchain_finch import ChatFinch, FinchLLM, FinchReranker, FinchRetriever, create_finch_documents_chain
from lc_support import OTHER_QUESTION, QUESTION, SETTINGS, one_line, texts_as_documents

from finch_rag import InputError, PassageStore, SettingsError

STUFF = (
    "Use the following pieces of context to answer the question at the end. If you don't know the answer, just say "
    "that you don't know, don't try to make up an answer."
)


@pytest.fixture
def storing(folder: str, tmp_path: Path) -> ChatFinch:
    return ChatFinch(model=folder, store=tmp_path / "store", **SETTINGS)


@pytest.fixture
def retriever(storing: ChatFinch, documents: list[Document]) -> FinchRetriever:
    return FinchRetriever.from_documents(documents, llm=storing, k=3)


def report(message: Any) -> dict[str, Any]:
    found: dict[str, Any] = message.response_metadata["report"]
    return found


def test_the_second_question_reads_nothing(storing: ChatFinch, documents: list[Document]) -> None:
    first = report(storing.invoke(QUESTION, documents=documents))
    second = report(storing.invoke(OTHER_QUESTION, documents=documents))
    assert (first["known_tokens"], second["stored_tokens"]) == (0, 0)
    assert first["stored_tokens"] == second["known_tokens"] > 0
    assert report(storing.invoke(QUESTION, documents=documents, store=False))["known_tokens"] == 0


@pytest.mark.parametrize("place", [True, "folder"])
def test_the_chain_has_a_store_of_its_own(
    chat: ChatFinch, documents: list[Document], tmp_path: Path, place: bool | str
) -> None:
    store = place if isinstance(place, bool) else tmp_path / place
    chain = create_finch_documents_chain(chat, with_citations=True, store=store)
    reports = [chain.invoke({"context": documents, "input": asked})["report"] for asked in (QUESTION, OTHER_QUESTION)]
    assert reports[1]["stored_tokens"] == 0 < reports[1]["known_tokens"]


def test_a_flat_prompt_reads_its_context_once(folder: str, documents: list[Document], tmp_path: Path) -> None:
    llm = FinchLLM(model=folder, store=tmp_path / "store", **SETTINGS)
    context = "\n\n".join(document.page_content for document in documents)
    reports: list[Any] = []
    for asked in (QUESTION, OTHER_QUESTION):
        result = llm.generate([f"{STUFF}\n\n{context}\n\nQuestion: {asked}\nHelpful Answer:"])
        info = result.generations[0][0].generation_info
        reports.append({} if info is None else info["report"])
    assert reports[1]["stored_tokens"] == 0 < reports[1]["known_tokens"]


def test_the_retriever_hands_documents_back_as_they_were(retriever: FinchRetriever, documents: list[Document]) -> None:
    found = retriever.invoke(QUESTION)
    assert len(found) == 3
    by_id = {document.id: document for document in documents}
    for document in found:
        own = by_id[document.id]
        score = document.metadata["relevance_score"]
        assert (document.page_content, document.metadata) == (
            own.page_content,
            {**own.metadata, "relevance_score": score},
        )
        assert 0 < score < 1
    scores = [document.metadata["relevance_score"] for document in found]
    assert scores == sorted(scores, reverse=True)
    assert len(retriever.invoke(QUESTION, k=5)) == 5


def test_what_it_finds_is_read_no_second_time(
    retriever: FinchRetriever, storing: ChatFinch, documents: list[Document]
) -> None:
    chain = create_finch_documents_chain(storing, with_citations=True)
    found = retriever.invoke(QUESTION)
    answered = chain.invoke({"context": found, "input": QUESTION})
    assert answered["report"]["stored_tokens"] == 0 < answered["report"]["known_tokens"]
    assert {cited["passage_id"] for cited in answered["citations"]} <= {document.id for document in found}
    passages: list[int] = []
    engine = storing.engine
    model: Any = engine.model
    hook = model.base_model.layers[0].register_forward_pre_hook(lambda layer, args: passages.append(args[0].shape[1]))
    FinchReranker(llm=storing).compress_documents(documents, OTHER_QUESTION)
    hook.remove()
    assert len(passages) == 1  # the question alone


def test_documents_are_added_changed_and_removed(retriever: FinchRetriever) -> None:
    store = retriever.passage_store
    assert isinstance(store, PassageStore)
    count = len(store)
    added = retriever.add_documents([Document("The mill burnt down."), Document(" "), Document("The inn.", id="inn")])
    assert (len(store), added[1]) == (count + 2, "inn")
    retriever.add_documents([Document("The inn is new.", id="inn")])
    assert len(store) == count + 2
    texts = {document.page_content for document in retriever.invoke(QUESTION, k=100)}
    assert "The inn is new." in texts
    assert "The inn." not in texts
    assert retriever.delete(added)
    assert len(store) == count
    with pytest.raises(InputError) as caught:
        retriever.delete(["inn"])
    one_line(caught)


async def test_an_event_loop_finds_the_same(retriever: FinchRetriever) -> None:
    found = await retriever.ainvoke(QUESTION)
    assert [document.id for document in found] == [document.id for document in retriever.invoke(QUESTION)]
    assert await retriever.aadd_documents([Document("The mill.", id="mill")]) == ["mill"]
    assert await retriever.adelete(["mill"])


def test_other_retrievers_are_fused(retriever: FinchRetriever, storing: ChatFinch) -> None:
    best, last = (retriever.invoke(QUESTION, k=100)[place] for place in (0, -1))
    with storing.engine.open_store() as store:
        other = FinchRetriever.from_documents([last], store=store, llm=storing)
        for others, first in (([], best), ([other, other], last)):
            found = FinchRetriever(llm=storing, fuse=others, k=1).invoke(QUESTION)
            assert [document.id for document in found] == [first.id]


def test_what_a_prompt_makes_of_a_document_does_not_take_its_place(
    retriever: FinchRetriever, storing: ChatFinch, documents: list[Document]
) -> None:
    shown = PromptTemplate.from_template("[{source}] {page_content}")
    chain = create_finch_documents_chain(storing, document_prompt=shown, with_citations=True)
    found = retriever.invoke(QUESTION)
    answered = chain.invoke({"context": found, "input": QUESTION})
    assert {cited["passage_id"] for cited in answered["citations"]} <= {document.id for document in found}
    own = {document.page_content for document in documents}
    assert {document.page_content for document in retriever.invoke(QUESTION, k=100)} == own
    assert chain.invoke({"context": found, "input": QUESTION})["report"]["stored_tokens"] == 0


def test_a_retriever_that_finds_nothing_of_the_store_is_told(retriever: FinchRetriever, storing: ChatFinch) -> None:
    with storing.engine.open_store() as store:
        stranger = FinchRetriever.from_texts(["The well is dry."], store=store, llm=storing)
        with pytest.warns(UserWarning, match="nothing that FinchRetriever found .* is in the store"):
            found = FinchRetriever(llm=storing, fuse=[stranger], k=3).invoke(QUESTION)
    assert [document.id for document in found] == [document.id for document in retriever.invoke(QUESTION)]


def test_a_folder_survives_what_an_open_store_does_not(folder: str, tmp_path: Path) -> None:
    kept = ChatFinch(model=folder, store=str(tmp_path / "store"), **SETTINGS)
    assert pickle.loads(pickle.dumps(kept)).store == str(tmp_path / "store")
    assert dumpd(kept)["kwargs"]["store"] == str(tmp_path / "store")
    with kept.engine.open_store() as opened:
        model = ChatFinch(model=folder, store=opened, **SETTINGS)
        assert "store" not in dumpd(model)["kwargs"]
        with pytest.raises(SettingsError, match="cannot be pickled"):
            pickle.dumps(model)
        assert model.model_copy(deep=True).store is opened
        assert "0x" not in str(model._identifying_params)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "there is no store"),
        ({"store": "folder"}, "there is no llm= that opens it"),
        ({"store": 5}, "store is int"),
        ({"k": 0, "store": True}, "k is 0"),
        ({"llm": "x"}, "llm is str"),
        ({"top": 3}, "unknown setting top"),
        ({"fuse": ["x"], "store": True}, "fuse holds something else"),
    ],
)
def test_what_cannot_work_is_said_in_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message) as caught:
        FinchRetriever(**settings)
    one_line(caught)


def test_bad_options_of_a_call_are_refused(retriever: FinchRetriever) -> None:
    bad: list[dict[str, Any]] = [{"k": 0}, {"top": 3}]
    for options in bad:
        with pytest.raises(InputError):
            retriever.invoke(QUESTION, **options)
    with pytest.raises(InputError, match="1 ids for 2 documents"):
        retriever.add_documents(texts_as_documents(2), ids=["a"])
