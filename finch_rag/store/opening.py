"""The stores of an engine: how they are opened, and each of them once."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypedDict, get_args

from ..errors import SettingsError, StoreError
from ..heads.pairs import AloneHeads, check_alone_heads, heads_by_layer
from ..models.inspection import text_config
from ..models.parallel import TensorParallel
from ..prefill.alone import AloneReader
from ..prefill.planning import RetrievalHeads
from ..prompts.builder import PromptBuilder
from .reading import Precision
from .store import PassageStore

if TYPE_CHECKING:
    from transformers import PreTrainedModel

StorePlace = PassageStore | str | Path | bool | None
"""An open store, a folder, True for one in memory, None or False for none."""

HeadsProgress = Callable[[str, int, int], None]


class StoreOptions(TypedDict, total=False):
    """How a store is opened; see `finch_rag.Finch.open_store`."""

    max_bytes: int | None
    precision: Precision
    read_only: bool
    heads: AloneHeads


class StoreModel(Protocol):
    """What stores need of an engine's model."""

    model: PreTrainedModel
    prompts: PromptBuilder
    window: int

    @property
    def fingerprint(self) -> str:
        """Identifies the model."""

    def alone_reader(self, on_progress: HeadsProgress) -> AloneReader:
        """What reads passages alone, with the model's heads for that."""

    def reader_with(self, heads: RetrievalHeads) -> AloneReader:
        """What reads passages alone, with some heads."""


def no_progress(stage: str, done: int, total: int) -> None:
    """Tells nobody."""


class OpenStores:
    """Opens the stores of one engine, and has them by their places. Safe to share between threads.

    Args:
        model: Reads what they keep.
    """

    def __init__(self, model: StoreModel) -> None:
        self._has_model = weakref.ref(model)  # which has these stores: no circle shall keep its memory
        self._lock = threading.RLock()
        self._stores: dict[Path | None, PassageStore] = {}

    @property
    def _model(self) -> StoreModel:
        model = self._has_model()
        if model is None:
            raise StoreError("the engine of these stores is gone: keep it, or open the store with another one")
        return model

    def open(
        self,
        path: str | Path | None = None,
        *,
        max_bytes: int | None = None,
        precision: Precision = "bfloat16",
        read_only: bool = False,
        heads: AloneHeads = "auto",
        on_progress: HeadsProgress = no_progress,
    ) -> PassageStore:
        """See `finch_rag.Finch.open_store`.

        Args:
            path: See there.
            max_bytes: See there.
            precision: See there.
            read_only: See there.
            heads: See there.
            on_progress: Told of the stage "heads" where the model's have to be found.

        Raises:
            SettingsError: If a setting cannot work.
            StoreError: If the folder cannot be opened, has another writer, or is of another model or precision.
        """
        if precision not in get_args(Precision):
            raise SettingsError(f"precision is {precision!r}: use {' or '.join(map(repr, get_args(Precision)))}")
        if max_bytes is not None and (not isinstance(max_bytes, int) or isinstance(max_bytes, bool) or max_bytes < 1):
            raise SettingsError(f"max_bytes is {max_bytes!r}: pass a number of bytes above 0, or None")
        if path is not None and not isinstance(path, (str, Path)):
            raise SettingsError(f"path is {type(path).__name__}: pass a folder, or None for a store in memory")
        model = self._model
        if path is not None and not read_only and TensorParallel.of(model.model) is not None:
            raise SettingsError(
                f"several processes would write to {path}, which is not supported under tensor parallelism: fill the "
                "store by a model that is loaded with device_map, and open it with read_only=True"
            )
        check_alone_heads(heads, text_config(model.model), SettingsError)
        reader = model.alone_reader(on_progress) if isinstance(heads, str) else model.reader_with(heads_by_layer(heads))
        store = PassageStore(
            reader,
            model.prompts,
            model=model.fingerprint,
            window=model.window,
            path=path,
            max_bytes=max_bytes,
            precision=precision,
            read_only=read_only,
        )
        if store.path is not None and not read_only:
            with self._lock:  # calls that name its folder use it, as nobody else may write there
                self._stores[_folder(store.path)] = store
        return store

    def at(self, place: StorePlace, on_progress: HeadsProgress = no_progress) -> PassageStore | None:
        """The store at a place: opened at the first call, or again once it was closed; None where there is none.

        Args:
            place: Where it is; an open store is handed back.
            on_progress: See `open`.

        Raises:
            StoreError: If it cannot be opened, or is another model's.
        """
        if place is None or place is False:
            return None
        if isinstance(place, PassageStore):
            if place.model != self._model.fingerprint:
                raise StoreError(
                    f"the store was filled by another model ({place.model}, not {self._model.fingerprint}): open one "
                    "with this engine's open_store"
                )
            return place
        folder = None if place is True else _folder(place)
        with self._lock:
            store = self._stores.get(folder)
            if store is None or store.closed:
                store = self._stores[folder] = self.open(folder, on_progress=on_progress)
            return store


def _folder(path: str | Path) -> Path:
    return Path(path).expanduser().resolve()
