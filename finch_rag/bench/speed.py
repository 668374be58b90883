"""Seconds and memory of reading a document: Finch against one plain forward pass, and against kvpress.

Every case (a method at a length) runs in a process of its own, so that its peak memory is its own. On a CPU the
processes stay alive and take turns, so that a noisy machine disturbs all cases alike; on an accelerator they run one
after another, because their weights would not fit side by side.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from ..errors import FinchError, InputError
from ..models.loading import resolve_device
from ..terminal.output import cell, out, say, say_json
from .readings import STORE_SHORTLISTS, check_methods
from .shapes import SHAPES
from .timing import Measurement, Run, SkippedError, SpeedCase

DEFAULT_METHODS = ("full", "finch")
_ALWAYS = {"prefill_seconds", "first_token_seconds", "decode_ms", "peak_mib"}
_TIME_TO_END = 10.0  # seconds that a failed process has to leave its exit code


def main(
    model: str = "embedded",
    tokens: Sequence[int] = (8192, 32768),
    budget: int = 512,
    chunk_size: int | None = None,
    repeats: int = 3,
    methods: Sequence[str] = DEFAULT_METHODS,
    shape: str | None = None,
    plot: Path | None = None,
) -> dict[str, Any]:
    """Runs all cases, prints a table and, as the last line, one JSON object.

    Args:
        model: What `Finch.from_pretrained` takes.
        tokens: Lengths of the passages.
        budget: Finch's budget.
        chunk_size: Finch's chunk size; the engine's default when None.
        repeats: Runs of each case; medians are reported.
        methods: Of `finch_rag.bench.readings.READINGS`. One is left out where window or memory is too small for it.
        shape: Of `finch_rag.bench.shapes.SHAPES`: random weights in place of ``model``.
        plot: Where to draw seconds and memory against length; not at all when None.

    Returns:
        What the JSON line holds.

    Raises:
        InputError: If an argument cannot work.
    """
    if repeats < 1 or not tokens or min(tokens) < 1:
        raise InputError(f"tokens {list(tokens)} at {repeats} repeats measure nothing: both must be at least 1")
    check_methods(methods)
    if shape is not None and shape not in SHAPES:
        raise InputError(f"shape {shape!r} is unknown: use {', '.join(SHAPES)}")
    if plot is not None:
        from . import plots  # not needed without

        plots.check(plot)
    cases = [
        SpeedCase(
            method=method,
            tokens=length,
            model="" if shape else model,
            shape=shape or "",
            budget=budget,
            chunk_size=chunk_size,
        )
        for length in tokens
        for method in methods
    ]
    rows = []
    for case, result in _measure(cases, repeats):
        if isinstance(result, str):
            rows.append({"method": case.method, "tokens": case.tokens, "skipped": result})
            continue
        rows.append({"method": case.method, "tokens": case.tokens, **_medians(result)})
    summary = {
        "model": f"{shape} (random weights)" if shape else model,
        "device": _device(),
        "threads": torch.get_num_threads(),
        "budget": budget,
        "repeats": repeats,
        "cases": rows,
        "ratios": ratios(rows),
    }
    _print(summary)
    if plot is not None:
        plots.plot_speed(summary, plot)
    say_json(summary)
    return summary


def _medians(runs: Sequence[Run]) -> dict[str, float]:
    """The median of each figure that there is; 0 stands for one that the method does not have."""
    found = {}
    for name in asdict(runs[0]):
        values = [value for run in runs if (value := asdict(run)[name])]
        if values or name in _ALWAYS:
            found[name] = round(statistics.median(values or [0.0]), 3)
    return found


def _measure(cases: Sequence[SpeedCase], repeats: int) -> Iterator[tuple[SpeedCase, list[Run] | str]]:
    """Runs cases in processes; a string says why a case was left out."""
    at_once = len(cases) if resolve_device("auto").type == "cpu" else 1
    for start in range(0, len(cases), at_once):
        group = cases[start : start + at_once]
        workers = [_Worker(case) for case in group]
        try:
            results: list[list[Run]] = [[] for _ in group]
            for round_number in range(repeats):
                for case, worker, runs in zip(group, workers, results, strict=True):
                    if worker.reason is None:
                        _say(f"{case.method} on {case.tokens:,} tokens, run {round_number + 1} of {repeats}")
                        if (run := worker.run()) is not None:
                            runs.append(run)
            for case, worker, runs in zip(group, workers, results, strict=True):
                yield case, worker.reason or runs
        finally:
            for worker in workers:
                worker.stop()


class _Worker:
    """A process that holds one case."""

    def __init__(self, case: SpeedCase) -> None:
        context = get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(case, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self.reason: str | None = self._receive()

    def run(self) -> Run | None:
        """Measures once; None, with a reason, where the device has not the memory."""
        self._pipe.send("run")
        answer = self._receive()
        if isinstance(answer, Run):
            return answer
        self.reason = answer
        return None

    def stop(self) -> None:
        self._pipe.close()
        self._process.join()

    def _receive(self) -> Any:
        try:
            answer = self._pipe.recv()
        except EOFError as error:
            self._process.join(_TIME_TO_END)
            code = self._process.exitcode
            raise FinchError(f"a measuring process ended with exit code {code}; what it said is above") from error
        if isinstance(answer, FinchError):
            raise answer
        return answer


def _serve(case: SpeedCase, pipe: Connection) -> None:
    """Body of a measuring process: loads, warms up, then measures whenever it is told to."""
    try:
        measurement = Measurement(case)
        pipe.send(None)
        while pipe.recv() == "run":
            pipe.send(measurement.run())
    except EOFError:
        return
    except SkippedError as reason:
        pipe.send(str(reason))
    except FinchError as error:
        pipe.send(error)


def ratios(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Finch over full at each length, a store over Finch, and Finch's growth from its shortest length to longer ones.

    Args:
        rows: Of the cases.
    """
    measured = {(row["method"], row["tokens"]): row for row in rows if "skipped" not in row}
    found = {}
    for (method, tokens), row in measured.items():
        if method in STORE_SHORTLISTS and ("finch", tokens) in measured:
            finch = measured["finch", tokens]
            found[f"seconds {method}/finch at {tokens}"] = row["first_token_seconds"] / finch["first_token_seconds"]
        if method == "finch" and ("full", tokens) in measured:
            full = measured["full", tokens]
            found[f"seconds finch/full at {tokens}"] = row["first_token_seconds"] / full["first_token_seconds"]
            found[f"memory finch/full at {tokens}"] = row["peak_mib"] / max(full["peak_mib"], 0.001)
    lengths = sorted(tokens for method, tokens in measured if method == "finch")
    for longer in lengths[1:]:
        short, long = measured["finch", lengths[0]], measured["finch", longer]
        found[f"seconds finch {longer}/{lengths[0]}"] = long["first_token_seconds"] / short["first_token_seconds"]
        found[f"memory finch {longer}/{lengths[0]}"] = long["peak_mib"] / max(short["peak_mib"], 0.001)
    return {name: round(value, 3) for name, value in found.items()}


