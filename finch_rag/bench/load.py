"""A server under load: some clients at once, each with one question after another.

Server and model run in this process, the clients in another one, over loopback. Every number of clients asks the same
questions, so their answers are compared with those of one client alone.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from ..engine import Finch
from ..errors import FinchError, InputError
from ..prompts.passages import Passage
from ..serve.settings import ServeSettings
from ..terminal.loading import load_finch
from ..terminal.output import out, say_json
from ..terminal.progress import ProgressBars
from .load_client import Asked, serve_orders
from .memory import in_use, peak_memory
from .serving import clients as clients_of
from .serving import served
from .shapes import SHAPES, made_passages, random_finch, random_passages

_STORE = "load"


def main(
    *,
    model: str = "embedded",
    shape: str | None = None,
    clients: Sequence[int] = (1, 4, 16),
    requests: int = 32,
    tokens: int = 2048,
    store_tokens: int = 0,
    new_tokens: int = 64,
    budget: int | None = None,
    running: int = 16,
) -> dict[str, Any]:
    """Asks with each number of clients, prints a table and, as the last line, one JSON object.

    Args:
        model: What `Finch.from_pretrained` takes.
        shape: Of `finch_rag.bench.shapes.SHAPES`: random weights in place of ``model``.
        clients: Numbers of clients.
        requests: Questions; as many as there are clients at the least.
        tokens: Of the passages that each request brings along, different ones each.
        store_tokens: Of a store that all ask in place of passages of their own; 0 for none.
        new_tokens: The most tokens of an answer.
        budget: Document tokens kept; the engine's default when None.
        running: The most answers that the server makes at once.

    Returns:
        What the JSON line holds.

    Raises:
        InputError: If an argument cannot work.
        FinchError: If the server does not answer.
    """
    if not clients or min(*clients, requests, tokens, new_tokens, running) < 1:
        raise InputError("clients, requests, tokens, new tokens and running must be at least 1")
    if shape is not None and shape not in SHAPES:
        raise InputError(f"shape {shape!r} is unknown: use {', '.join(SHAPES)}")
    with ProgressBars() as bars:
        finch = _random(shape) if shape else load_finch(model, bars)
        device = finch.runtime.model.device
        bodies = _bodies(finch, max(requests, *clients), 0 if store_tokens else tokens, new_tokens, budget)
        with (
            tempfile.TemporaryDirectory() as folder,
            served(finch, ServeSettings(stores=Path(folder), running=running, waiting=len(bodies))) as server,
            clients_of(serve_orders, f"{server.url}/v1/chat/completions") as ask,
        ):
            if store_tokens:
                server.service.shelf.create(_STORE, "bfloat16")
                server.service.shelf.store(_STORE).add(
                    _passages(finch, store_tokens), on_progress=lambda done, total: bars("store", done, total)
                )
            for number in (1, min(running, len(bodies))):  # makes the captured steps
                ask((bodies[: 2 * number], number))
            rows: dict[str, dict[str, Any]] = {}
            alone: list[Asked] = []
            for step, number in enumerate(clients):
                bars("clients", step, len(clients))
                with peak_memory(device, in_use(device)) as peak:
                    seconds, found = ask((bodies[: max(requests, number)], number))
                alone = alone or found
                rows[str(number)] = {**_figures(seconds, found, alone), "peak_mib": round(peak[0])}
            bars("clients", len(clients), len(clients))
    summary = {
        "model": f"{shape} (random weights)" if shape else model,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else str(device),
        "passages": f"a store of {store_tokens} tokens" if store_tokens else f"{tokens} tokens a request",
        **{"new_tokens": new_tokens, "budget": budget, "running": running, "clients": rows},
    }
    _print(summary)
    say_json(summary)
    return summary


def _random(shape: str) -> Finch:
    """An engine with random weights, each of whose tokens shows as a letter: else the first one could not be seen."""
    finch = random_finch(shape)
    finch.runtime.prompts.decode = lambda token_ids: "".join(chr(97 + token % 26) for token in token_ids)  # type: ignore[method-assign]
    return finch


def _bodies(finch: Finch, count: int, tokens: int, new_tokens: int, budget: int | None) -> list[dict[str, Any]]:
    """Requests with different questions and, unless they ask the store, different passages."""
    passages = _passages(finch, tokens) if tokens else []
    own: dict[str, Any] = {"finch": {} if budget is None else {"budget": budget}}
    if not tokens:
        own["store"] = _STORE
    return [
        {
            "messages": [{"role": "user", "content": f"What do the passages say about number {number}?"}],
            "documents": [{"id": str(n), "text": f"{number} {passage.text}"} for n, passage in enumerate(passages)],
            "max_tokens": new_tokens,
            "temperature": 0,
            **own,
        }
        for number in range(count)
    ]


def _passages(finch: Finch, tokens: int) -> list[Passage]:
    """Some that the model's tokenizer makes so many tokens of."""
    return random_passages(tokens) if len(finch.tokenizer) <= 256 else made_passages(finch, tokens)


def _figures(seconds: float, found: Sequence[Asked], alone: Sequence[Asked]) -> dict[str, Any]:
    failed = [asked for asked in found if asked.error or asked.status != 200]
    if failed:
        raise FinchError(f"{len(failed)} of {len(found)} requests failed, the first with {failed[0].error}")
    texts = {asked.number: asked.text for asked in alone}
    different = sum(texts.get(asked.number, asked.text) != asked.text for asked in found)
    return {
        "requests": len(found),
        "a_second": round(len(found) / seconds, 3),
        "first_p50": round(_quantile([asked.first for asked in found], 0.5), 3),
        "first_p99": round(_quantile([asked.first for asked in found], 0.99), 3),
        "last_p50": round(_quantile([asked.last for asked in found], 0.5), 3),
        "last_p99": round(_quantile([asked.last for asked in found], 0.99), 3),
        "different": different,
    }


def _quantile(values: Sequence[float], part: float) -> float:
    if len(values) == 1:
        return values[0]
    return statistics.quantiles(values, n=100, method="inclusive")[round(part * 100) - 1]


def _print(summary: dict[str, Any]) -> None:
    rows = summary["clients"]
    first = next(iter(rows.values()))["a_second"]
    table = Table(title=f"{summary['model']} on {summary['device']}, {summary['passages']}")
    heads = ("clients", "requests/s", "times", "first token p50", "p99", "end p50", "p99", "other answers", "peak MiB")
    for head in heads:
        table.add_column(head, justify="right")
    for number, row in rows.items():
        table.add_row(
            number,
            f"{row['a_second']:.2f}",
            f"{row['a_second'] / first:.2f}",
            *(f"{row[key]:.2f} s" for key in ("first_p50", "first_p99", "last_p50", "last_p99")),
            f"{row['different']} of {row['requests']}",
            str(row["peak_mib"]),
        )
    out.print(table)
