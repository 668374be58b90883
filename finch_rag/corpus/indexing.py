"""Keeps a store as a corpus is: what is new or changed is read, what is gone is removed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError
from ..prompts.passages import Passage

if TYPE_CHECKING:
    from ..store.store import PassageStore, StoreProgress

_CORPUS = "corpus"  # a passage's metadata: the path of the corpus that it is of


@dataclass(frozen=True, slots=True)
class Indexed:
    """What `index_corpus` did.

    Attributes:
        passages: Passages of the corpus.
        known_tokens: Tokens of those that had been read before.
        read_tokens: Tokens of those that were read now.
        removed: Passages that were removed, because the corpus does not have them any more.
    """

    passages: int
    known_tokens: int
    read_tokens: int
    removed: int


def index_corpus(
    store: PassageStore,
    corpus: Path,
    passages: Sequence[Passage],
    on_progress: StoreProgress = lambda done, total: None,
) -> Indexed:
    """Adds a corpus to a store, which may hold others.

    Args:
        store: The store.
        corpus: The file or folder; passages that it had at an earlier call and has no more are removed.
        passages: What was read of it.
        on_progress: See `finch_rag.PassageStore.add`.

    Raises:
        InputError: If an id is known to the store from elsewhere: the passage would take the other one's place.
        StoreError: If the store cannot be written.
    """
    path = str(corpus.resolve())
    stored = {passage.id: passage.metadata.get(_CORPUS) for passage in store.passages() if passage.id is not None}
    wanted = {passage.id for passage in passages}
    if foreign := sorted(own for own in wanted if own in stored and stored[own] != path):
        others = stored[foreign[0]] or "another program"
        raise InputError(
            f"{len(foreign)} of {len(passages)} ids are in the store from {others}, such as {foreign[0]!r}: use a "
            "store of its own for this corpus"
        )
    marked = [replace(passage, metadata={**passage.metadata, _CORPUS: path}) for passage in passages]
    added = store.add(marked, on_progress)
    gone = [own for own, origin in stored.items() if origin == path and own not in wanted]
    if gone:
        store.remove(gone)
    return Indexed(len(passages), added.known_tokens, added.read_tokens, len(gone))
