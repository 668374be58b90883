"""Structured output: JSON that is forced where llguidance is installed, and asked for in any case."""

from __future__ import annotations

import json
import warnings
from typing import Any, Literal

import langchain_finch.chat_models
import pytest
from langchain_core.documents import Document
from langchain_core.exceptions import OutputParserException
from langchain_core.load import dumpd
from langchain_core.messages import HumanMessage
from langchain_core.messages.content import create_plaintext_block, create_text_block
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableBinding, RunnableLambda
from langchain_finch import ChatFinch, FinchLLM, create_finch_documents_chain
from langchain_finch.chat_models import BoundChat
from lc_support import QUESTION, SETTINGS, STUFF_CHAT, Listener, answer_with, ids, one_line
from pydantic import BaseModel, TypeAdapter
from typing_extensions import TypedDict

from finch_rag import Finch, InputError, SettingsError


class Bridge(BaseModel):
    """A bridge."""

    builder: str
    year: int


class BridgeDict(TypedDict):
    """A bridge."""

    builder: str
    year: int


class Lamp(BaseModel):
    """A lamp; everything in it ends by itself, so that random weights come to an end, too."""

    lit: bool
    colours: tuple[Literal["red", "green"], Literal["red", "green"]]


class LampDict(TypedDict):
    """A lamp."""

    lit: bool
    colour: Literal["red", "green"]


GOOD = '{"builder": "Clara Novak", "year": 1874}'
BRIDGE = Bridge(builder="Clara Novak", year=1874)
LAMPS: list[Any] = [
    pytest.param(Lamp, Lamp, id="pydantic"),
    pytest.param(LampDict, LampDict, id="typed dict"),
    pytest.param(Lamp.model_json_schema(), dict[str, Any], id="json schema"),
]


@pytest.fixture
def long(chat: ChatFinch) -> ChatFinch:
    return chat.model_copy(update={"max_tokens": 200})


