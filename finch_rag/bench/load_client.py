"""Clients that ask a server at once. It runs in a process of its own, so that it takes no time from the server's."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import httpx

_STREAMED = {"stream": True, "stream_options": {"include_usage": True}}
_SHOWN = 300  # characters of an error


@dataclass(frozen=True, slots=True)
class Asked:
    """What became of one request.

    Attributes:
        number: Of the request.
        status: Of the response; 0 where none came.
        text: The answer.
        first: Seconds to the first piece of it.
        last: Seconds to its end.
        error: What was said in place of an answer, in one line.
        new_tokens: Of the answer, as the server counts them, else the pieces that it came in.
    """

    number: int
    status: int
    text: str
    first: float
    last: float
    error: str = ""
    new_tokens: int = 0


def serve_orders(orders: Connection, url: str) -> None:
    """Takes (requests, clients) from a pipe, and answers with (seconds in all, what became of each).

    Args:
        orders: The pipe.
        url: Where requests go.
    """

    async def carry_out(order: tuple[Sequence[dict[str, Any]], int]) -> tuple[float, list[Asked]]:
        start = time.perf_counter()
        found = await _ask_all(url, *order)
        return time.perf_counter() - start, found

    take_orders(orders, carry_out)


def take_orders(orders: Connection, carry_out: Callable[[Any], Coroutine[Any, Any, Any]]) -> None:
    """Carries out what comes from a pipe, and sends back what comes of it, until None comes.

    Args:
        orders: The pipe.
        carry_out: Is run in an event loop of its own.
    """
    while (order := orders.recv()) is not None:
        orders.send(asyncio.run(carry_out(order)))


async def events_of(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The events of a streamed answer, as they come; [DONE], which is no JSON, is an empty object.

    What else is no JSON object is an error: some servers put what went wrong into an event as it is.

    Args:
        response: Whose body is not read yet.
    """
    async for line in _lines(response):
        data = line.removeprefix("data:").strip()
        if not line.startswith("data:") or not data:
            continue
        try:
            event = {} if data == "[DONE]" else json.loads(data)
        except ValueError:
            event = None
        yield event if isinstance(event, dict) else {"error": data}


async def _lines(response: httpx.Response) -> AsyncIterator[str]:
    """The lines of a body. httpx's own end at Unicode's line separators too, which may stand in an answer."""
    left = b""
    async for part in response.aiter_bytes():
        *lines, left = (left + part).split(b"\n")
        for line in lines:
            yield line.decode(errors="replace")
    yield left.decode(errors="replace")


async def _ask_all(url: str, requests: Sequence[dict[str, Any]], clients: int) -> list[Asked]:
    """Each client asks one question after another, until none is left."""
    left = list(enumerate(requests))[::-1]
    found: list[Asked] = []
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)

    async def client(http: httpx.AsyncClient) -> None:
        while left:
            found.append(await _ask(http, url, *left.pop()))

    async with httpx.AsyncClient(timeout=600, limits=limits) as http:
        await asyncio.gather(*(client(http) for _ in range(clients)))
    return sorted(found, key=lambda asked: asked.number)


async def _ask(http: httpx.AsyncClient, url: str, number: int, body: dict[str, Any]) -> Asked:
    start = time.perf_counter()
    pieces: list[str] = []
    status, first, error, ended = 0, 0.0, "", False
    tokens: int | None = None
    try:
        async with http.stream("POST", url, json={**body, **_STREAMED}) as response:
            status = response.status_code
            if status != 200:
                error = f"status {status}: {(await response.aread()).decode(errors='replace')}"
            async for event in events_of(response):
                error += json.dumps(event["error"], ensure_ascii=False) if event.get("error") else ""
                choices = event.get("choices") or ()
                ended = ended or not event or any(choice.get("finish_reason") for choice in choices)
                tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
                piece = "".join(map(_text, choices))
                if piece and not pieces:
                    first = time.perf_counter() - start
                if piece:
                    pieces.append(piece)
        if not ended and not error:
            error = "the stream ended before the answer"
    except httpx.HTTPError as failure:
        error = f"{type(failure).__name__} {failure}"
    last = time.perf_counter() - start
    error = " ".join(error.split())[:_SHOWN]
    counted = len(pieces) if tokens is None else tokens
    return Asked(number, status, "".join(pieces), first or last, last, error, counted)


def _text(choice: dict[str, Any]) -> str:
    """What an event says; models that think first say their thoughts apart, under one of two names."""
    delta = choice.get("delta") or {}
    return next((delta[name] for name in ("content", "reasoning_content", "reasoning") if delta.get(name)), "")
