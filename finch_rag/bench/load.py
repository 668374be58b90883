"""A server under load: some clients at once, each with one question after another.

Server and model run in this process, the clients in another one, over loopback. Every number of clients asks the same
questions, so their answers are compared with those of one client alone. Another server of the same machine may be asked
them too, after ours, by the same clients.
"""

from __future__ import annotations

import secrets
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from ..engine import Finch
from ..errors import FinchError, InputError
from ..prompts.builder import INSTRUCTIONS
from ..prompts.passages import Passage
from ..serve.settings import ServeSettings
from ..terminal.loading import load_finch
from ..terminal.output import cell, out, say_json
from ..terminal.progress import ProgressBars
from .load_client import Asked, serve_orders
from .load_other import other_server
from .memory import in_use, peak_memory
from .serving import clients as clients_of
from .serving import served
from .shapes import SHAPES, made_passages, random_finch, random_passages

_STORE = "load"
_HEADS = ("first token p50", "p99", "end p50", "p99", "new tokens")


@dataclass(frozen=True, slots=True)
class _Question:
    """What a client asks, and the passages that it brings along."""

    text: str
    passages: Sequence[Passage]


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
    rounds: int | None = None,
    running: int = 16,
    compile_layers: bool = False,
    against: str | None = None,
    against_model: str | None = None,
) -> dict[str, Any]:
    """Asks with each number of clients, prints tables and, as the last line, one JSON object.

    Args:
        model: What `Finch.from_pretrained` takes.
        shape: Of `finch_rag.bench.shapes.SHAPES`: random weights in place of ``model``.
        clients: Numbers of clients.
        requests: Questions; as many as there are clients at the least.
        tokens: Of the passages that each request brings along, different ones each.
        store_tokens: Of a store that all ask in place of passages of their own; 0 for none.
        new_tokens: The most tokens of an answer.
        budget: Document tokens kept; the engine's default when None.
        rounds: Scans of the best passages, see `finch_rag.prefill.planning.ReadingSettings`; None for the default.
        running: The most answers that the server makes at once.
        compile_layers: See `finch_rag.Finch`.
        against: Another running server, such as http://127.0.0.1:8000/v1, that is asked the same questions.
        against_model: What it calls the model; None for the only one that it has.

    Returns:
        What the JSON line holds.

    Raises:
        InputError: If an argument cannot work.
        FinchError: If a server does not answer.
    """
    if not clients or min(*clients, requests, tokens, new_tokens, running) < 1:
        raise InputError("clients, requests, tokens, new tokens and running must be at least 1")
    if shape is not None and shape not in SHAPES:
        raise InputError(f"shape {shape!r} is unknown: use {', '.join(SHAPES)}")
    if against_model is not None and against is None:
        raise InputError(f"--against-model is {against_model!r}, and no server is named: name it by --against")
    other = None if against is None else other_server(against, against_model)
    with ProgressBars() as bars:
        finch = _random(shape, compile_layers) if shape else load_finch(model, bars, compile_layers=compile_layers)
        device = finch.runtime.model.device
        questions = _questions(finch, max(requests, *clients), 0 if store_tokens else tokens)
        shared = _passages(finch, store_tokens) if store_tokens else []
        bodies = [_body(question, new_tokens, budget=budget, rounds=rounds) for question in questions]
        with (
            tempfile.TemporaryDirectory() as folder,
            served(finch, ServeSettings(stores=Path(folder), running=running, waiting=len(bodies))) as server,
            clients_of(serve_orders, f"{server.url}/v1/chat/completions") as ask,
        ):
            if store_tokens:
                server.service.shelf.create(_STORE, "bfloat16")
                server.service.shelf.store(_STORE).add(
                    shared, on_progress=lambda done, total: bars("store", done, total)
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
                different = _different(found, alone)
                rows[str(number)] = {**_figures(seconds, found), "different": different, "peak_mib": round(peak[0])}
            bars("clients", len(clients), len(clients))
    summary: dict[str, Any] = {
        "model": f"{shape} (random weights)" if shape else model,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else str(device),
        "passages": f"a store of {store_tokens} tokens" if store_tokens else f"{tokens} tokens a request",
        **{"new_tokens": new_tokens, "budget": budget, "rounds": rounds, "running": running},
        **{"compile_layers": compile_layers, "clients": rows},
    }
    _print(summary)
    if other is not None:  # what ours did stands there by now, whatever becomes of the other

        def prompts(count: int) -> list[dict[str, Any]]:
            return _plain_bodies(finch, other.model, questions[:count], shared, new_tokens)

        theirs = _ask_other(other.url, prompts, clients, requests)
        summary["against"] = {"url": other.url, "model": other.model, "clients": theirs}
        _print_against(summary)
    say_json(summary)
    return summary


def _ask_other(
    url: str, prompts: Callable[[int], list[dict[str, Any]]], clients: Sequence[int], requests: int
) -> dict[str, dict[str, Any]]:
    """The figures of another server, behind one request that warms it.

    Args:
        url: What its endpoints' addresses begin with.
        prompts: Makes so many requests.
        clients: Numbers of clients.
        requests: Questions.
    """
    rows: dict[str, dict[str, Any]] = {}
    with ProgressBars() as bars, clients_of(serve_orders, f"{url}/chat/completions") as ask:
        try:
            _check_answered(ask((prompts(1), 1))[1])
            for step, number in enumerate(clients):
                bars("clients", step, len(clients))
                rows[str(number)] = _figures(*ask((prompts(max(requests, number)), number)))
        except FinchError as error:
            raise FinchError(f"{url}: {error}") from error
        bars("clients", len(clients), len(clients))
    return rows


def _random(shape: str, compile_layers: bool) -> Finch:
    """An engine with random weights, each of whose tokens shows as a letter: else the first one could not be seen."""
    finch = random_finch(shape, compile_layers)
    finch.runtime.prompts.decode = lambda token_ids: "".join(chr(97 + token % 26) for token in token_ids)  # type: ignore[method-assign]
    return finch


def _questions(finch: Finch, count: int, tokens: int) -> list[_Question]:
    """Different questions, each with different passages of so many tokens."""
    passages = _passages(finch, tokens) if tokens else []
    return [
        _Question(
            f"What do the passages say about number {number}?",
            [Passage(f"{number} {passage.text}", str(place)) for place, passage in enumerate(passages)],
        )
        for number in range(count)
    ]


def _body(question: _Question, new_tokens: int, **options: int | None) -> dict[str, Any]:
    """What our server is asked; a question without passages asks the store."""
    own: dict[str, Any] = {"finch": {name: value for name, value in options.items() if value is not None}}
    if not question.passages:
        own["store"] = _STORE
    return {
        "messages": [{"role": "user", "content": question.text}],
        "documents": [{"id": passage.id, "text": passage.text} for passage in question.passages],
        "max_tokens": new_tokens,
        "temperature": 0,
        **own,
    }


def _plain_bodies(
    finch: Finch, model: str, questions: Sequence[_Question], shared: Sequence[Passage], new_tokens: int
) -> list[dict[str, Any]]:
    """What another server is asked: the engine's own prompts as messages, with the store where it is asked.

    Many servers keep what they have read for prompts that begin alike. A store's passages they may know from before,
    as ours does; of a request's own passages they must not, so a mark that is new at each call stands before these.
    """
    own = finch.settings.prompt
    instructions = INSTRUCTIONS if own.instructions is None else own.instructions
    marked = instructions if shared else f"Run {secrets.token_hex(4)}.\n\n{instructions}"
    return [
        {
            "model": model,
            "messages": finch.prompts.messages(each.text, each.passages or shared, marked, own.system_prompt),
            "max_tokens": new_tokens,
            "temperature": 0,
        }
        for each in questions
    ]


def _passages(finch: Finch, tokens: int) -> list[Passage]:
    """Some that the model's tokenizer makes so many tokens of."""
    return random_passages(tokens) if len(finch.tokenizer) <= 256 else made_passages(finch, tokens)


def _figures(seconds: float, found: Sequence[Asked]) -> dict[str, Any]:
    _check_answered(found)
    return {
        "requests": len(found),
        "a_second": round(len(found) / seconds, 3),
        "first_p50": round(_quantile([asked.first for asked in found], 0.5), 3),
        "first_p99": round(_quantile([asked.first for asked in found], 0.99), 3),
        "last_p50": round(_quantile([asked.last for asked in found], 0.5), 3),
        "last_p99": round(_quantile([asked.last for asked in found], 0.99), 3),
        "new_tokens": round(statistics.fmean(asked.new_tokens for asked in found), 1),
    }


def _different(found: Sequence[Asked], alone: Sequence[Asked]) -> int:
    """How many answers are not those of the first number of clients."""
    texts = {asked.number: asked.text for asked in alone}
    return sum(texts.get(asked.number, asked.text) != asked.text for asked in found)


def _check_answered(found: Sequence[Asked]) -> None:
    failed = [asked for asked in found if asked.error or asked.status != 200]
    if failed:
        raise FinchError(f"{len(failed)} of {len(found)} requests failed, the first with {failed[0].error}")


def _quantile(values: Sequence[float], part: float) -> float:
    if len(values) == 1:
        return values[0]
    return statistics.quantiles(values, n=100, method="inclusive")[round(part * 100) - 1]


def _print(summary: dict[str, Any]) -> None:
    rows = summary["clients"]
    first = next(iter(rows.values()))["a_second"]
    title = f"{summary['model']} on {summary['device']}, {summary['passages']}"
    table = Table(title=cell(title, "table.title"))
    for head in ("clients", "requests/s", "times", *_HEADS, "other answers", "peak MiB"):
        table.add_column(head, justify="right")
    for number, row in rows.items():
        times, different = f"{row['a_second'] / first:.2f}", f"{row['different']} of {row['requests']}"
        table.add_row(number, f"{row['a_second']:.2f}", times, *_cells(row), different, str(row["peak_mib"]))
    out.print(table)


def _print_against(summary: dict[str, Any]) -> None:
    other = summary["against"]
    title = f"{other['model']} at {other['url']}, all passages in each prompt"
    table = Table(title=cell(title, "table.title"))
    for head in ("clients", "requests/s", "finch-rag's", "ratio", *_HEADS):
        table.add_column(head, justify="right")
    for number, row in other["clients"].items():
        theirs, ours = row["a_second"], summary["clients"][number]["a_second"]
        table.add_row(number, f"{theirs:.2f}", f"{ours:.2f}", f"{ours / theirs:.2f}", *_cells(row))
    out.print(table)


def _cells(row: dict[str, Any]) -> list[str]:
    seconds = [f"{row[key]:.2f} s" for key in ("first_p50", "first_p99", "last_p50", "last_p99")]
    return [*seconds, f"{row['new_tokens']:g}"]
