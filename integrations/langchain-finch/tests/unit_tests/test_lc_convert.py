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
    convert_to_messages,
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


def test_neighbours_of_one_role_are_joined_and_system_messages_come_first() -> None:
    messages = [
        SystemMessage("s"),
        ChatMessage(content="t", role="developer"),
        HumanMessage("h"),
        *convert_to_messages([{"role": "developer", "content": "v"}]),
        HumanMessage("i"),
        AIMessage("a"),
        AIMessage("b"),
        HumanMessage("j"),
        HumanMessage("question"),
        SystemMessage("w"),
    ]
    assert turns(*messages) == [
        ("system", "s"),
        ("system", "t"),
        ("system", "v"),
        ("system", "w"),
        ("user", "h\n\ni"),
        ("assistant", "a\n\nb"),
        ("user", "j\n\nquestion"),
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
    assert [turn["content"] for turn in conversation] == ["first\nsecond\n\nquestion"]
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


def called(*ids: str, text: str = "") -> AIMessage:
    return AIMessage(text, tool_calls=[{"name": "search", "args": {"query": "secret"}, "id": id_} for id_ in ids])


FOUND = [Document("one", id="d1", metadata={"title": "T"}), Document("two")]


@pytest.mark.parametrize(
    ("result", "passages"),
    [
        (
            ToolMessage("one two", artifact=FOUND, tool_call_id="c1", name="search"),
            [Passage("one", "d1", "T", {"title": "T"}), Passage("two", "c1")],
        ),
        (ToolMessage("one", artifact=FOUND[0], tool_call_id="c1"), [Passage("one", "d1", "T", {"title": "T"})]),
        (ToolMessage("1874", tool_call_id="c1", name="search"), [Passage("1874", "c1", "search")]),
        (ToolMessage([{"type": "text", "text": "1874"}], tool_call_id="c1"), [Passage("1874", "c1")]),
        (ToolMessage("1874", artifact={"rows": 3}, tool_call_id="c1"), [Passage("1874", "c1")]),
        (ToolMessage("1874", artifact=[FOUND[0], 7], tool_call_id="c1"), [Passage("1874", "c1")]),
        (ToolMessage("nothing", artifact=[], tool_call_id="c1"), [Passage("nothing", "c1")]),
        (ToolMessage(" ", tool_call_id="c1"), []),
    ],
    ids=["documents", "document", "text", "blocks", "other artifact", "mixed list", "no documents", "nothing"],
)
def test_what_a_tool_found_is_read_as_passages(result: ToolMessage, passages: list[Passage]) -> None:
    for asked in (["when?"], ["when?", "and where?"]):
        first, *rest = (HumanMessage(text) for text in asked)
        conversation, found = conversation_of([first, called("c1"), result, *rest])
        assert [(turn["role"], turn["content"]) for turn in conversation] == [("user", "\n\n".join(asked))]
        assert found == passages
        assert "secret" not in str(conversation)


def test_what_is_said_with_a_call_is_kept_where_the_user_goes_on() -> None:
    messages: list[BaseMessage] = [
        HumanMessage("when?"),
        called("c1", "c2", text="I look."),
        ToolMessage("1874", tool_call_id="c2"),
        ToolMessage("1902", tool_call_id="c1"),
        called("c3", text="I look again."),
        ToolMessage("1931", tool_call_id="c3"),
    ]
    assert turns(*messages) == [("user", "when?")]
    assert turns(*messages, HumanMessage("sure?")) == [
        ("user", "when?"),
        ("assistant", "I look.\n\nI look again."),
        ("user", "sure?"),
    ]
    assert [passage.text for passage in conversation_of(messages)[1]] == ["1874", "1902", "1931"]


def test_a_result_without_its_call_is_read_and_a_call_without_result_is_told() -> None:
    conversation, passages = conversation_of([HumanMessage("when?"), ToolMessage("1874", tool_call_id="c1")])
    assert ([turn["content"] for turn in conversation], len(passages)) == (["when?"], 1)
    with pytest.raises(InputError, match="message 1 calls a tool, search, whose result is not among") as raised:
        conversation_of([HumanMessage("when?"), called("c1", "c2"), ToolMessage("1874", tool_call_id="c1")])
    one_line(raised)


def test_an_empty_question_stays_empty() -> None:
    assert turns(HumanMessage(" ")) == [("user", " ")]
    assert turns(HumanMessage("when?"), AIMessage("1874"), HumanMessage("")) == [
        ("user", "when?"),
        ("assistant", "1874"),
        ("user", ""),
    ]


def test_documents_and_blocks_without_text_are_handed_on() -> None:
    assert passages_of([]) == []
    assert passages_of([Document(" ", id="a"), "", "one"]) == [Passage(" ", "a"), Passage(""), Passage("one")]
    assert conversation_of([plain(text=" ")])[1] == [Passage(" ")]


def plain(**fields: Any) -> HumanMessage:
    return HumanMessage(content=[{"type": "text-plain", "mime_type": "text/plain", **fields}, "question"])


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (FunctionMessage(content="1874", name="f"), "message 1 is a function message"),
        (ChatMessage(content="1874", role="critic"), "message 1 is a chat message"),
        (AIMessage("", tool_calls=[{"name": "f", "args": {}, "id": "1"}]), "message 1 calls a tool, f, whose result"),
        (ToolMessage([{"type": "image", "url": "u"}], tool_call_id="1"), "message 1 holds a block of type 'image'"),
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


@pytest.mark.parametrize(
    ("score", "expected"), [(0.25, 0.25), (1, 1.0), (float("nan"), None), ("high", None), (None, None)]
)
def test_a_documents_relevance_is_its_passages_score(score: Any, expected: float | None) -> None:
    [passage] = passages_of([Document("text", metadata={"relevance_score": score, "page": 3})])
    assert passage.score == expected
    assert passage.metadata == {"page": 3}
    assert passages_of([Document("text")])[0].score is None