@pytest.fixture
def unset(folder: str) -> ChatFinch:
    """A model that says nothing about the length of answers."""
    return ChatFinch(**{**SETTINGS, "model": folder, "max_tokens": None})


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The options of each call of an engine, and how many passages there were."""
    calls: list[dict[str, Any]] = []
    stream = Finch.stream_chat

    def recorded(finch: Finch, messages: Any, passages: Any = (), **options: Any) -> Any:
        passages = list(passages)
        calls.append({**options, "passages": len(passages)})
        return stream(finch, messages, passages, **options)

    monkeypatch.setattr(Finch, "stream_chat", recorded)
    return calls


@pytest.fixture
def without_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(langchain_finch.chat_models, "can_force_json", lambda: False)


def fits(value: Any, kind: Any) -> bool:
    TypeAdapter(kind).validate_python(value)
    return isinstance(value, kind) if kind is Lamp else isinstance(value, dict) and "lit" in value


# Forced


@pytest.mark.parametrize(("schema", "kind"), LAMPS)
@pytest.mark.parametrize("temperature", [0, 2.0])
async def test_random_weights_answer_by_a_schema(
    long: ChatFinch, documents: list[Document], schema: Any, kind: Any, temperature: float
) -> None:
    model = long.model_copy(update={"temperature": temperature, "seed": 1})
    structured = model.bind(documents=documents).with_structured_output(schema)
    answer = structured.invoke(QUESTION)
    assert fits(answer, kind)
    assert list(structured.stream(QUESTION))[-1] == answer
    assert await structured.ainvoke(QUESTION) == answer
    assert structured.batch([QUESTION]) == [answer]


def test_no_warning_where_json_is_forced(long: ChatFinch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        long.with_structured_output(Lamp)


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        (Bridge, BRIDGE),
        (BridgeDict, BRIDGE.model_dump()),
        (Bridge.model_json_schema(), BRIDGE.model_dump()),
    ],
    ids=["pydantic", "typed dict", "json schema"],
)
def test_structured_output_is_parsed(
    long: ChatFinch, documents: list[Document], monkeypatch: pytest.MonkeyPatch, schema: Any, expected: Any
) -> None:
    answer_with(monkeypatch, GOOD)
    structured = long.with_structured_output(schema)
    assert structured.invoke(QUESTION) == expected
    assert list(structured.stream(QUESTION))[-1] == expected
    blocks = [create_plaintext_block(document.page_content) for document in documents]
    message = HumanMessage(content_blocks=[*blocks, create_text_block(QUESTION)])
    assert structured.invoke([message]) == expected


def test_the_method_decides_what_is_forced(long: ChatFinch, seen: list[dict[str, Any]]) -> None:
    for method in (None, "json_schema", "function_calling"):
        long.with_structured_output(Lamp, method=method, strict=True).invoke(QUESTION)
        assert set(seen[-1]["json_schema"]["properties"]) == {"lit", "colours"}
    long.with_structured_output(dict(Lamp.model_json_schema()), method="json_mode", include_raw=True).invoke(QUESTION)
    assert seen[-1]["json_schema"] == {"type": "object"}
    assert '"colours"' in seen[-1]["instructions"]
    with pytest.raises(InputError, match=r"method is 'tools'") as raised:
        long.with_structured_output(Lamp, method="tools")
    one_line(raised)


class Tree(BaseModel):
    """A tree."""

    kind: Literal["oak", "ash"]
    child: Tree | None


def test_a_class_that_holds_itself_is_forced(long: ChatFinch) -> None:
    tree = long.bind(max_tokens=400).with_structured_output(Tree).invoke(QUESTION, temperature=1.0, seed=2)
    assert isinstance(tree, Tree)


def test_a_schema_that_cannot_be_forced_is_told_in_one_line(long: ChatFinch) -> None:
    class Lamps(BaseModel):
        names: set[str]

    with pytest.raises(InputError, match="uniqueItems") as raised:
        long.with_structured_output(Lamps).invoke(QUESTION)
    one_line(raised)


def test_json_that_is_cut_off_cannot_be_parsed(long: ChatFinch) -> None:
    short = long.bind(max_tokens=3)
    with pytest.raises(OutputParserException):
        short.with_structured_output(Lamp).invoke(QUESTION)
    both: Any = short.with_structured_output(Lamp, include_raw=True).invoke(QUESTION)
    assert both["raw"].response_metadata["report"]["stop_reason"] == "length"
    assert both["parsed"] is None
    assert isinstance(both["parsing_error"], OutputParserException)


def test_a_call_may_name_a_json_schema(chat: ChatFinch, llm: FinchLLM, documents: list[Document]) -> None:
    schema = {"enum": ["red", "green"]}
    for asker in (chat | StrOutputParser(), llm):
        said = asker.invoke(QUESTION, documents=documents, json_schema=schema, max_tokens=20)
        assert json.loads(said) in schema["enum"]
        with pytest.raises(InputError, match="json_schema") as raised:
            asker.invoke(QUESTION, json_schema="a schema")
        one_line(raised)


def test_a_cached_answer_is_of_the_same_schema(chat: ChatFinch) -> None:
    calls: list[dict[str, Any]] = [
        {},
        {"json_schema": {"type": "object"}},
        {"json_schema": {}},
        {"format_instructions": "JSON"},
    ]
    strings = {chat._get_llm_string(**options) for options in calls}
    assert len(strings) == 4


# What stays: instructions, documents, length


def test_the_schema_is_asked_for_behind_the_users_instructions(
    folder: str, long: ChatFinch, shared: Finch, seen: list[dict[str, Any]]
) -> None:
    long.with_structured_output(Lamp).invoke(QUESTION)
    asked = seen[-1]["instructions"]
    assert asked.startswith("Answer with a JSON object")
    assert '"colours"' in asked
    own = ChatFinch(**{**SETTINGS, "model": folder, "instructions": "Be brief.", "max_tokens": 200})
    own.with_structured_output(Lamp).invoke(QUESTION)
    assert seen[-1]["instructions"] == f"Be brief.\n\n{asked}"
    own.bind(instructions="Be slow.").with_structured_output(Lamp).invoke(QUESTION)
    assert seen[-1]["instructions"] == f"Be slow.\n\n{asked}"
    own.with_structured_output(Lamp).bind(instructions="Be kind.").invoke(QUESTION)
    assert seen[-1]["instructions"] == f"Be kind.\n\n{asked}"
    engine = Finch(shared.model, shared.tokenizer, heads="all", instructions="Be good.", max_new_tokens=150)
    ChatFinch(engine=engine).with_structured_output(Lamp).invoke(QUESTION)
    assert seen[-1]["instructions"] == f"Be good.\n\n{asked}"
    assert "max_new_tokens" not in seen[-1]


def test_answers_may_be_longer_where_nobody_says_how_long(unset: ChatFinch, seen: list[dict[str, Any]]) -> None:
    unset.with_structured_output(Lamp).invoke(QUESTION)
    unset.with_structured_output(Lamp).bind(max_tokens=60).invoke(QUESTION)
    unset.bind(max_new_tokens=70).with_structured_output(Lamp).invoke(QUESTION)
    unset.model_copy(update={"max_tokens": 80}).with_structured_output(Lamp).invoke(QUESTION)
    assert [call["max_new_tokens"] for call in seen] == [512, 60, 70, 80]
    unset.invoke(QUESTION)
    assert "max_new_tokens" not in seen[-1]


@pytest.mark.parametrize("include_raw", [False, True])
def test_documents_survive(
    long: ChatFinch, documents: list[Document], seen: list[dict[str, Any]], include_raw: bool
) -> None:
    asked: dict[str, Any] = {"schema": Lamp, "include_raw": include_raw}
    answers: list[Any] = [
        long.bind(documents=documents).with_structured_output(**asked).invoke(QUESTION),
        long.bind(documents=documents)
        .bind(budget=50)
        .with_config(tags=["a"])
        .with_structured_output(**asked)
        .invoke(QUESTION),
        long.with_config(tags=["a"]).bind(documents=documents).with_structured_output(**asked).invoke(QUESTION),
        long.with_structured_output(**asked).bind(documents=documents).invoke(QUESTION),
        long.with_structured_output(**asked).invoke(QUESTION, documents=documents),
        list(long.with_structured_output(**asked).stream(QUESTION, documents=documents))[-1],
        create_finch_documents_chain(long.with_structured_output(**asked)).invoke(
            {"context": documents, "input": QUESTION}
        ),
    ]
    assert {call["passages"] for call in seen} == {12}
    assert seen[1]["budget"] == 50
    for answer in answers[:5] + answers[6:]:
        assert fits(answer["parsed"] if include_raw else answer, Lamp)
        if include_raw:
            assert answer["parsing_error"] is None
            assert ids(answer["raw"].response_metadata["citations"])


def test_a_binding_is_langchains_own_when_it_is_serialised(long: ChatFinch) -> None:
    bound = long.bind(budget=50)
    assert isinstance(bound.bind(seed=1).with_config(tags=["a"]), BoundChat)
    assert dumpd(bound)["id"] == dumpd(RunnableBinding(bound=long, kwargs={"budget": 50}))["id"]


def test_a_configuration_holds(long: ChatFinch) -> None:
    listener = Listener()
    long.with_config(callbacks=[listener]).with_structured_output(Lamp).invoke(QUESTION)
    assert listener.calls == 1


# In the documents chain


def test_the_documents_chain_gives_the_parsed_object(
    long: ChatFinch, documents: list[Document], seen: list[dict[str, Any]]
) -> None:
    inputs = {"context": documents, "input": QUESTION}
    structured = long.with_structured_output(Lamp)
    chain = create_finch_documents_chain(structured)
    answer = chain.invoke(inputs)
    assert fits(answer, Lamp)
    assert list(chain.stream(inputs))[-1] == answer
    assert create_finch_documents_chain(structured.with_retry()).invoke(inputs) == answer
    assert create_finch_documents_chain(structured.with_config(tags=["a"])).invoke(inputs) == answer
    prompt = ChatPromptTemplate.from_messages([("human", "Be brief.\n\n{context}\n\nQuestion: {input}")])
    assert fits(create_finch_documents_chain(structured, prompt).invoke(inputs), Lamp)
    assert seen[-1]["instructions"].startswith("Be brief.\n\nAnswer with a JSON object")
    assert seen[-1]["passages"] == 12
    stuff = ChatPromptTemplate.from_messages([("system", STUFF_CHAT), ("human", "{input}")])
    assert fits(create_finch_documents_chain(structured, stuff).invoke(inputs), Lamp)
    assert "Answer with a JSON object" in seen[-1]["instructions"]


def test_the_documents_chain_says_what_it_cannot_do(long: ChatFinch) -> None:
    with pytest.raises(SettingsError, match="with_citations is for a model") as raised:
        create_finch_documents_chain(long.with_structured_output(Lamp), with_citations=True)
    one_line(raised)
    with pytest.raises(SettingsError, match="needs a FinchLLM or a ChatFinch") as raised:
        create_finch_documents_chain(RunnableLambda(str) | long)
    one_line(raised)


# Without the extra


@pytest.mark.usefixtures("without_extra")
@pytest.mark.parametrize("answer", [GOOD, f"```json\n{GOOD}\n```"], ids=["bare", "fenced"])
def test_without_the_extra_json_is_asked_for_and_a_warning_says_so(
    long: ChatFinch, monkeypatch: pytest.MonkeyPatch, seen: list[dict[str, Any]], answer: str
) -> None:
    answer_with(monkeypatch, answer)
    for model in (long, long.bind(budget=50)):
        with pytest.warns(UserWarning, match=r"pip install 'finch-rag\[json\]'") as warned:
            structured = model.with_structured_output(Bridge)
        assert len(warned) == 1
        assert warned[0].filename == __file__
        assert structured.invoke(QUESTION) == BRIDGE
        assert "json_schema" not in seen[-1]
        assert '"builder"' in seen[-1]["instructions"]


@pytest.mark.usefixtures("without_extra")
@pytest.mark.filterwarnings("ignore:the JSON of with_structured_output")
def test_what_cannot_be_parsed_is_told_or_handed_over(long: ChatFinch, monkeypatch: pytest.MonkeyPatch) -> None:
    answer_with(monkeypatch, "Clara Novak built it.")
    with pytest.raises(OutputParserException):
        long.with_structured_output(Bridge).invoke(QUESTION)
    both: Any = long.with_structured_output(Bridge, include_raw=True).invoke(QUESTION)
    assert both["raw"].content == "Clara Novak built it."
    assert both["parsed"] is None
    assert isinstance(both["parsing_error"], OutputParserException)
    answer_with(monkeypatch, GOOD)
    good: Any = long.with_structured_output(Bridge, include_raw=True).invoke(QUESTION)
    assert (good["parsed"], good["parsing_error"]) == (BRIDGE, None)
