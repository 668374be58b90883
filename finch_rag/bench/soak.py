"""A soak test of the server: minutes of random requests, some of them hostile, and every answer is checked.

Server and model run in this process, the clients in another one, over loopback. What the server answers to a pool of
requests, asked one by one, is what it must answer to the same requests among others. The model runs in float32: rounded
to bfloat16, two tokens that are nearly as likely may change places with the sums of a larger batch.
"""

from __future__ import annotations

import gc
import logging
import random
import re
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import torch
from rich.table import Table

from ..engine import Finch
from ..errors import FinchError, InputError
from ..models.kept_cache import KeptCache
from ..prompts.passages import Passage
from ..serve.server import Server
from ..serve.settings import ServeSettings
from ..terminal.loading import load_finch
from ..terminal.output import cell, out, say, say_json
from ..terminal.progress import ProgressBars
from .memory import settled
from .serving import Clients, clients, served
from .soak_client import LIMIT, Order, Tally, serve_orders
from .soak_requests import CHANGING, MOST_BODY, STORE, facts, pool_of

_POOL = 24
_STORED = 60  # passages of the store that all ask
_WARM_UP = 0.5  # of the time, beforehand
_LONGEST_WARM_UP = 300.0  # seconds
_HOSTILE = 0.1
_GROWTH = 0.02  # of memory, that is taken for none
_QUIET = 30.0  # seconds in which a server must come to rest
_MOST_SHOWN = 20  # problems
_SAMPLE = re.compile(r"^(\w+)(?:{(.*)})? (\S+)$", re.MULTILINE)


def main(
    *,
    model: str = "embedded",
    minutes: float = 30.0,
    clients: int = 8,
    seed: int = 0,
    running: int = 4,
    requests: int | None = None,
    hostile: float = _HOSTILE,
) -> dict[str, Any]:
    """Soaks a server, prints a table and, as the last line, one JSON object.

    Args:
        model: What `Finch.from_pretrained` takes.
        minutes: Of the soak; half as many, 5 at the most, go before as a warm-up.
        clients: That ask at once.
        seed: Of what they send.
        running: The most answers that the server makes at once.
        requests: The most that a client sends, however much time is left; None for no limit.
        hostile: How often a request is one that no client should send.

    Returns:
        What the JSON line holds.

    Raises:
        InputError: If an argument cannot work.
        FinchError: If anything was wrong.
    """
    if minutes <= 0 or min(clients, running) < 1:
        raise InputError("minutes must be above 0, clients and running at least 1")
    order = Order(pool_of(seed, _POOL), (), clients, seed, 60 * minutes, requests, hostile)
    with ProgressBars() as bars:
        finch = load_finch(model, bars, dtype="float32")
        with bars.busy(f"soaking for {minutes:g} minutes"), tempfile.TemporaryDirectory() as folder:
            found = _soaked(finch, Path(folder), order, running)
    summary = {
        "model": model,
        "device": torch.cuda.get_device_name() if finch.model.device.type == "cuda" else str(finch.model.device),
        **{"minutes": minutes, "clients": clients, "seed": seed, "running": running, **found},
    }
    _print(summary)
    say_json(summary)
    if problems := summary["problems"]:
        raise FinchError(f"the soak found {summary['problems_in_all']} problems, the first: {problems[0]}")
    return summary


def _soaked(finch: Finch, folder: Path, order: Order, running: int) -> dict[str, Any]:
    """Asks alone, warms up, soaks; what came of it."""
    settings = ServeSettings(
        stores=folder, running=running, waiting=4 * order.clients + 16, timeout=LIMIT, max_body_bytes=MOST_BODY
    )
    with served(finch, settings) as server, clients(serve_orders, server.url) as ask, _errors_logged() as logged:
        _fill_stores(server)
        expected = ask(order, len(order.pool) * LIMIT)
        if isinstance(expected, Tally):
            raise FinchError(f"a request that is asked alone is not answered: {expected.problems[0]}")
        problems = _unrest(server)
        caches = _caches()  # those of the engine itself: what readers and stores put before every passage
        order = replace(order, expected=expected)
        few = None if order.requests is None else max(1, round(order.requests * _WARM_UP))
        seconds = min(order.seconds * _WARM_UP, _LONGEST_WARM_UP)
        warm = _asked(ask, replace(order, seed=order.seed + 1, seconds=seconds, requests=few))
        problems += [*warm.problems, *_unrest(server, caches)]
        before = settled(finch.model.device)
        tally = _asked(ask, order)
        problems += [*tally.problems, *_unrest(server, caches), *_server_errors(server)]
        after = settled(finch.model.device)
    problems += [*_growth(before, after), *(f"the server logged: {line}" for line in logged)]
    counts = tally.counts
    return {
        "warm_up": sum(warm.counts.values()),
        "requests": sum(counts.values()),
        "outcomes": dict(sorted(_sums(counts, 1).items())),
        "kinds": {kind: _outcomes_of(kind, counts) for kind in sorted(_sums(counts, 0))},
        "different_answers": len(set(expected)),
        "slowest_seconds": round(tally.slowest, 2),
        "mib_before": {name: round(value / 2**20, 1) for name, value in before.items()},
        "mib_after": {name: round(value / 2**20, 1) for name, value in after.items()},
        "problems_in_all": len(problems),
        "problems": problems[:_MOST_SHOWN],
    }


