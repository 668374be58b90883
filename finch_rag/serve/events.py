"""Answers as server-sent events."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .errors import error_of
from .replies import Reply
from .watching import Run

log = logging.getLogger("finch_rag.serve")

_GRACE = 5.0  # seconds beyond an answer's own, in which its last events go out


def event(value: dict[str, Any]) -> bytes:
    """One event, named by its type where it has one.

    Args:
        value: What it says.
    """
    name = f"event: {value['type']}\n" if "type" in value else ""
    return f"{name}data: {json.dumps(value, ensure_ascii=False, allow_nan=False)}\n\n".encode()


async def answer_events(
    run: Run, first: str | None, reply: Reply, *, include_usage: bool, show_messages: bool
) -> AsyncIterator[bytes]:
    """The events of an answer. An error on the way is an event, and the last one.

    Args:
        run: The answer, behind its first piece.
        first: The first piece; None where the answer is empty.
        reply: How it is told.
        include_usage: Whether the last event has the tokens.
        show_messages: See `finch_rag.serve.errors.error_of`.
    """
    for chunk in reply.opening():
        yield event(chunk)
    try:
        if first is not None:
            yield event(reply.piece(first))
            async for piece in run.pieces():
                yield event(reply.piece(piece))
        for chunk in reply.ending(run.answer(), include_usage):
            yield event(chunk)
        if reply.last_event:
            yield f"data: {reply.last_event}\n\n".encode()
    except Exception as error:
        yield event(reply.failure(error_of(error, show_messages).body))


class EventStream(Response):
    """A response of events.

    Args:
        events: The events.
        end: Called when the last one is out or nobody listens, whether or not the first was asked for.
        seconds: The most that sending may take, so that who reads nothing holds no place; None for no limit.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], end: Callable[[], None], seconds: float | None) -> None:
        self.status_code, self.background = 200, None
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._events, self._end, self._seconds = events, end, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the events."""
        try:
            async with asyncio.timeout(None if self._seconds is None else self._seconds + _GRACE):
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                async for found in self._events:
                    await send({"type": "http.response.body", "body": found, "more_body": True})
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except OSError as error:  # the client has gone, or reads nothing: TimeoutError is one
            log.info("a stream ended early: %s", type(error).__name__)
        finally:
            self._end()
