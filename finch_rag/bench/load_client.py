"""Clients that ask a server at once. It runs in a process of its own, so that it takes no time from the server's."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
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
    """Takes (requests, clients) from a pipe, and answers with (seconds in all, what became of each), until None comes.

    Args:
        orders: The pipe.
        url: Where requests go.
    """
    while (order := orders.recv()) is not None:
        requests, clients = order
        start = time.perf_counter()
        found = asyncio.run(_ask_all(url, requests, clients))
        orders.send((time.perf_counter() - start, found))


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
        async for line in response.aiter_lines():
            if response.status_code != 200:
                error += line
            elif line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                error += json.dumps(event["error"]) if "error" in event else ""
                piece = "".join(choice["delta"].get("content") or "" for choice in event.get("choices", ()))
                if piece and not pieces:
                    first = time.perf_counter() - start
                if piece:
                    pieces.append(piece)
    last = time.perf_counter() - start
    return Asked(number, response.status_code, "".join(pieces), first or last, last, error[:200])
