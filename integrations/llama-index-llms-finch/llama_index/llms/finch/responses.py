"""Answers -> LlamaIndex's responses, whole or in pieces."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from typing import Any, TypeVar

from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    CitationBlock,
    CompletionResponse,
    MessageRole,
    TextBlock,
)

from finch_rag import Answer, AnswerStream, Passage
from finch_rag.adapters import AsyncAnswerStream

Response = TypeVar("Response", ChatResponse, CompletionResponse)


class AnswerMessage(ChatMessage):
    """An answer's text and its citation blocks."""

    @property
    def content(self) -> str | None:
        """The text; setting it leaves the citation blocks as they are."""
        return super().content

    @content.setter
    def content(self, content: str) -> None:
        # LlamaIndex up to 0.14.23 sets the content of what a chat engine streamed, and `ChatMessage` refuses that where
        # a message has more than its text.
        self.blocks = [TextBlock(text=content), *(block for block in self.blocks if isinstance(block, CitationBlock))]


def completion_response(answer: Answer, passages: Sequence[Passage], delta: str | None = None) -> CompletionResponse:
    """An answer as the response of a completion, with report and citations in ``raw`` and ``additional_kwargs``.

    Args:
        answer: The answer.
        passages: What was read.
        delta: The last piece of a streamed answer.
    """
    return CompletionResponse(text=answer.text, delta=delta, raw=_raw(answer), additional_kwargs=_additional(answer))


def chat_response(
    answer: Answer, passages: Sequence[Passage], delta: str | None = None, *, cites: bool = True
) -> ChatResponse:
    """An answer as the response of a chat: its text, and what it rests on.

    Args:
        answer: The answer.
        passages: What was read.
        delta: The last piece of a streamed answer.
        cites: Whether citation blocks follow the text: one for each quote or, where there are none, for each passage
            that was kept.
    """
    blocks = (_quoted(answer, passages) or _kept(answer, passages)) if cites else []
    message = AnswerMessage(role=MessageRole.ASSISTANT, blocks=[TextBlock(text=answer.text), *blocks])
    return ChatResponse(message=message, delta=delta, raw=_raw(answer), additional_kwargs=_additional(answer))


def chat_piece(text: str, delta: str) -> ChatResponse:
    """A chat's response so far."""
    return ChatResponse(message=ChatMessage(role=MessageRole.ASSISTANT, content=text), delta=delta)


def completion_piece(text: str, delta: str) -> CompletionResponse:
    """A completion's response so far."""
    return CompletionResponse(text=text, delta=delta)


def pieces(
    stream: AnswerStream,
    piece: Callable[[str, str], Response],
    last: Callable[[Answer, Sequence[Passage], str], Response],
) -> Generator[Response, None, None]:
    """A stream's answer as responses; the last one adds no text, but report and citations.

    Args:
        stream: Of the answer; closed at the end, or when nobody wants the rest.
        piece: Text so far and delta -> response.
        last: Answer, passages and delta -> response.
    """
    text = ""
    with stream:
        for delta in stream:
            text += delta
            yield piece(text, delta)
    yield last(stream.answer, stream.passages, "")


async def apieces(
    stream: AsyncAnswerStream,
    piece: Callable[[str, str], Response],
    last: Callable[[Answer, Sequence[Passage], str], Response],
) -> AsyncGenerator[Response, None]:
    """Like `pieces`, for an event loop.

    Args:
        stream: See `pieces`.
        piece: See `pieces`.
        last: See `pieces`.
    """
    text = ""
    try:
        async for delta in stream:
            text += delta
            yield piece(text, delta)
    finally:
        stream.cancel()
    yield last(stream.answer, stream.passages, "")


def _quoted(answer: Answer, passages: Sequence[Passage]) -> list[CitationBlock]:
    """A block for each sentence of a passage that a statement of the answer rests on.

    A block's place is made of whole numbers alone: one block for several sentences could not say where each stands.
    """
    return [
        _block(
            passages[source.index],
            source.index,
            quote.text,
            start=quote.start,
            end=quote.end,
            statement_start=statement.start,
            statement_end=statement.end,
            share_percent=round(100 * quote.share),
        )
        for statement in answer.statements
        for source in statement.sources
        for quote in source.quotes
    ]


def _kept(answer: Answer, passages: Sequence[Passage]) -> list[CitationBlock]:
    """A block for each passage that was kept."""
    return [
        _block(
            passages[citation.index],
            citation.index,
            passages[citation.index].text,
            kept_tokens=citation.kept_tokens,
            passage_tokens=citation.passage_tokens,
        )
        for citation in answer.citations
    ]


def _block(passage: Passage, index: int, text: str, **place: int) -> CitationBlock:
    return CitationBlock(
        cited_content=TextBlock(text=text),
        source=str(index) if passage.id is None else passage.id,
        title=passage.title or "",
        additional_location_info={"index": index, **place},
    )


def _raw(answer: Answer) -> dict[str, Any]:
    report = answer.report
    read = report.prefix_tokens + report.context_tokens + report.question_tokens
    # LlamaIndex's token counter looks for "usage".
    usage = {"prompt_tokens": read, "completion_tokens": report.new_tokens, "total_tokens": read + report.new_tokens}
    return {**answer.to_dict(), "usage": usage}


def _additional(answer: Answer) -> dict[str, Any]:
    found = answer.to_dict()
    return {name: found[name] for name in ("citations", "statements", "support", "report")}
