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


@dataclass(frozen=True, slots=True)
class Asked:
    """What became of one request.

    Attributes:
        number: Of the request.
        status: Of the response.
        text: The answer.
        first: Seconds to the first piece of it.
        last: Seconds to its end.
        error: What was said in place of an answer.
    """

    number: int
    status: int
    text: str
    first: float
    last: float
    error: str = ""


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
    """The events of a streamed answer, as they come; the last one, which is no JSON, is an empty object.

    Args:
        response: Whose body is not read yet.
    """
    async for line in response.aiter_lines():
        if line == "data: [DONE]":
            yield {}
        elif line.startswith("data: "):
            yield json.loads(line.removeprefix("data: "))


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
    first, error = 0.0, ""
    async with http.stream("POST", url, json={**body, "stream": True}) as response:
        if response.status_code != 200:
            error = (await response.aread()).decode()
        async for event in events_of(response):
            error += json.dumps(event["error"]) if "error" in event else ""
            piece = "".join(choice["delta"].get("content") or "" for choice in event.get("choices", ()))
            if piece and not pieces:
                first = time.perf_counter() - start
            if piece:
                pieces.append(piece)
    last = time.perf_counter() - start
    return Asked(number, response.status_code, "".join(pieces), first or last, last, error[:200])
