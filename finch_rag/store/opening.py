"""The stores that an engine has open, each once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from .store import PassageStore

StorePlace = PassageStore | str | Path | bool | None
"""An open store, a folder, True for one in memory, None or False for none."""


class OpenStores:
    """The stores of one engine by their places. Safe to share between threads.

    Args:
        open_store: Opens one in a folder, or in memory for None.
    """

    def __init__(self, open_store: Callable[[Path | None], PassageStore]) -> None:
        self._open, self._lock = open_store, threading.Lock()
        self._stores: dict[Path | None, PassageStore] = {}

    def at(self, place: StorePlace) -> PassageStore | None:
        """The store at a place: opened at the first call, or again once it was closed; None where there is none.

        Args:
            place: Where it is; an open store is handed back.

        Raises:
            StoreError: If it cannot be opened.
        """
        if place is None or place is False:
            return None
        if isinstance(place, PassageStore):
            return place
        folder = None if place is True else Path(place).expanduser().resolve()
        with self._lock:
            store = self._stores.get(folder)
            if store is None or store.closed:
                store = self._stores[folder] = self._open(folder)
            return store
