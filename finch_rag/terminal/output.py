"""What is shown on the terminal: results on stdout, notes and errors on stderr."""

from __future__ import annotations

import io
import json
import logging
import sys
from typing import Any

from rich.console import Console
from rich.text import Text

from ..errors import escaped

_PIPE_WIDTH = 160  # rich takes 80 where there is no terminal, which is too narrow for long ids

if isinstance(sys.stdout, io.TextIOWrapper):  # a pipe or terminal that has not all characters; stderr is so by itself
    sys.stdout.reconfigure(errors="backslashreplace")

out = Console(highlight=False, width=None if sys.stdout.isatty() else _PIPE_WIDTH)
err = Console(stderr=True, highlight=False)


def printable(text: str) -> str:
    """A text of several lines without what would steer the terminal: passages and answers must not."""
    return escaped(text, keep="\n\t")


def cell(text: str, style: str = "") -> Text:
    """A text of one line, such as an id or a path, for a table: no markup, and nothing that would steer the terminal.

    Args:
        text: From anywhere.
        style: Of rich.
    """
    return Text(escaped(text), style=style)


def say(text: str = "", style: str = "") -> None:
    """Writes a line of plain text to stdout, wrapped only on a terminal."""
    out.print(cell(text, style), soft_wrap=not out.is_terminal)


def say_lines(text: str) -> None:
    """Writes a text of one or more lines to stdout, such as an answer."""
    out.print(Text(printable(text)), soft_wrap=not out.is_terminal)


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
