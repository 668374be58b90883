"""The documents chain on models with fallbacks, and on one of several alternatives."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_core.language_models import BaseChatModel, FakeListLLM
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.runnables import ConfigurableField, RunnableLambda
from langchain_finch import ChatFinch, FinchLLM, create_finch_documents_chain
from lc_support import QUESTION, SETTINGS, Listener, one_line
from pydantic import BaseModel

from finch_rag import InputError, SettingsError


class Other(BaseChatModel):
    """Another chat model, which says what it was asked, and by which options."""

    @property
    def _llm_type(self) -> str:
        return "other"

    def _generate(self, messages: list[BaseMessage], stop: Any = None, run_manager: Any = None, **kwargs: Any) -> Any:
        asked = "\n---\n".join(f"{message.type}: {message.text}" for message in messages)
        return ChatResult(generations=[ChatGeneration(message=AIMessage(f"{sorted(kwargs)}\n{asked}"))])


BROKEN: dict[str, Any] = {"model": "no/such-model"}


async def test_a_fallback_answers_where_the_model_cannot(
    chat: ChatFinch, llm: FinchLLM, documents: list[Document]
) -> None:
    inputs: Any = {"context": documents, "input": QUESTION}
    expected = create_finch_documents_chain(chat, with_citations=True).invoke(inputs)
    models: list[Any] = [ChatFinch(**BROKEN), FinchLLM(**BROKEN), ChatFinch(**BROKEN).bind(max_tokens=3)]
    fallbacks: list[Any] = [chat, llm, llm.bind(max_tokens=8), chat.with_retry()]
    for broken in models:
        for fallback in fallbacks:
            chain = create_finch_documents_chain(broken.with_fallbacks([fallback]), with_citations=True)
            answer = chain.invoke(inputs)
            assert (answer["text"], answer["citations"]) == (expected["text"], expected["citations"])
    assert "".join(piece["text"] for piece in chain.stream(inputs)) == expected["text"]
    assert (await chain.ainvoke(inputs))["text"] == expected["text"]
    assert pickle.loads(pickle.dumps(chain)).invoke(inputs)["text"] == expected["text"]


def test_a_model_that_can_answer_needs_no_fallback(chat: ChatFinch, documents: list[Document]) -> None:
    listener = Listener()
    chain = create_finch_documents_chain(chat.with_fallbacks([Other()]))
    answer = chain.invoke({"context": documents, "input": QUESTION}, config={"callbacks": [listener]})
    assert answer == create_finch_documents_chain(chat).invoke({"context": documents, "input": QUESTION})
    assert listener.calls == 1


async def test_another_chat_model_reads_all_documents_as_one_text(chat: ChatFinch) -> None:
    documents = [Document("one", metadata={"title": "T"}), Document(" "), Document("two")]
    inputs: Any = {"context": documents, "input": QUESTION, "chat_history": [("human", "where?"), ("ai", "there")]}
    expected = f"['temperature']\nhuman: where?\n---\nai: there\n---\nhuman: T\none\n\ntwo\n\n{QUESTION}"
    llm = ChatFinch(**BROKEN).with_fallbacks([Other().bind(temperature=0)])
    chain = create_finch_documents_chain(llm)
    assert chain.invoke(inputs) == expected
    assert "".join(chain.stream(inputs)) == expected
    assert await chain.ainvoke(inputs) == expected
    assert "".join([piece async for piece in chain.astream(inputs)]) == expected
    assert chain.invoke({"context": [], "input": QUESTION}) == f"['temperature']\nhuman: {QUESTION}"
    cited = create_finch_documents_chain(llm, with_citations=True).invoke(inputs)
    assert cited == {"text": expected}


def test_other_fallbacks_are_refused() -> None:
    others: list[Any] = [FakeListLLM(responses=["a"]), RunnableLambda(str)]
    for fallback in others:
        with pytest.raises(SettingsError, match="put the fallback around the whole documents chain") as raised:
            create_finch_documents_chain(ChatFinch(**BROKEN).with_fallbacks([fallback]))
        one_line(raised)
    with pytest.raises(SettingsError, match="needs a FinchLLM or a ChatFinch, not Other"):
        create_finch_documents_chain(Other().with_fallbacks([ChatFinch(**BROKEN)]))


def test_a_fallback_around_the_chain_answers(documents: list[Document]) -> None:
    chain = create_finch_documents_chain(ChatFinch(**BROKEN)).with_fallbacks([RunnableLambda(lambda _: "sorry")])
    assert chain.invoke({"context": documents, "input": QUESTION}) == "sorry"


@pytest.mark.parametrize("prefixed", [False, True])
def test_alternatives_are_chosen_by_the_configuration(
    chat: ChatFinch, folder: str, documents: list[Document], prefixed: bool
) -> None:
    inputs: Any = {"context": documents, "input": QUESTION}
    short: Any = FinchLLM(model=folder, **{**SETTINGS, "max_tokens": 3})
    bad: Any = FakeListLLM(responses=["a"])
    llm = chat.configurable_alternatives(
        ConfigurableField(id="llm"), prefix_keys=prefixed, short=short, made=lambda: short, other=Other()
    )
    chain = create_finch_documents_chain(llm, with_citations=True)
    lengths = {"default": 8, "short": 3, "made": 3}
    for name, length in lengths.items():
        asked = chain.invoke(inputs, config={"configurable": {"llm": name}})
        assert asked["report"]["new_tokens"] == length
        assert chain.with_config(configurable={"llm": name}).invoke(inputs)["text"] == asked["text"]
    assert chain.invoke(inputs)["report"]["new_tokens"] == 8
    assert chain.invoke(inputs, config={"configurable": {"llm": "other"}})["text"].endswith(QUESTION)
    with pytest.raises(SettingsError, match="a fallback or alternative is FakeListLLM"):
        create_finch_documents_chain(chat.configurable_alternatives(ConfigurableField(id="llm"), bad=bad))


class Bridge(BaseModel):
    builder: str


def test_a_parsing_chain_may_have_fallbacks_too(chat: ChatFinch, documents: list[Document]) -> None:
    pytest.importorskip("llguidance")
    broken = ChatFinch(**BROKEN).with_structured_output({"title": "Bridge", "type": "object", "properties": {}})
    parsing = broken.with_fallbacks([RunnableLambda(lambda _: {})])
    with pytest.raises(SettingsError, match="a fallback or alternative is RunnableLambda"):
        create_finch_documents_chain(parsing)
    structured = chat.with_structured_output(Bridge, method="json_mode", include_raw=True)
    chain = create_finch_documents_chain(broken.with_fallbacks([structured]))
    answer = chain.invoke({"context": documents, "input": QUESTION})
    assert answer["raw"].response_metadata["report"]["passages"] == len(documents)
    with pytest.raises(SettingsError, match="with_citations is for a model"):
        create_finch_documents_chain(broken.with_fallbacks([structured]), with_citations=True)


def test_an_empty_question_is_told_by_the_last_fallback(chat: ChatFinch, documents: list[Document]) -> None:
    chain = create_finch_documents_chain(chat.with_fallbacks([chat]))
    with pytest.raises(InputError, match="the question is empty"):
        chain.invoke({"context": documents, "input": ""})
