"""LangChain's documents, messages and content blocks <-> finch-rag's passages, messages and answers."""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from numbers import Real
from typing import TYPE_CHECKING, Any, cast

from langchain_core.documents import Document
from langchain_core.messages import AIMessage, BaseMessage, ChatMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.messages.ai import InputTokenDetails, UsageMetadata
from langchain_core.messages.content import Citation, ContentBlock, TextContentBlock, create_citation

from finch_rag import InputError, Passage
from finch_rag.adapters import ASSISTANT, SYSTEM, USER, Message

from ._stores import document_id

if TYPE_CHECKING:
    from finch_rag import Answer, CompressionReport

SCORE = "relevance_score"  # of a document's metadata: what a question paid to it
NO_DOCUMENTS = "no documents were given: answered without any"

_ROLES = {
    "system": SYSTEM,
    "developer": SYSTEM,
    "human": USER,
    "user": USER,
    "ai": ASSISTANT,
    "assistant": ASSISTANT,
}
# Blocks of an answer that are no part of the conversation: the way to it, and what it asked of tools.
_UNSAID = ("reasoning", "tool_call", "tool_call_chunk", "invalid_tool_call")


def passages_of(documents: Iterable[Document | Passage | str]) -> list[Passage]:
    """Documents as passages: text and id as they are, the metadata's "title" as the title.

    One without text stays in its place: finch-rag skips it, and says so. A score is one question's, and no part of
    what a store keeps.

    Args:
        documents: A list of documents, passages or texts; it may be empty.

    Raises:
        InputError: If it is no list, or an item is none of these; the message has its index.
    """
    if isinstance(documents, (str, Document, Passage)) or not isinstance(documents, Sequence):
        raise InputError(f"documents is {type(documents).__name__}: pass a list of documents")
    return [_passage(document, index) for index, document in enumerate(documents)]


def _passage(document: Document | Passage | str, index: int) -> Passage:
    if isinstance(document, Document):
        title = document.metadata.get("title")
        titled = title if isinstance(title, str) and title.strip() else None
        metadata = {name: value for name, value in document.metadata.items() if name != SCORE}
        document = Passage(document.page_content, document.id, titled, metadata, _score(document))
    passage = Passage(document) if isinstance(document, str) else document
    if not isinstance(passage, Passage):
        raise InputError(f"document {index} is {type(document).__name__}: pass a Document, a Passage or a str")
    return passage


def _score(document: Document) -> float | None:
    """What a retriever or a reranker gave the document; None where that is no number to sort by."""
    score = document.metadata.get(SCORE)
    return float(score) if isinstance(score, Real) and math.isfinite(score) else None


def conversation_of(messages: Iterable[BaseMessage]) -> tuple[list[Message], list[Passage]]:
    """Messages as finch-rag takes them, and the passages among them, in order.

    Passages are what ``text-plain`` blocks hold, and what tools found. System messages come first, wherever they stood,
    each by itself. Other neighbours with the same role become one message, because many chat templates refuse them: the
    user's last words are the question.

    Args:
        messages: System, human, AI and tool messages.

    Raises:
        InputError: If one of them is of another kind or holds what the model cannot read, or a tool was called and its
            result is missing; the message has its index.
    """
    messages = list(messages)
    results = {message.tool_call_id for message in messages if isinstance(message, ToolMessage)}
    system: list[Message] = []
    turns: list[Message] = []
    passages: list[Passage] = []
    end = 0  # behind the last turn that does not merely announce a call
    for index, message in enumerate(messages):
        if isinstance(message, ToolMessage):
            passages += _tool_passages(message, index)
            continue
        turn = Message(role=_role(message, index), content="")
        turn["content"], found = _content(message, index)
        passages += found
        if turn["role"] == SYSTEM:
            system.append(turn)
            continue
        turns.append(turn)
        if isinstance(message, AIMessage) and message.tool_calls:
            _check_results(message, index, results)
        else:
            end = len(turns)
    del turns[end:]  # only results follow, and the user's message before is the question
    if not turns:
        # A prompt template of system messages alone asks its question there.
        system, turns = [], [Message(role=USER, content=turn["content"]) for turn in system]
    said = [turn for turn in turns if turn["content"].strip()]  # others only held passages, or called a tool
    if turns and (not said or said[-1]["role"] != turns[-1]["role"]):
        said.append(turns[-1])  # an empty question is the user's to know
    merged: list[Message] = []
    for turn in said:
        if merged and merged[-1]["role"] == turn["role"]:
            turn = Message(role=turn["role"], content=f"{merged.pop()['content']}\n\n{turn['content']}")
        merged.append(turn)
    return [*(turn for turn in system if turn["content"].strip()), *merged], passages


def _check_results(message: AIMessage, index: int, results: set[str]) -> None:
    for call in message.tool_calls:
        if call["id"] not in results:
            raise InputError(
                f"message {index} calls a tool, {call['name']}, whose result is not among the messages: add its "
                "ToolMessage, or put what the tool found into documents"
            )


def _tool_passages(message: ToolMessage, index: int) -> list[Passage]:
    """What a tool found: its documents, as retriever tools with artifacts return them, or else its text."""
    artifact = [message.artifact] if isinstance(message.artifact, Document) else message.artifact
    if isinstance(artifact, list) and artifact and all(isinstance(item, Document) for item in artifact):
        found = passages_of(artifact)
        return [passage if passage.id is not None else replace(passage, id=message.tool_call_id) for passage in found]
    text, found = _content(message, index)
    if text.strip():
        found.append(Passage(text, message.tool_call_id, message.name))
    return found


