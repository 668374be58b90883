"""What files say: plain or compressed, up to so many bytes of each and of all together."""

from __future__ import annotations

import gzip
import os
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from ..errors import CorpusError
from .files import shown

MAX_FILE_BYTES = 2**30
MAX_CORPUS_BYTES = 16 * 2**30

_PIECE = 2**20  # bytes that are read or expanded at once
# A file may have become another one since it was found: opening a pipe must not wait, nor take over a terminal.
_AT_ONCE = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)


class UnreadableError(Exception):
    """A file that cannot be read; the message, behind the file's name, says why."""


class Contents:
    """Reads files.

    Args:
        max_file_bytes: The most bytes of a file, when it is expanded.
        max_corpus_bytes: The most bytes of all of them.
    """

    def __init__(self, max_file_bytes: int = MAX_FILE_BYTES, max_corpus_bytes: int = MAX_CORPUS_BYTES) -> None:
        self._most_each, self._most = max_file_bytes, max_corpus_bytes
        self._left = max_corpus_bytes

    def text(self, file: Path) -> str:
        """A file's text, line ends as line feeds, without a byte order mark.

        Args:
            file: Compressed if its name ends in ``.gz``.

        Raises:
            UnreadableError: If it is not a file of text, or too large.
            CorpusError: If all that was read is too large.
        """
        try:
            content = self._bytes(file)
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UnreadableError(f"is not UTF-8 (byte {error.start})") from error
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UnreadableError("cannot be decompressed") from error
        except OSError as error:
            raise UnreadableError(f"cannot be read ({error.strerror})") from error
        self._left -= len(content)
        return text.replace("\r\n", "\n").replace("\r", "\n")

    def _bytes(self, file: Path) -> bytearray:
        content = bytearray()
        with _opened(file) as plain:
            self._check(file, os.fstat(plain.fileno()).st_size)
            source: Any = gzip.GzipFile(fileobj=plain) if file.name.lower().endswith(".gz") else plain
            while piece := source.read(_PIECE):
                content += piece
                self._check(file, len(content))
        return content

    def _check(self, file: Path, size: int) -> None:
        if size > self._most_each:
            raise UnreadableError(
                f"has more than {self._most_each:,} bytes (a larger max_file_bytes (--max-file-mib) reads it)"
            )
        if size > self._left:
            raise CorpusError(
                f"the corpus has more than {self._most:,} bytes, with {shown(str(file))}: pass a larger "
                "max_corpus_bytes (--max-corpus-mib), or a smaller corpus"
            )


@contextmanager
def _opened(file: Path) -> Iterator[IO[bytes]]:
    """A regular file, open to be read; devices, pipes and sockets are not even opened."""
    if stat.S_ISREG(file.stat().st_mode):
        with open(file, "rb", opener=lambda name, flags: os.open(name, flags | _AT_ONCE)) as opened:
            if stat.S_ISREG(os.fstat(opened.fileno()).st_mode):
                yield opened
                return
    raise UnreadableError("is no regular file")
