from __future__ import annotations

import base64
from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    HumanMessageChunk,
    SystemMessage,
    ToolMessage,
)
from langchain_finch._convert import conversation_of, passages_of
from lc_support import one_line

from finch_rag import InputError, Passage


def encoded(text: bytes) -> str:
    return base64.b64encode(text).decode()


def turns(*messages: BaseMessage) -> list[tuple[str, str]]:
    return [(turn["role"], turn["content"]) for turn in conversation_of(messages)[0]]


def test_documents_keep_text_id_title_and_metadata() -> None:
    metadata = {"title": "Bridges", "source": "bridges.md"}
    [passage] = passages_of([Document("Built in 1874.", id="b1", metadata=metadata)])
    assert passage == Passage("Built in 1874.", "b1", "Bridges", metadata)


@pytest.mark.parametrize("title", [None, 7, "", "  "])
def test_a_title_that_is_no_text_is_none(title: Any) -> None:
    assert passages_of([Document("Built in 1874.", metadata={"title": title})])[0].title is None


def test_passages_and_texts_are_documents_too() -> None:
    passage = Passage("one", id="1")
    assert passages_of((passage, "two")) == [passage, Passage("two")]


@pytest.mark.parametrize(
    ("documents", "said"),
    [
        ([], "there are no documents"),
        ("a text", "documents is str"),
        (Document("a"), "documents is Document"),
        ((text for text in "ab"), "documents is generator"),
        ({"a": 1}, "documents is dict"),
        (["a", 7], "document 1 is int"),
    ],
)
def test_documents_that_cannot_be_read_are_named(documents: Any, said: str) -> None:
    with pytest.raises(InputError, match=said) as raised:
        passages_of(documents)
    one_line(raised)


def test_roles_are_those_of_chat_templates() -> None:
    messages = [
        SystemMessage("s"),
        HumanMessage("h"),
        AIMessage("a"),
        ChatMessage(content="u", role="User"),
        ChatMessage(content="b", role="assistant"),
        HumanMessageChunk(content="q"),
    ]
    assert turns(*messages) == [
        ("system", "s"),
        ("user", "h"),
        ("assistant", "a"),
        ("user", "u"),
        ("assistant", "b"),
        ("user", "q"),
    ]


def test_neighbours_of_one_role_are_joined_but_the_question_is_not() -> None:
    messages = [
        SystemMessage("s"),
        SystemMessage("t"),
        HumanMessage("h"),
        HumanMessage("i"),
        AIMessage("a"),
        AIMessage("b"),
        HumanMessage("j"),
        HumanMessage("question"),
    ]
    assert turns(*messages) == [
        ("system", "s\n\nt"),
        ("user", "h\n\ni"),
        ("assistant", "a\n\nb"),
        ("user", "j"),
        ("user", "question"),
    ]


def test_a_system_message_alone_asks_the_question() -> None:
    assert turns(SystemMessage("what is a canal?")) == [("user", "what is a canal?")]


def test_blocks_become_text_and_passages_in_order() -> None:
    messages = [
        HumanMessage(
            content=[
                {"type": "text-plain", "text": "one", "mime_type": "text/plain", "id": "1", "title": "T", "url": "u"},
                "first",
                {"type": "text", "text": "second"},
                {"type": "text-plain", "text": "two", "mime_type": "text/plain", "context": "From 1874."},
            ]
        ),
        HumanMessage(
            content=[
                {
                    "type": "text-plain",
                    "base64": base64.b64encode("drei ü".encode()).decode(),
                    "mime_type": "text/plain",
                },
                {
                    "type": "document",
                    "source": {"type": "text", "data": "four", "media_type": "text/plain"},
                    "title": "D",
                },
                "question",
            ]
        ),
    ]
    conversation, passages = conversation_of(messages)
    assert [turn["content"] for turn in conversation] == ["first\nsecond", "question"]
    assert passages == [
        Passage("one", "1", "T", {"url": "u"}),
        Passage("From 1874.\ntwo"),
        Passage("drei ü"),
        Passage("four", title="D", metadata={"title": "D"}),
    ]


def test_a_turn_that_only_held_passages_is_no_turn() -> None:
    block = {"type": "text-plain", "text": "one", "mime_type": "text/plain"}
    conversation, passages = conversation_of([HumanMessage(content=[block]), HumanMessage("question")])
    assert [turn["content"] for turn in conversation] == ["question"]
    assert len(passages) == 1


def test_reasoning_of_an_earlier_answer_is_left_out() -> None:
    answer = AIMessage(content=[{"type": "reasoning", "reasoning": "hm"}, {"type": "text", "text": "1874"}])
    assert turns(HumanMessage("when?"), answer, HumanMessage("sure?"))[1] == ("assistant", "1874")


def plain(**fields: Any) -> HumanMessage:
    return HumanMessage(content=[{"type": "text-plain", "mime_type": "text/plain", **fields}, "question"])


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (ToolMessage("1874", tool_call_id="1"), "message 1 is a tool message"),
        (FunctionMessage(content="1874", name="f"), "message 1 is a function message"),
        (ChatMessage(content="1874", role="critic"), "message 1 is a chat message"),
        (AIMessage("", tool_calls=[{"name": "f", "args": {}, "id": "1"}]), "message 1 calls a tool"),
        (HumanMessage(content=[{"type": "image", "url": "u"}]), "message 1 holds a block of type 'image'"),
        (HumanMessage(content=[{"type": "image_url", "image_url": {"url": "u"}}]), "of type 'image'"),
        (HumanMessage(content=[{"type": "no such"}]), "of type 'non_standard'"),
        (plain(url="https://example.org"), "message 1, passage 0 has no text: Finch fetches no url"),
        (plain(base64="?"), "message 1, passage 0 is not base64"),
        (plain(base64=encoded(b"\xff")), "message 1, passage 0 is not base64"),
    ],
)
def test_messages_that_cannot_be_read_are_named(message: BaseMessage, said: str) -> None:
    with pytest.raises(InputError, match=said) as raised:
        conversation_of([HumanMessage("when?"), message])
    one_line(raised)
