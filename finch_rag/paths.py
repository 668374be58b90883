"""Where finch-rag keeps files on the user's machine, and how it writes them: whole or not at all."""

from __future__ import annotations

import gzip
import hashlib
import os
import platform
import re
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO

from safetensors import SafetensorError

from .errors import FinchError, first_line

if sys.platform != "win32":
    import fcntl

_FOREIGN_AGE = 24 * 3600.0  # seconds after which what another machine was making is taken for left over
_SHOWN = 50  # characters of a place's name: names have 255 bytes at most
_MAKING = re.compile(r"\..+\.([0-9a-f]{8})\.\d+\.[0-9a-f]{8}", re.DOTALL)  # see `making`
# What earlier releases, and safetensors in a folder of finch-rag's own, left where they were killed.
_EARLIER = re.compile(r"\..+\.\d+\.[0-9a-f]{8}|\.tmp\w{6}|tmp\w{8}", re.DOTALL)


def cache_folder(part: str) -> Path:
    """A folder in the user's cache (``$XDG_CACHE_HOME`` or ``~/.cache``); it need not exist yet.

    Args:
        part: Name of the folder below ``finch-rag``.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "finch-rag" / part


@contextmanager
def making(place: Path) -> Iterator[Path]:
    """A new, empty folder beside a place, in which what belongs there is made; it is gone after the ``with`` block.

    It is locked as long as this process lives. What others left there that have died is removed first.

    Args:
        place: A file or folder, which need not exist; the folder that it is in is there.

    Raises:
        OSError: If the new folder cannot be made.
    """
    remove_leftovers(place.parent)
    while True:
        own = f"{_machine()}.{os.getpid()}.{secrets.token_hex(4)}"
        new = place.with_name(f".{place.name[:_SHOWN]}.{own}")
        new.mkdir()
        try:
            lock = _locked(new)
        except BlockingIOError:  # another process takes it for left over just now
            continue
        if new.is_dir() if lock is None else _is_at(lock, new):
            break
        if lock is not None:  # it has just been removed
            os.close(lock)
    try:
        yield new
    finally:
        shutil.rmtree(new, ignore_errors=True)
        if lock is not None:
            os.close(lock)


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A new file, whose place it takes at the end of the ``with`` block: no reader ever sees half of it.

    Where the block fails the new one is gone, and the old one is as it was. It is on the disk before it takes the old
    one's place, so a power cut leaves one of the two.

    Args:
        file: File to replace, or to make; its folder is there.

    Raises:
        OSError: If it cannot be written, whichever library finds that out.
    """
    with making(file) as folder:
        new = folder / file.name
        try:
            yield new
        except SafetensorError as error:
            raise OSError(str(error)) from error
        sync(new)
        new.replace(file)


def sync(file: Path) -> None:
    """Returns when a file, or what is in a folder, is on the disk.

    Args:
        file: The file or folder.

    Raises:
        OSError: If it cannot be written.
    """
    if file.is_dir() and os.name != "posix":  # there they cannot be opened
        return
    handle = os.open(file, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_leftovers(folder: Path) -> None:
    """Removes what processes left in a folder that died while they made something, see `making`.

    What is locked stays, and what another machine made in the last day: a lock may not be seen from here.

    Args:
        folder: It need not be there.
    """
    own = folder.is_relative_to(cache_folder(""))
    found: list[tuple[Path, bool]] = []  # and whether it was made on this machine, since it was started
    with suppress(OSError):
        for path in folder.iterdir():
            if match := _MAKING.fullmatch(path.name):
                found.append((path, match[1] == _machine()))
            elif own and _EARLIER.fullmatch(path.name):
                found.append((path, False))
    for left, is_ours in found:
        with suppress(OSError):
            is_old = time.time() - left.lstat().st_mtime > _FOREIGN_AGE
            if is_ours or is_old:
                _remove_if_free(left, is_old)


def _remove_if_free(left: Path, is_old: bool) -> None:
    if not left.is_dir() or left.is_symlink():
        if is_old:
            left.unlink()
        return
    lock = _locked(left)
    if lock is None:  # nobody can tell whether its maker lives
        if is_old:
            shutil.rmtree(left, ignore_errors=True)
        return
    shutil.rmtree(left, ignore_errors=True)
    os.close(lock)


def _locked(folder: Path) -> int | None:
    """A handle that locks a folder until it is closed; None where that cannot be done.

    Raises:
        BlockingIOError: If it is locked already.
    """
    if sys.platform == "win32":
        return None
    handle = -1
    try:
        handle = os.open(folder, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return handle
    except OSError as error:
        if handle >= 0:
            os.close(handle)
        if isinstance(error, BlockingIOError):
            raise
        return None


def _is_at(handle: int, folder: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), folder.stat())
    except OSError:
        return False


@cache
def _machine() -> str:
    """Names what can see this machine's locks: a running kernel, whatever its containers are called."""
    try:
        name = Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        name = platform.node()
    return hashlib.sha256(name.encode()).hexdigest()[:8]


@contextmanager
def replaced_lines(file: Path) -> Iterator[IO[str]]:
    """Gzipped text that takes the place of a file as a whole, see `replacing`.

    Args:
        file: File to write; its folder is made.

    Raises:
        OSError: If it cannot be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as new, gzip.open(new, "wt", encoding="utf-8") as lines:
        yield lines


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


@contextmanager
def told_where(
    what: str, place: Path, error: Callable[[str], FinchError], cure: str = "choose another folder"
) -> Iterator[None]:
    """An error of the system in the ``with`` block becomes one line that says what cannot be written, where and why.

    Args:
        what: What is written, in words, with its size where that is known.
        place: The file or folder.
        error: Makes the error.
        cure: What to do where space cannot be freed.

    Raises:
        FinchError: What ``error`` made.
    """
    try:
        yield
    except OSError as reason:
        told = reason.strerror or first_line(reason)
        raise error(f"{what} cannot be written to {place}: {told}; free space there, or {cure}") from reason
