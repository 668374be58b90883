from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from langchain_community.cache import SQLiteCache
from langchain_core.documents import Document
from langchain_core.globals import set_llm_cache
from langchain_core.messages import AIMessage
from langchain_finch import ChatFinch, FinchLLM, create_finch_documents_chain
from lc_support import OTHER_QUESTION, QUESTION, SETTINGS, Listener

from finch_rag import Finch

pytestmark = pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")  # how SQLiteCache calls langchain-core
BOTH = pytest.mark.parametrize("kind", [ChatFinch, FinchLLM])


@pytest.fixture(autouse=True)
def cache(database: str) -> Iterator[SQLiteCache]:
    made = SQLiteCache(database)
    set_llm_cache(made)
    yield made
    set_llm_cache(None)


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The questions that the engine answers itself."""
    seen: list[str] = []
    stream = Finch.stream_chat

    def recorded(finch: Finch, messages: Any, *args: Any, **options: Any) -> Any:
        seen.append(messages if isinstance(messages, str) else messages[-1]["content"])
        return stream(finch, messages, *args, **options)

    monkeypatch.setattr(Finch, "stream_chat", recorded)
    return seen


CHANGED: list[dict[str, Any]] = [
    {"budget": 50},
    {"chunk_size": 128},
    {"selection": "token"},
    {"reread": False},
    {"instructions": "Be brief."},
    {"system_prompt": "Be brief."},
    {"max_tokens": 7},
    {"max_context_tokens": 100_000},
    {"temperature": 0.5},
    {"top_p": 0.9},
    {"top_k": 5},
    {"seed": 1},
    {"stop": ["x"]},
]


@BOTH
@pytest.mark.parametrize("changed", [*CHANGED, {"dtype": "bfloat16"}, {"heads": "all"}], ids=str)
def test_another_setting_is_another_answer(
    kind: Any, folder: str, documents: list[Document], answers: list[str], changed: dict[str, Any]
) -> None:
    plain, other = kind(model=folder, **SETTINGS), kind(model=folder, **{**SETTINGS, **changed})
    for model in (plain, other, plain, other):
        model.invoke(QUESTION, documents=documents)
    assert len(answers) == 2


@BOTH
@pytest.mark.parametrize("changed", [*CHANGED, {"stop_token_ids": [7]}, {"max_new_tokens": 6}], ids=str)
def test_another_option_of_a_call_is_another_answer(
    kind: Any, folder: str, documents: list[Document], answers: list[str], changed: dict[str, Any]
) -> None:
    model = kind(model=folder, **SETTINGS)
    bound = model.bind(**changed)
    for asked in (model, bound, model, bound, kind(model=folder, **SETTINGS)):
        asked.invoke(QUESTION, documents=documents)
    assert len(answers) == 2


@BOTH
def test_other_documents_are_another_answer(
    kind: Any, folder: str, documents: list[Document], answers: list[str]
) -> None:
    model = kind(model=folder, **SETTINGS)
    first = documents[0]
    others = [
        None,
        documents,
        documents[1:],
        documents[::-1],
        [Document(first.page_content + ".", id=first.id, metadata=first.metadata), *documents[1:]],
        [Document(first.page_content, id="other", metadata=first.metadata), *documents[1:]],
        [Document(first.page_content, id=first.id, metadata={**first.metadata, "title": "Other"}), *documents[1:]],
        [Document(first.page_content, id=first.id, metadata={**first.metadata, "source": "other"}), *documents[1:]],
    ]
    for found in others * 2:
        model.bind(documents=found).invoke(QUESTION) if found else model.invoke(QUESTION)
    assert len(answers) == len(others)
    # What changes no answer and no citation asks for no other one, such as a retriever's score.
    scored = [d.model_copy(update={"metadata": {**d.metadata, "score": 0.1}}) for d in documents]
    model.invoke(QUESTION, documents=scored)
    assert len(answers) == len(others)


@BOTH
async def test_equal_calls_are_answered_once_and_whole(
    kind: Any, folder: str, documents: list[Document], answers: list[str]
) -> None:
    model = kind(model=folder, **SETTINGS).bind(documents=documents)
    listener = Listener()
    first = model.invoke(QUESTION, config={"callbacks": [listener]})
    again = kind(model=folder, **SETTINGS).bind(documents=documents).invoke(QUESTION)
    awaited = await model.ainvoke(QUESTION)
    assert answers == [QUESTION]
    if isinstance(first, AIMessage):
        assert first.content == again.content == awaited.content
        assert again.content_blocks == first.content_blocks
        assert again.response_metadata == first.response_metadata
    else:
        assert first == again == awaited
        generation = model.bound.generate([QUESTION], documents=documents).generations[0][0]
        assert generation.generation_info == listener.results[0].generations[0][0].generation_info
        assert answers == [QUESTION]


async def test_only_new_prompts_of_a_batch_are_answered(
    folder: str, documents: list[Document], answers: list[str]
) -> None:
    llm = FinchLLM(model=folder, **SETTINGS)
    bound = llm.bind(documents=documents)
    bound.invoke(QUESTION)
    both = bound.batch([QUESTION, OTHER_QUESTION])
    assert answers == [QUESTION, OTHER_QUESTION]
    assert await bound.abatch([QUESTION, OTHER_QUESTION]) == both
    assert len(answers) == 2


@BOTH
def test_a_changed_attribute_is_another_answer(kind: Any, folder: str, answers: list[str]) -> None:
    model = kind(model=folder, **SETTINGS)
    model.invoke(QUESTION)
    model.max_tokens = 5
    model.invoke(QUESTION)
    assert len(answers) == 2


@BOTH
def test_a_given_engines_settings_count(kind: Any, shared: Finch, answers: list[str]) -> None:
    def engine(**settings: Any) -> Finch:
        return Finch(shared.model, shared.tokenizer, name="same", **{"max_new_tokens": 8, "heads": "all", **settings})

    engines = [
        engine(),
        engine(max_new_tokens=5),
        engine(heads=[(0, 1)]),
        engine(instructions="Be brief."),
        engine(system_prompt="Be brief."),
        engine(budget=50),
        engine(selection="token"),
        engine(reread=False),
        engine(chunk_size=50),
    ]
    for finch in [*engines, *engines, engine()]:
        kind(engine=finch).invoke(QUESTION)
    assert len(answers) == len(engines)


def test_blocks_and_text_are_cached_apart(folder: str, documents: list[Document], answers: list[str]) -> None:
    plain = ChatFinch(model=folder, **SETTINGS).invoke(QUESTION, documents=documents)
    blocks = ChatFinch(model=folder, output_version="v1", **SETTINGS).invoke(QUESTION, documents=documents)
    assert isinstance(plain.content, str)
    assert isinstance(blocks.content, list)
    assert len(answers) == 2


def test_the_documents_chain_uses_it(folder: str, documents: list[Document], answers: list[str]) -> None:
    inputs = {"context": documents, "input": QUESTION}
    for _ in range(2):
        create_finch_documents_chain(ChatFinch(model=folder, **SETTINGS), with_citations=True).invoke(inputs)
    create_finch_documents_chain(FinchLLM(model=folder, **SETTINGS)).invoke(inputs)
    assert len(answers) == 1
    create_finch_documents_chain(FinchLLM(model=folder, **{**SETTINGS, "budget": 50})).invoke(inputs)
    assert len(answers) == 2


@BOTH
def test_keys_and_traces_hold_no_documents(
    kind: Any, folder: str, documents: list[Document], monkeypatch: pytest.MonkeyPatch, cache: SQLiteCache
) -> None:
    keys: list[str] = []
    update = SQLiteCache.update

    def recorded(self: SQLiteCache, prompt: str, llm_string: str, value: Any) -> None:
        keys.append(llm_string)
        update(self, prompt, llm_string, value)

    monkeypatch.setattr(SQLiteCache, "update", recorded)
    listener = Listener()
    kind(model=folder, **SETTINGS).invoke(QUESTION, documents=documents, config={"callbacks": [listener]})
    [key] = keys
    for told in (key, str(listener.params)):
        assert "12 documents, sha256 " in told
        assert documents[0].page_content not in told
