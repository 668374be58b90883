"""What the command line shows: results on stdout, progress and notes on stderr."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from .report import Citation, CompressionReport

_PIPE_WIDTH = 160  # rich takes 80 where there is no terminal, which is too narrow for long ids

out = Console(highlight=False, width=None if sys.stdout.isatty() else _PIPE_WIDTH)
err = Console(stderr=True, highlight=False)

_STAGES = {
    "embed": "indexing passages",
    "heads": "finding retrieval heads",
    "prefill": "reading passages",
    "questions": "questions",
}


def printable(text: str) -> str:
    """Text without control characters: passages and answers must not steer the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def say(text: str = "", style: str = "") -> None:
    """Writes a line of plain text to stdout, wrapped only on a terminal."""
    out.print(Text(printable(text), style=style), soft_wrap=not out.is_terminal)


def say_delta(delta: str) -> None:
    """Writes a piece of an answer to stdout as it comes."""
    sys.stdout.write(printable(delta))
    sys.stdout.flush()


def say_json(value: dict[str, Any]) -> None:
    """Writes one line of JSON to stdout, in ASCII, whatever the terminal's encoding."""
    sys.stdout.write(json.dumps(value) + "\n")


def show_error(error: BaseException) -> None:
    """Writes an error to stderr as one red line."""
    err.print(Text("Error: " + " ".join(printable(str(error)).split()), style="red"), soft_wrap=True)


def note(message: str) -> None:
    """Writes a remark to stderr as one yellow line."""
    err.print(Text("Note: " + " ".join(printable(message).split()), style="yellow"), soft_wrap=True)


class _Notes(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        note(record.getMessage())


def show_log() -> None:
    """Shows what the package logs, such as the conversion of a model at its first use, as notes."""
    logging.getLogger("finch_rag").handlers = [_Notes(logging.WARNING)]


class ProgressBars:
    """Progress on stderr while its ``with`` block runs; nothing at all when stderr is not a terminal.

    The bars appear at the first call and are cleared at the end of a stage.

    Args:
        remaining: Show the time that is left instead of the time that has passed.
    """

    def __init__(self, remaining: bool = False) -> None:
        columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[steps]}")
        self._bars = Progress(
            *columns,
            TimeRemainingColumn() if remaining else TimeElapsedColumn(),
            console=err,
            transient=True,
            disable=not err.is_terminal,
            redirect_stdout=False,
        )
        self._tasks: dict[str, Any] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Shows how far a stage is; a `finch_rag.options.Progress`."""
        self._bars.start()
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(_STAGES.get(stage, stage), steps="")
        steps = f"{done:,}/{total:,}" if done else ""
        self._bars.update(self._tasks[stage], completed=done, total=total, visible=done < total, steps=steps)

    @contextmanager
    def busy(self, what: str) -> Iterator[None]:
        """Shows that something of unknown length goes on."""
        self._bars.start()
        task = self._bars.add_task(what, total=None, steps="")
        try:
            yield
        finally:
            self._bars.remove_task(task)

    def stop(self) -> None:
        """Clears the bars, so that stdout is free; may be called more than once."""
        self._bars.stop()

    def __enter__(self) -> ProgressBars:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()


def citations_table(citations: Iterable[Citation]) -> Table:
    """Passages by falling share of the question's attention, with the rank that the retriever gave them."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("rank", "retrieved", "passage", "title", "attention", "kept"):
        right = heading not in ("passage", "title")
        # In a narrow terminal titles are wrapped before ids are cut.
        table.add_column(heading, justify="right" if right else "left", no_wrap=heading != "title")
    for rank, citation in enumerate(citations, 1):
        row = (
            str(rank),
            str(citation.index + 1),
            citation.passage_id or "",
            citation.title or "",
            f"{citation.share:.1%}",
            f"{citation.kept_tokens:,}/{citation.passage_tokens:,}",
        )
        table.add_row(*(Text(printable(cell)) for cell in row))
    return table


def report_table(report: CompressionReport) -> Table:
    """What a call read, kept and cost, in three lines."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    read, kept = _count(report.context_tokens, "token"), _count(report.kept_tokens, "token")
    lines = {
        "read": f"{read} of {_count(report.passages, 'passage')} in {_count(report.chunks, 'chunk')}, "
        f"{report.prefill_seconds:.1f} s",
        "kept": f"{kept} of {_count(report.passages_kept, 'passage')}, {report.compression_factor:.1f} times fewer; "
        f"KV cache {_mib(report.kv_bytes_kept)} instead of {_mib(report.kv_bytes_full)} MiB",
        "answered": f"{_count(report.new_tokens, 'token')}, {report.decode_seconds:.1f} s, by {report.model}",
    }
    for name, text in lines.items():
        table.add_row(name, Text(printable(text)))
    return table


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f}"