def _role(message: BaseMessage, index: int) -> str:
    if isinstance(message, (SystemMessage, HumanMessage, AIMessage)):
        return _ROLES[message.type.removesuffix("MessageChunk").lower()]
    if isinstance(message, ChatMessage) and message.role.lower() in _ROLES:
        return _ROLES[message.role.lower()]
    raise InputError(
        f"message {index} is a {message.type} message, which Finch cannot read: use system, human, ai and tool "
        "messages, or put what a tool found into documents"
    )


def _content(message: BaseMessage, index: int) -> tuple[str, list[Passage]]:
    """A message's text and its passages."""
    texts: list[str] = []
    passages: list[Passage] = []
    for block in message.content_blocks:
        if block["type"] == "text":
            texts.append(block["text"])
        elif block["type"] == "text-plain":
            passages.append(_block_passage(block, f"message {index}, passage {len(passages)}"))
        elif block["type"] not in _UNSAID:
            raise InputError(
                f"message {index} holds a block of type {block['type']!r}, which Finch cannot read: use text, and "
                "text-plain for passages"
            )
    return "\n".join(texts), passages


def _block_passage(block: Mapping[str, Any], what: str) -> Passage:
    text = block.get("text")
    if text is None and "base64" in block:
        try:
            text = base64.b64decode(block["base64"], validate=True).decode()
        except (binascii.Error, UnicodeDecodeError) as error:
            raise InputError(f"{what} is not base64 of UTF-8 text: pass its text") from error
    if text is None:
        raise InputError(f"{what} has no text: Finch fetches no url and no file_id, pass the text")
    extras = block.get("extras") or {}
    title = block.get("title") or extras.get("title")
    known = {name: block[name] for name in ("url", "file_id") if name in block}
    context = block.get("context")
    return Passage(f"{context}\n{text}" if context else text, block.get("id"), title, {**extras, **known})


def citations_of(answer: Answer, passages: Sequence[Passage]) -> list[dict[str, Any]]:
    """An answer's citations as plain values, ready for JSON.

    To what the engine says of each, this adds the part of the answer that it stands behind (all of it), where the
    passage comes from, and its text if it was kept whole.

    Args:
        answer: The answer.
        passages: What was read.
    """
    found = []
    for citation in answer.citations:
        passage = passages[citation.index]
        entry = {**citation.to_dict(), "passage_id": document_id(passage)}
        entry |= {"start_index": 0, "end_index": len(answer.text)}
        if citation.title is None and isinstance(title := passage.metadata.get("title"), str):
            entry["title"] = title  # a document prompt has formatted it
        source = passage.metadata.get("url") or passage.metadata.get("source")
        if isinstance(source, str):
            entry["source"] = source
        if citation.kept_tokens == citation.passage_tokens:
            entry["cited_text"] = passage.text
        found.append(entry)
    return found


def usage_of(report: CompressionReport) -> UsageMetadata:
    """A report's tokens: all that was read, and of it the passages' tokens that were kept to answer from.

    Args:
        report: Of an answer.
    """
    read = report.prefix_tokens + report.context_tokens + report.question_tokens
    return UsageMetadata(
        input_tokens=read,
        output_tokens=report.new_tokens,
        total_tokens=read + report.new_tokens,
        input_token_details=cast(InputTokenDetails, {"kept": report.kept_tokens}),
    )


def finish_reason_of(report: CompressionReport) -> str:
    """Why an answer ended, in the words that LangChain's users look for.

    Args:
        report: Of an answer.
    """
    return "length" if report.stop_reason == "length" else "stop"


def content_blocks_of(message: AIMessage) -> list[ContentBlock]:
    """An answer's content as a standard text block with citations: of passages, for all of it, and of quotes.

    LangChain calls it for ``content_blocks``, and for ``content`` with ``output_version="v1"``. So ``content`` stays a
    plain str, which string parsers, templates and most programs expect, and citations stand where the standard has
    them.

    Args:
        message: An answer of `ChatFinch`, or a piece of one.

    Raises:
        NotImplementedError: If its content has been replaced by a list; LangChain then reads that.
    """
    if not isinstance(message.content, str):
        raise NotImplementedError
    citations = message.response_metadata.get("citations") or []
    if not message.content and not citations:
        return []
    block = TextContentBlock(type="text", text=message.content)
    if citations:
        by_index = {citation["index"]: citation for citation in citations}
        quotes = (
            _annotation(by_index[source["index"]] | _place_of(statement, quote))
            for statement in message.response_metadata.get("statements") or []
            for source in statement["sources"]
            for quote in source["quotes"]
        )
        block["annotations"] = [*map(_annotation, citations), *quotes]
    return [block]


def _place_of(statement: Mapping[str, Any], quote: Mapping[str, Any]) -> dict[str, Any]:
    """What differs where a sentence of a passage is cited for a sentence of an answer."""
    return {
        "start_index": statement["start"],
        "end_index": statement["end"],
        "cited_text": quote["text"],
        "share": quote["share"],
        "quote_start": quote["start"],
        "quote_end": quote["end"],
    }


def _annotation(citation: Mapping[str, Any]) -> Citation:
    source = citation.get("source")
    names = ("passage_id", "index", "share", "kept_tokens", "passage_tokens", "source", "quote_start", "quote_end")
    annotation = create_citation(
        url=source if source is not None and "://" in source else None,
        title=citation["title"],
        start_index=citation["start_index"],
        end_index=citation["end_index"],
        cited_text=citation.get("cited_text"),
        **{name: citation.get(name) for name in names},
    )
    del annotation["id"]  # made again at each call, so that the same message would never equal itself
    return annotation