def _print(summary: dict[str, Any]) -> None:
    title = f"{summary['model']}, {summary['device']}, budget {summary['budget']}, medians of {summary['repeats']}"
    table = Table(title=cell(title, "table.title"))
    columns = (
        "prefill (s)",
        "to first token (s)",
        "tokens/s",
        "decode (ms/token)",
        "peak memory (MiB)",
        "matrix share",
    )
    for name in ("method", "tokens", *columns):
        table.add_column(name, justify="left" if name == "method" else "right")
    for row in summary["cases"]:
        if "skipped" in row:
            figures = ["skipped", *[""] * (len(columns) - 1)]
        else:
            seconds = row["first_token_seconds"]
            rate = row["tokens"] / seconds
            figures = [f"{row['prefill_seconds']:.3f}", f"{seconds:.3f}", f"{rate:,.0f}", f"{row['decode_ms']:.1f}"]
            share = f"{row['matrix_share']:.0%}" if "matrix_share" in row else ""
            figures += [f"{row['peak_mib']:,.0f}", share]
        table.add_row(cell(row["method"]), f"{row['tokens']:,}", *figures)
    out.print(table)
    for row in summary["cases"]:
        if "skipped" in row:
            say(f"{row['method']} on {row['tokens']:,} tokens skipped: {row['skipped']}")
        if "add_seconds" in row:
            rate = row["tokens"] / row["add_seconds"]
            say(
                f"{row['method']} on {row['tokens']:,} tokens: the store had read them before at {rate:,.0f} tokens/s, "
                f"and keeps {row['bytes_per_token']:,.0f} bytes of each"
            )
    for name, value in summary["ratios"].items():
        say(f"{name}: {value:.2f}")


def _device() -> str:
    device = resolve_device("auto")
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _say(text: str) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{text}")
        sys.stderr.flush()
