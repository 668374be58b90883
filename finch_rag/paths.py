"""Where finch-rag keeps files on the user's machine, and how it writes them."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def cache_folder(part: str) -> Path:
    """A folder in the user's cache (``$XDG_CACHE_HOME`` or ``~/.cache``); it need not exist yet.

    Args:
        part: Name of the folder below ``finch-rag``.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "finch-rag" / part


def write_atomically(file: Path, text: str) -> None:
    """Writes a file so that no reader ever sees half of it.

    Args:
        file: File to write; its folder is made.
        text: Content, written as UTF-8.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as temporary:
            temporary.write(text)
        Path(name).replace(file)
    except BaseException:
        Path(name).unlink()
        raise
