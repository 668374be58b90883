"""A layer over the file system whose n-th change below a folder fails, as on a full or read-only disk."""

from __future__ import annotations

import builtins
import errno
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.numpy
import safetensors.torch
from safetensors import SafetensorError

ERRORS = (errno.ENOSPC, errno.EIO, errno.EACCES, errno.EROFS)
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Faults:
    """Counts the changes below a folder, and makes one of them fail.

    Args:
        folder: Only what is below it counts.
        nth: The change that fails, from 1; so do all behind it, as on a disk that stays full.
        code: Of the error.

    Attributes:
        done: What was done to which file, in order.
        failed: Whether it came to the n-th change.
    """

    def __init__(self, folder: Path, nth: int, code: int) -> None:
        self._folder, self._nth, self._code = str(folder.resolve()), nth, code
        self.done: list[str] = []
        self.failed = False

    def counts(self, path: Any) -> bool:
        """Whether a path is below the folder."""
        try:
            return os.path.abspath(os.fspath(path)).startswith(self._folder)  # noqa: PTH100 - it may be bytes
        except (TypeError, ValueError):
            return False

    def change(self, what: str, path: Any) -> None:
        """Counts a change; raises if it is to fail."""
        self.done.append(f"{what} {os.path.basename(os.fspath(path))}")  # noqa: PTH119
        if len(self.done) >= self._nth:
            self.failed = True
            raise OSError(self._code, os.strerror(self._code), str(path))


class _FaultyFile:
    """A file opened for writing; what is written half goes to the disk before the error."""

    def __init__(self, faults: Faults, path: Any, file: Any) -> None:
        self._faults, self._path, self._file = faults, path, file

    def write(self, data: Any) -> int:
        try:
            self._faults.change("write", self._path)
        except OSError:
            self._file.write(data[: len(data) // 2])
            raise
        return int(self._file.write(data))

    def flush(self) -> None:
        self._faults.change("flush", self._path)
        self._file.flush()

    def __enter__(self) -> _FaultyFile:
        return self

    def __exit__(self, *raised: object) -> None:
        self._file.close()

    def __iter__(self) -> Iterator[Any]:
        return iter(self._file)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@contextmanager
def faulty(folder: Path, nth: int, code: int = errno.ENOSPC) -> Iterator[Faults]:
    """The n-th change of files below a folder, and all behind it, fail while the ``with`` block runs.

    Changes are: opening for writing, write, flush, fsync, rename, link, mkdir. Removing works, as it does on a full
    disk. What safetensors writes, in Rust, is a change too: half of it is on the disk when it fails.

    Args:
        folder: Only what is below it counts.
        nth: From 1.
        code: Of the error.
    """
    faults = Faults(folder, nth, code)
    handles: dict[int, Any] = {}
    real_open, real_io_open, os_open, os_fsync = builtins.open, io.open, os.open, os.fsync

    def opening(real: Callable[..., Any]) -> Callable[..., Any]:
        def open_file(file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
            if not set(mode) & set("wax+") or not faults.counts(file):
                return real(file, mode, *args, **options)
            faults.change("open", file)
            return _FaultyFile(faults, file, real(file, mode, *args, **options))

        return open_file

    def open_handle(path: Any, flags: int, *args: Any, **options: Any) -> int:
        if faults.counts(path) and flags & _WRITES:
            faults.change("open", path)
        handle = os_open(path, flags, *args, **options)
        handles[handle] = path
        return handle

    def fsync(handle: Any) -> None:
        number = handle if isinstance(handle, int) else handle.fileno()
        path = handles.get(number) or Path(f"/proc/self/fd/{number}").readlink()
        if faults.counts(path):
            faults.change("fsync", path)
        os_fsync(handle)

    def moving(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def move(source: Any, target: Any, **options: Any) -> Any:
            if faults.counts(target):
                faults.change(name, target)
            return real(source, target, **options)

        return move

    def mkdir(path: Any, *args: Any, **options: Any) -> None:
        if faults.counts(path) and not os.path.isdir(path):  # noqa: PTH112 - one that is there is no change
            faults.change("mkdir", path)
        os_mkdir(path, *args, **options)

    def saving(real: Callable[..., Any]) -> Callable[..., Any]:
        def save(tensors: Any, filename: Any, metadata: Any = None) -> None:
            if faults.counts(filename):
                try:
                    faults.change("save", filename)
                except OSError as error:
                    left = Path(filename).with_name(".tmpXyZ123")  # as it does where it is killed or cannot clean up
                    with real_open(left, "wb") as half:
                        half.write(b"half")
                    raise SafetensorError(f"Error while serializing: I/O error: {error.strerror}") from None
            real(tensors, filename, metadata=metadata)

        return save

    os_mkdir = os.mkdir
    import finch_rag.models.saved_cache
    import finch_rag.store.segments

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builtins, "open", opening(real_open))
        patch.setattr(io, "open", opening(real_io_open))
        patch.setattr(os, "open", open_handle)
        patch.setattr(os, "fsync", fsync)
        patch.setattr(os, "mkdir", mkdir)
        for name in ("replace", "rename", "link"):
            patch.setattr(os, name, moving(name))
        for module in (safetensors.torch, finch_rag.models.saved_cache, finch_rag.store.segments, safetensors.numpy):
            patch.setattr(module, "save_file", saving(module.save_file))
        yield faults
