"""The stores that an engine has open, each once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from ..errors import StoreError
from .store import PassageStore

StorePlace = PassageStore | str | Path | bool | None
"""An open store, a folder, True for one in memory, None or False for none."""


class OpenStores:
    """The stores of one engine by their places. Safe to share between threads.

    Args:
        open_store: Opens one in a folder, or in memory for None.
        model: Tells the fingerprint of the engine's model.
    """

    def __init__(self, open_store: Callable[[Path | None], PassageStore], model: Callable[[], str]) -> None:
        self._open, self._model, self._lock = open_store, model, threading.RLock()
        self._stores: dict[Path | None, PassageStore] = {}

    def at(self, place: StorePlace) -> PassageStore | None:
        """The store at a place: opened at the first call, or again once it was closed; None where there is none.

        Args:
            place: Where it is; an open store is handed back.

        Raises:
            StoreError: If it cannot be opened, or is another model's.
        """
        if place is None or place is False:
            return None
        if isinstance(place, PassageStore):
            if place.model != self._model():
                raise StoreError(
                    f"the store was filled by another model ({place.model}, not {self._model()}): open one with this "
                    "engine's open_store"
                )
            return place
        folder = None if place is True else _folder(place)
        with self._lock:
            store = self._stores.get(folder)
            if store is None or store.closed:
                store = self._stores[folder] = self._open(folder)
            return store

    def keep(self, store: PassageStore) -> None:
        """Lets calls that name a store's folder use it, as nobody else may write there.

        Args:
            store: Opened by this engine, in a folder, to be written.
        """
        if store.path is not None:
            with self._lock:
                self._stores[_folder(store.path)] = store


def _folder(path: str | Path) -> Path:
    return Path(path).expanduser().resolve()