def _asked(ask: Clients, order: Order) -> Tally:
    tally: Tally = ask(order, order.seconds + 2 * LIMIT)
    return tally


def _fill_stores(server: Server) -> None:
    shelf = server.service.shelf
    for name in (STORE, CHANGING):
        shelf.create(name, "bfloat16")
    texts = facts(random.Random("store"), _STORED)
    shelf.store(STORE).add([Passage(text, f"s{number}") for number, text in enumerate(texts)])


def _unrest(server: Server, caches: int | None = None) -> list[str]:
    """What is not as it must be where nobody asks any more: who runs or waits, and caches beyond so many."""
    with httpx.Client(base_url=server.url, timeout=_QUIET) as http:
        busy = _busy(http, caches)
        ends = time.monotonic() + _QUIET
        while busy and time.monotonic() < ends:
            time.sleep(0.05)
            busy = _busy(http, caches)
        problems = [f"{what} {value:g} after {_QUIET:g} s of rest" for what, value in busy.items()]
        if (health := http.get("/health")).status_code != 200:
            problems.append(f"/health says {health.status_code}: {health.text}")
    return problems


def _busy(http: httpx.Client, caches: int | None) -> dict[str, float]:
    """What runs and waits, of all kinds, without what is at zero; then caches, if there are more than so many."""
    names = ("finch_running", "finch_waiting", "finch_errands")
    busy = {f"{name} is": value for name, _, value in _samples(http) if name in names and value}
    if not busy and caches is not None and (left := _caches() - caches) > 0:
        busy["caches left:"] = left
    return busy


def _server_errors(server: Server) -> list[str]:
    """Also those that a client did not wait for."""
    with httpx.Client(base_url=server.url, timeout=_QUIET) as http:
        counted = [(labels, value) for name, labels, value in _samples(http) if name == "finch_requests_total"]
    return [f"{value:g} responses with {labels}" for labels, value in counted if 'status="5' in labels]


def _samples(http: httpx.Client) -> list[tuple[str, str, float]]:
    """Name, labels and value of each figure that the server has."""
    found = _SAMPLE.findall(http.get("/metrics").text)
    return [(name, labels, float(value)) for name, labels, value in found]


def _caches() -> int:
    """Caches that are alive."""
    gc.collect()
    return sum(issubclass(type(each), KeptCache) for each in gc.get_objects())


def _growth(before: dict[str, int], after: dict[str, int]) -> list[str]:
    return [
        f"memory of the {name} has grown from {before[name] / 2**20:.1f} to {bytes_now / 2**20:.1f} MiB"
        for name, bytes_now in after.items()
        if bytes_now > before[name] * (1 + _GROWTH)
    ]


class _Errors(logging.Handler):
    """Keeps what is logged as an error."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keeps a line."""
        raised = record.exc_info[1] if record.exc_info else None
        self.lines.append(record.getMessage().splitlines()[0] + (f" ({raised!r})" if raised is not None else ""))


@contextmanager
def _errors_logged() -> Iterator[list[str]]:
    """What finch-rag and the server below it log as errors."""
    handler = _Errors()
    loggers = [logging.getLogger(name) for name in ("finch_rag", "uvicorn", "asyncio")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield handler.lines
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


def _sums(counts: Counter[tuple[str, str]], place: int) -> Counter[str]:
    sums: Counter[str] = Counter()
    for key, count in counts.items():
        sums[key[place]] += count
    return sums


def _outcomes_of(kind: str, counts: Counter[tuple[str, str]]) -> dict[str, int]:
    return {outcome: count for (own, outcome), count in sorted(counts.items()) if own == kind}


def _print(summary: dict[str, Any]) -> None:
    about = f"{summary['minutes']:g} minutes, {summary['clients']} clients, {summary['running']} running"
    table = Table(title=cell(f"{summary['model']} on {summary['device']}, {about}", "table.title"))
    outcomes = list(summary["outcomes"])
    table.add_column("sent")
    for head in ("requests", *outcomes):
        table.add_column(head, justify="right")
    for kind, row in summary["kinds"].items():
        table.add_row(cell(kind), str(sum(row.values())), *(str(row.get(outcome, "")) for outcome in outcomes))
    table.add_row("all", str(summary["requests"]), *(str(count) for count in summary["outcomes"].values()))
    out.print(table)
    for name, before in summary["mib_before"].items():
        say(f"memory of the {name}: {before} MiB after the warm-up, {summary['mib_after'][name]} MiB at the end")
    for problem in summary["problems"]:
        say(problem)
