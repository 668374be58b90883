"""Where finch-rag keeps files on the user's machine, and how it writes them."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError


def cache_folder(part: str) -> Path:
    """A folder in the user's cache (``$XDG_CACHE_HOME`` or ``~/.cache``); it need not exist yet.

    Args:
        part: Name of the folder below ``finch-rag``.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "finch-rag" / part


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A new file beside a file, whose place it takes at the end of the ``with`` block: no reader ever sees half of it.

    Where the block fails the new one is gone, and the old one is as it was.

    Args:
        file: File to replace, or to make; its folder is there.

    Raises:
        OSError: If it cannot be written, whichever library finds that out.
    """
    new = file.with_name(f".{file.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        yield new
        new.replace(file)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    finally:
        with suppress(OSError):
            new.unlink(missing_ok=True)


def write_atomically(file: Path, text: str) -> None:
    """Writes a file so that no reader ever sees half of it.

    Args:
        file: File to write; its folder is made.
        text: Content, written as UTF-8.

    Raises:
        OSError: If it cannot be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as new:
        new.write_text(text, encoding="utf-8")
