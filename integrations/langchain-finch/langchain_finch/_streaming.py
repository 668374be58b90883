"""An answer's stream as LangChain's chunks."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, TypeVar

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.outputs import ChatGenerationChunk, GenerationChunk

from finch_rag import AnswerStream
from finch_rag.adapters import AsyncAnswerStream

from ._convert import NO_DOCUMENTS, citations_of, finish_reason_of

Chunk = TypeVar("Chunk", ChatGenerationChunk, GenerationChunk)
AnyStream = AnswerStream | AsyncAnswerStream


def chunks(
    stream: AnswerStream,
    run_manager: CallbackManagerForLLMRun | None,
    piece: Callable[[str], Chunk],
    last: Callable[[AnyStream], Chunk],
) -> Iterator[Chunk]:
    """The chunks of an answer; the last one has no text, but says what the answer took and where it came from.

    Args:
        stream: Of the answer; closed at the end, or when nobody wants the rest.
        run_manager: Told of each piece of text.
        piece: Text -> chunk.
        last: A stream that has ended -> chunk.
    """
    with stream:
        for delta in stream:
            chunk = piece(delta)
            if run_manager is not None:
                run_manager.on_llm_new_token(delta, chunk=chunk)
            yield chunk
        yield last(stream)


async def achunks(
    open_stream: Callable[[], AnswerStream],
    run_manager: AsyncCallbackManagerForLLMRun | None,
    piece: Callable[[str], Chunk],
    last: Callable[[AnyStream], Chunk],
) -> AsyncIterator[Chunk]:
    """Like `chunks`, for an event loop.

    Args:
        open_stream: Starts the answer, in a thread.
        run_manager: See `chunks`.
        piece: See `chunks`.
        last: See `chunks`.
    """
    stream = AsyncAnswerStream(open_stream)
    async for delta in stream:
        chunk = piece(delta)
        if run_manager is not None:
            await run_manager.on_llm_new_token(delta, chunk=chunk)
        yield chunk
    yield last(stream)


def outcome_of(stream: AnyStream) -> dict[str, Any]:
    """Citations, statements, support, report and finish reason of an answer.

    Args:
        stream: One that has ended.
    """
    answer = stream.answer
    report = answer.report.to_dict()
    if report["passages"]:  # the call gave none, but its messages had some
        report["notes"] = [note for note in report["notes"] if note != NO_DOCUMENTS]
    return {
        "citations": citations_of(answer, stream.passages),
        "statements": [statement.to_dict() for statement in answer.statements],
        "support": answer.support,
        "report": report,
        "finish_reason": finish_reason_of(answer.report),
    }
