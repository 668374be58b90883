"""The header of a GGUF file, looked at before anything is built from it.

What reads such files believes their counts: one flipped bit makes it build layers, or read list items, without end.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

from ..errors import ModelError

_VERSIONS = (2, 3)
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of numbers, by their types
_FORMS = {2: "H", 4: "I", 5: "i", 10: "Q", 11: "q"}  # of types that counts have
_TEXT, _LIST = 8, 9
_LEAST_OF_TENSOR = 32  # bytes: the lengths, type and place of one without name and with one dimension
_DEEPEST = 4  # lists in lists
_PARTS = "split.count"  # files that a model is spread over: the first has the metadata of all, and maybe no tensor
_ARCHITECTURE, _BLOCKS = "general.architecture", "block_count"
_COUNTS = (_BLOCKS, "embedding_length", "feed_forward_length", "head_count", "head_count_kv", "vocab_size")


def check_gguf(file: Path) -> None:
    """Raises a ModelError where a file's header counts more than the file can hold.

    A file that is no GGUF, or of a version that is not known here, is left to what reads it.

    Args:
        file: It is there.

    Raises:
        ModelError: If the header is damaged, or the file was cut inside it.
    """
    if file.stat().st_size < struct.calcsize("<4sIQQ"):
        return
    with file.open("rb") as content, mmap.mmap(content.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:4] != b"GGUF":
            return
        order = next((o for o in "<>" if struct.unpack_from(f"{o}I", data, 4)[0] in _VERSIONS), None)
        if order is None:
            return
        try:
            _Header(data, order).check()
        except (_DamagedError, struct.error) as error:
            reason = f"{error}, and " if isinstance(error, _DamagedError) else "it is cut inside its header: "
            raise ModelError(
                f"the GGUF file {file.name} is damaged: {reason}the file has {len(data)} bytes; download it again"
            ) from error


class _DamagedError(Exception):
    """The header cannot be; the message says what it claims."""


class _Header:
    """Walks through a header.

    Args:
        data: The file.
        order: Of its bytes, as `struct` writes it.
    """

    def __init__(self, data: mmap.mmap, order: str) -> None:
        self._data, self._order, self._place = data, order, 8
        self._long = struct.Struct(f"{order}Q")

    def check(self) -> None:
        """Raises a `_DamagedError`, or a `struct.error` at the file's end."""
        tensors, fields = self._count(), self._count()
        self._fits(fields, 12, "metadata fields")
        counts: dict[str, int] = {}
        architecture = ""
        for _ in range(fields):
            key, kind = self._text(), self._number("I", 4)
            if key == _ARCHITECTURE and kind == _TEXT:
                architecture = self._text()
                continue
            value = self._value(kind)
            if value is not None and (key == _PARTS or key.rpartition(".")[2] in _COUNTS):
                counts[key] = value
        self._fits(tensors, _LEAST_OF_TENSOR, "tensors")
        if counts.pop(_PARTS, 1) > 1:
            return
        if architecture and f"{architecture}.{_BLOCKS}" not in counts:  # as many as its family's largest would be built
            raise _DamagedError(f"it has no {architecture[:40]!r}.{_BLOCKS}")
        for key, value in counts.items():
            # Each block has tensors; each of the others is a side of one, whose elements take a bit at least.
            most = tensors if key.endswith(_BLOCKS) else 8 * len(self._data)
            if not 0 <= value <= most:
                raise _DamagedError(f"its {key} is {value}, its {tensors} tensors have room for {most}")

    def _value(self, kind: int, depth: int = 0) -> int | None:
        """Passes over a value; returns it if it is a whole number."""
        if kind == _TEXT:
            self._skip(self._count(), "bytes of text")
        elif kind == _LIST:
            self._list(depth)
        elif kind in _FORMS:
            return self._number(_FORMS[kind], _SIZES[kind])
        elif kind in _SIZES:
            self._skip(_SIZES[kind], "bytes")
        else:
            raise _DamagedError(f"it has a value of type {kind}, types end at 12")
        return None

    def _list(self, depth: int) -> None:
        kind, items = self._number("I", 4), self._count()
        if kind in _SIZES:
            self._skip(items * _SIZES[kind], "bytes of a list")
            return
        if depth == _DEEPEST:
            raise _DamagedError(f"it has lists in lists, deeper than {_DEEPEST}")
        self._fits(items, 8, "items of a list")
        if kind != _TEXT:
            for _ in range(items):
                self._value(kind, depth + 1)
            return
        place, read, end = self._place, self._long.unpack_from, len(self._data)
        for _ in range(items):  # hundreds of thousands of words
            place += 8 + read(self._data, place)[0]
            if place > end:
                raise _DamagedError(f"a word of a list ends at byte {place}")
        self._place = place

    def _count(self) -> int:
        return self._number("Q", 8)

    def _number(self, form: str, size: int) -> int:
        (number,) = struct.unpack_from(self._order + form, self._data, self._place)
        self._place += size
        return int(number)

    def _text(self) -> str:
        size, start = self._count(), self._place
        self._skip(size, "bytes of text")
        return self._data[start : start + size].decode(errors="replace")

    def _skip(self, size: int, what: str) -> None:
        self._fits(size, 1, what)
        self._place += size

    def _fits(self, count: int, size: int, what: str) -> None:
        if count * size > len(self._data) - self._place:
            raise _DamagedError(f"it has {count} {what} at byte {self._place}")
