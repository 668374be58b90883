"""JSON that others may have written, and JSON lines: an object a line."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from .errors import FinchError, escaped

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # escaped: a text that was read from UTF-8 has none itself

_MOST_BYTES = 2**20  # of a file of settings or figures


def parsed(text: str, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """What a JSON text says.

    Args:
        text: From anywhere.
        pairs: Makes an object of its keys and values; a dictionary when None.

    Raises:
        ValueError: If it is not JSON, or nested too deeply.
    """
    try:
        return json.loads(text, object_pairs_hook=pairs)
    except RecursionError as error:
        raise ValueError(f"it is nested too deeply: {error}") from error


def read_object(file: Path | Traversable) -> dict[str, Any]:
    """What a small JSON file says.

    Args:
        file: From anywhere.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is longer than a MiB, no text, not JSON, or nested too deeply.
        TypeError: If it is JSON, and no object.
    """
    if isinstance(file, Path) and file.exists() and not file.is_file():  # opening a pipe would wait for ever
        raise OSError(f"{file} is no file")
    with file.open("rb") as content:
        found = content.read(_MOST_BYTES + 1)
    if len(found) > _MOST_BYTES:
        raise ValueError(f"it is longer than {_MOST_BYTES:,} bytes")
    fields = parsed(found.decode("utf-8"))
    if not isinstance(fields, dict):
        raise TypeError(f"it is a JSON {type(fields).__name__}, and no object")
    return fields


def is_number(value: object) -> bool:
    """Whether a JSON value is a finite number that a float can hold.

    Args:
        value: Any.
    """
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number of hundreds of digits
        return False


def json_objects(name: str, text: str, error: type[FinchError], cure: str = "") -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers, from 1, and objects of a file's text; empty lines are passed over.

    Args:
        name: What to call the file in messages.
        text: Its content; line ends are line feeds.
        error: What to raise.
        cure: Ends the message: what a line should be.

    Raises:
        FinchError: Of the class ``error``, if a line is not a JSON object, holds what is no text, or has a key twice.
    """
    ending = f": {cure}" if cure else ""
    for number, line in enumerate(_lines(text), 1):
        if not line.strip():
            continue
        try:
            fields = parsed(line, _without_doubles)
            if _SURROGATE.search(line):
                json.dumps(fields, ensure_ascii=False).encode()  # "\ud800" is JSON, and no text
        except (ValueError, RecursionError) as reason:
            raise error(f"{name}, line {number} is not JSON: {reason}{ending}") from reason
        if not isinstance(fields, dict):
            kind = type(fields).__name__
            raise error(f"{name}, line {number} is a JSON {kind}: {cure or 'each line must be an object'}")
        yield number, fields


def _lines(text: str) -> Iterator[str]:
    """A text's lines, one by one: a list of them would take as much memory again."""
    start = 0
    while (end := text.find("\n", start)) >= 0:
        yield text[start:end]
        start = end + 1
    yield text[start:]


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; of a key that stands twice nobody could say which value is meant."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        double = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f'the key "{escaped(double[:60])}" stands twice')
    return fields


def complete_objects(text: str) -> Iterator[dict[str, Any]]:
    """The objects of lines that a program has written one by one; a line that was cut off is passed over.

    Args:
        text: JSON lines.
    """
    for line in _lines(text):  # JSON leaves U+2028 as it is, which splitlines takes for an end
        try:
            fields = parsed(line)
        except ValueError:
            continue
        if isinstance(fields, dict):
            yield fields
