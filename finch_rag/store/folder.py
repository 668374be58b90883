"""A store's folder without its model: what is in it, whether it is whole, and how to empty it."""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import StoreError
from .figures import StoreInfo
from .storage import Storage

_HEADS = re.compile(r"(\d{1,6}\.\d{1,6} ?)*", re.ASCII)


class StoreFolder:
    """A store in a folder, to be looked at and kept; asking it needs its model, see `finch_rag.Finch.open_store`.

    Args:
        path: The folder.
        writes: Whether it may be changed; then nobody else may write to it.

    Raises:
        StoreError: If there is no store in it, it cannot be opened, or it has another writer.
    """

    def __init__(self, path: str | Path, *, writes: bool = False) -> None:
        self.path = Path(path).expanduser()
        self._storage = Storage(self.path, None, writes=writes)

    def info(self) -> StoreInfo:
        """What it holds; ``max_bytes`` is not known without the engine that set it."""
        index = self._storage.index
        about, segments = index.about(), index.segments()
        written = about.get("heads", "")
        if not _HEADS.fullmatch(written):
            raise StoreError(f"the store in {self.path} is damaged, its heads are {written[:40]!r}: index anew")
        tokens = sum(reading.tokens for reading in index.readings())
        stored = sum(segment.tokens for segment in segments)
        per_token = round(sum(segment.bytes for segment in segments) / stored) if stored else 0
        pairs = (pair.split(".") for pair in written.split())
        return StoreInfo(
            path=str(self.path),
            passages=index.count(),
            tokens=tokens,
            nbytes=tokens * per_token,
            bytes_per_token=per_token,
            precision=about.get("precision", ""),
            heads=tuple((int(layer), int(head)) for layer, head in pairs),
            model=about.get("model", ""),
            max_bytes=None,
        )

    def verify(self, repair: bool = False) -> list[str]:
        """See `finch_rag.PassageStore.verify`.

        Args:
            repair: Remove what is damaged.
        """
        return self._storage.verify(repair)

    def clear(self) -> None:
        """Removes all passages."""
        self._storage.clear()

    def close(self) -> None:
        """Lets go of the folder."""
        self._storage.close()

    def __enter__(self) -> StoreFolder:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()
