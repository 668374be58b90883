"""The stores of a folder, each by its name."""

from __future__ import annotations

import re
import shutil
import threading
from pathlib import Path

from ..engine import Finch
from ..errors import SettingsError, StoreError
from ..store.figures import StoreInfo
from ..store.folder import StoreFolder
from ..store.reading import Precision
from ..store.storage import INDEX
from ..store.store import PassageStore
from .errors import ApiError, not_found, refused

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}(\.[A-Za-z0-9_-]{1,32})?")


class Shelf:
    """Stores, opened at their first use. Safe to share between threads; its calls may take long.

    Args:
        finch: Reads what they keep.
        folder: Holds a folder a store; made if it is missing. None holds none.

    Raises:
        SettingsError: If the folder cannot be made.
    """

    def __init__(self, finch: Finch, folder: Path | None) -> None:
        self._finch = finch
        self._folder = None if folder is None else folder.expanduser().resolve()
        self._open: dict[str, PassageStore] = {}
        self._lock = threading.RLock()
        if self._folder is not None:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise SettingsError(f"the folder of stores, {folder}, cannot be made: {error.strerror}") from error

    def names(self) -> list[str]:
        """The stores that there are.

        Raises:
            ApiError: 404 if the server has no folder of stores.
        """
        return sorted(path.name for path in self._root.iterdir() if self._is_store(path))

    def create(self, name: str, precision: Precision) -> StoreInfo:
        """A new store.

        Args:
            name: Its name.
            precision: Of its keys.

        Raises:
            ApiError: 400 if the name cannot be one; 409 if it is taken.
            StoreError: If it cannot be made.
        """
        with self._lock:
            path = self._path(name)
            if path.exists():
                raise ApiError(409, f"the store {name!r} exists: delete it, or use another name", param="name")
            self._open[name] = self._finch.open_store(path, precision=precision)
            return self._open[name].info()

    def store(self, name: str) -> PassageStore:
        """An open store.

        Args:
            name: Its name.

        Raises:
            ApiError: 404 if there is none.
            StoreError: If it cannot be opened.
        """
        with self._lock:
            path = self._existing(name)
            store = self._open.get(name)
            if store is None or store.closed:
                precision: Precision = "int8" if self._looked_at(path).precision == "int8" else "bfloat16"
                store = self._open[name] = self._finch.open_store(path, precision=precision)
            return store

    def info(self, name: str) -> StoreInfo:
        """What a store holds; it is not opened for that.

        Args:
            name: Its name.

        Raises:
            ApiError: 404 if there is none.
        """
        with self._lock:
            path = self._existing(name)
            store = self._open.get(name)
            return self._looked_at(path) if store is None or store.closed else store.info()

    def delete(self, name: str) -> None:
        """Deletes a store with all that it holds. An answer that is being made from it fails.

        Args:
            name: Its name.

        Raises:
            ApiError: 404 if there is none.
            StoreError: If its folder cannot be removed.
        """
        with self._lock:
            path = self._existing(name)
            if (store := self._open.pop(name, None)) is not None:
                store.close()
            try:
                shutil.rmtree(path)
            except OSError as error:
                raise StoreError(f"the store {name!r} cannot be removed: {error.strerror}") from error

    def close(self) -> None:
        """Closes all that are open."""
        with self._lock:
            while self._open:
                self._open.popitem()[1].close()

    @property
    def _root(self) -> Path:
        if self._folder is None:
            raise not_found("this server keeps no stores: start it with --store DIR")
        return self._folder

    def _path(self, name: str) -> Path:
        if not _NAME.fullmatch(name):
            raise refused(
                f"the store's name is {name[:70]!r}: use up to 64 letters, digits, - and _, beginning with a letter or "
                "digit, and one dot at most",
                "store",
            )
        return self._root / name

    def _existing(self, name: str) -> Path:
        path = self._path(name)
        if not self._is_store(path):
            raise not_found(f"there is no store {name!r}: make it with POST /v1/stores", "store", "store_not_found")
        return path

    def _is_store(self, path: Path) -> bool:
        return bool(_NAME.fullmatch(path.name)) and not path.is_symlink() and (path / INDEX).is_file()

    def _looked_at(self, path: Path) -> StoreInfo:
        with StoreFolder(path) as folder:
            return folder.info()
