"""The clients of a soak test. They run in a process of their own, and judge each response themselves."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import httpx

from .load_client import events_of, take_orders
from .soak_requests import Sending, addition, draw, facts, removal

LIMIT = 120.0  # seconds after which a request hangs
_CHANGES = 0.1  # how often a client changes a store in place of asking
_IDLE = 2.0  # seconds that a connection waits for its next request; the server waits for 5
_SHOWN = 300  # characters of a problem


@dataclass(frozen=True, slots=True)
class Order:
    """What clients shall do.

    Attributes:
        pool: Requests that can be answered.
        expected: What is answered to each of them; without it each is asked once, by one client, and told.
        clients: How many ask at once.
        seed: Of what they send.
        seconds: After which nobody begins another request.
        requests: The most that a client sends; None for no limit.
        hostile: How often a request is one that no client should send.
    """

    pool: Sequence[Sending]
    expected: Sequence[str] = ()
    clients: int = 1
    seed: int = 0
    seconds: float = 0.0
    requests: int | None = None
    hostile: float = 0.0


@dataclass
class Tally:
    """What came of all requests.

    Attributes:
        counts: How many, by kind and outcome: "answered", "refused" (as it should be), "left" (the client went), or a
            problem: "wrong answer", "wrong status", "cut off", "hung".
        problems: Each of them in words.
        slowest: Seconds of the slowest request whose client stayed.
    """

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    slowest: float = 0.0


class _ProblemError(Exception):
    """Something that must not happen: its outcome, and what was seen."""


class _LeftError(Exception):
    """The client went, as it meant to."""


def serve_orders(orders: Connection, url: str) -> None:
    """Takes an `Order` from a pipe; answers with a `Tally` or, where nothing is expected, with what each request got.

    Args:
        orders: The pipe.
        url: The server's.
    """
    take_orders(orders, partial(_carry_out, url))


async def _carry_out(url: str, order: Order) -> list[str] | Tally:
    limits = httpx.Limits(max_connections=None, keepalive_expiry=_IDLE)
    async with httpx.AsyncClient(base_url=url, timeout=LIMIT, limits=limits) as http:
        tally = Tally()
        if not order.expected:
            return await _alone(http, order.pool, tally)
        ends = time.monotonic() + order.seconds
        await asyncio.gather(*(_client(http, order, number, ends, tally) for number in range(order.clients)))
    return tally


async def _alone(http: httpx.AsyncClient, pool: Sequence[Sending], tally: Tally) -> list[str] | Tally:
    """What each request gets; where one gets nothing, that is counted."""
    try:
        return [await _answer(http, sending) for sending in pool]
    except _ProblemError as problem:
        tally.problems.append(": ".join(problem.args)[:_SHOWN])
        return tally


async def _client(http: httpx.AsyncClient, order: Order, number: int, ends: float, tally: Tally) -> None:
    """One request after another, the same ones for the same seed."""
    rng = random.Random(f"{order.seed}/client/{number}")
    sent = 0
    while time.monotonic() < ends and (order.requests is None or sent < order.requests):
        if rng.random() < _CHANGES:
            name = f"{order.seed}-{number}-{sent}"
            steps = [addition(name, f"{name}: {facts(rng, 1)[0]}"), removal(name)]
        else:
            steps = [draw(rng, order.pool, order.hostile)]
        for sending in steps:
            await _send(http, sending, order.expected, tally)
            sent += 1


async def _send(http: httpx.AsyncClient, sending: Sending, expected: Sequence[str], tally: Tally) -> None:
    """Sends a request, and counts what comes of it."""
    began = time.monotonic()
    try:
        outcome = await _outcome(http, sending, expected)
        tally.slowest = max(tally.slowest, time.monotonic() - began)
    except _LeftError:
        outcome = "left"
    except _ProblemError as problem:
        outcome, seen = problem.args
        tally.problems.append(f"{sending.kind}: {outcome}: {seen}"[:_SHOWN])
    tally.counts[sending.kind, outcome] += 1


async def _outcome(http: httpx.AsyncClient, sending: Sending, expected: Sequence[str]) -> str:
    try:
        async with asyncio.timeout(LIMIT):
            said = await _answer(http, sending)
    except TimeoutError:
        raise _ProblemError("hung", f"no end after {LIMIT:g} s") from None
    if 200 not in sending.statuses:
        return "refused"
    if sending.number is not None and said != expected[sending.number]:
        raise _ProblemError("wrong answer", f"{said} in place of {expected[sending.number]}")
    return "answered"


async def _answer(http: httpx.AsyncClient, sending: Sending) -> str:
    """What is said to a request, in a form that can be compared."""
    try:
        if sending.patience is None or sending.whole:
            return await _said(http, sending)
        try:
            async with asyncio.timeout(sending.patience):
                return await _said(http, sending)
        except TimeoutError:
            raise _LeftError from None
    except httpx.ReadTimeout:
        if sending.whole:
            raise _LeftError from None
        raise _ProblemError("hung", f"nothing came for {LIMIT:g} s") from None
    except httpx.HTTPError as error:
        raise _ProblemError("cut off", f"{type(error).__name__} {error}") from None


async def _said(http: httpx.AsyncClient, sending: Sending) -> str:
    content = sending.content if sending.announced else _parts(sending.content)
    timeout = httpx.Timeout(LIMIT, read=max(sending.patience or 0.0, 0.001) if sending.whole else LIMIT)
    headers = {"Content-Type": "application/json"}
    async with http.stream(sending.method, sending.path, content=content, headers=headers, timeout=timeout) as response:
        if response.status_code != 200:
            return _refusal(sending, response.status_code, await response.aread())
        chunks = [json.loads(await response.aread())] if not sending.streamed else await _chunks(sending, response)
    if 200 not in sending.statuses:
        raise _ProblemError("wrong status", f"200 in place of {_listed(sending.statuses)}")
    return _comparable(chunks)


async def _parts(content: bytes, size: int = 65_536) -> AsyncIterator[bytes]:
    """A body whose length is not said before it comes."""
    for start in range(0, len(content), size):
        yield content[start : start + size]


async def _chunks(sending: Sending, response: httpx.Response) -> list[dict[str, Any]]:
    """The chunks of a stream, which must come to its end."""
    chunks: list[dict[str, Any]] = []
    pieces = 0
    async for event in events_of(response):
        if not event:
            return chunks
        if "error" in event:
            raise _ProblemError("wrong status", f"an error in the stream: {json.dumps(event)}")
        chunks.append(event)
        pieces += any(_part(choice).get("content") or choice.get("text") for choice in event["choices"])
        if sending.pieces is not None and pieces >= sending.pieces:
            raise _LeftError
    raise _ProblemError("cut off", "the stream ended without [DONE]")


def _refusal(sending: Sending, status: int, content: bytes) -> str:
    """A refusal that must be one, in OpenAI's shape."""
    shown = content.decode(errors="replace")
    if status not in sending.statuses:
        raise _ProblemError("wrong status", f"{status} in place of {_listed(sending.statuses)}: {shown}")
    try:
        error = json.loads(content)["error"]
        right = list(error) == ["message", "type", "param", "code"] and isinstance(error["message"], str)
    except (ValueError, KeyError, TypeError):
        right = False
    if not right:
        raise _ProblemError("wrong status", f"{status} with an error of another shape: {shown}")
    return shown


def _listed(statuses: frozenset[int]) -> str:
    return " or ".join(map(str, sorted(statuses)))


def _part(choice: dict[str, Any]) -> dict[str, Any]:
    """Where a choice has its text and citations."""
    part: dict[str, Any] = choice.get("message", choice.get("delta", choice))
    return part


def _comparable(chunks: Sequence[dict[str, Any]]) -> str:
    """What is said, whether whole or in chunks: text, why it ended and what it cites; or an order of results.

    Shares and scores are left out, as they are rounded differently by sums of another order.
    """
    if not any("choices" in chunk for chunk in chunks):
        results = chunks[0].get("results")
        if results is None:  # of a store
            return json.dumps([chunks[0].get("added"), chunks[0].get("removed")])
        return json.dumps([result.get("index", result.get("id")) for result in results])
    text, finish, cited = "", None, []
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        part = _part(choice)
        text += part.get("content") or part.get("text") or ""
        finish = choice["finish_reason"] or finish
        for citation in part.get("citations") or ():
            cited.append([citation["start"], citation["end"], sorted(citation["document_ids"])])
    return json.dumps([text, finish, cited])
