"""Progress on the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..errors import escaped
from .output import err

_STAGES = {
    "embed": "indexing passages",
    "heads": "finding retrieval heads",
    "prefill": "reading passages",
    "store": "reading passages once",
    "questions": "questions",
}


class ProgressBars:
    """Progress on stderr while its ``with`` block runs; nothing at all when stderr is not a terminal.

    The bars appear at the first call and are cleared at the end of a stage.

    Args:
        remaining: Show the time that is left instead of the time that has passed.
    """

    def __init__(self, remaining: bool = False) -> None:
        what, steps = (TextColumn(f"{{task.{part}}}", markup=False) for part in ("description", "fields[steps]"))
        columns = SpinnerColumn(), what, BarColumn(), steps
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
        """Shows how far a stage is; a `finch_rag.request.Progress`."""
        self._bars.start()
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(escaped(_STAGES.get(stage, stage)), steps="")
        steps = f"{done:,}/{total:,}" if done else ""
        self._bars.update(self._tasks[stage], completed=done, total=total, visible=done < total, steps=steps)

    @contextmanager
    def busy(self, what: str) -> Iterator[None]:
        """Shows that something of unknown length goes on."""
        self._bars.start()
        task = self._bars.add_task(escaped(what), total=None, steps="")
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
