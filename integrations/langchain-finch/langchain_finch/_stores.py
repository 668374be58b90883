"""Stores in LangChain's objects: what tells one from another, how holders are copied, and what goes into a store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import SkipValidation, WithJsonSchema

from finch_rag import Passage, PassageStore, SettingsError
from finch_rag.adapters import StorePlace

# Checked by finch-rag's own rule, whose message is one line; the schema is for what LangChain says of its runnables.
StoreField = Annotated[StorePlace, SkipValidation, WithJsonSchema({"type": ["string", "boolean", "null"]})]

_DOCUMENT_ID = "finch_document_id"  # in the metadata of a passage whose text a prompt has made of a document's


class FormattedPassage(Passage):
    """A passage whose text a prompt has made of a document's: under the document's id it would take its place."""

    __slots__ = ()


class StoreHolder:
    """What has a field ``store``: copies share an open store, and nothing that is written down has one."""

    if TYPE_CHECKING:
        store: StorePlace

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Any:
        shared = {} if memo is None else memo
        if isinstance(self.store, PassageStore):
            shared[id(self.store)] = self.store
        return super().__deepcopy__(shared)  # type: ignore[misc]  # of pydantic's models

    def __getstate__(self) -> dict[Any, Any]:
        check_pickles(self.store, type(self).__name__)
        state: dict[Any, Any] = super().__getstate__()  # type: ignore[assignment]
        return state

    def to_json(self) -> Any:
        """As LangChain has it, without an open store; a folder or True stays."""
        written = super().to_json()  # type: ignore[misc]  # of LangChain's serialisable classes
        if isinstance(self.store, PassageStore):
            written.get("kwargs", {}).pop("store", None)
        return written


def check_pickles(place: StorePlace, what: str) -> None:
    """Raises where an open store would be pickled.

    Args:
        place: Of the store.
        what: Holds it.

    Raises:
        SettingsError: If it is open.
    """
    if isinstance(place, PassageStore):
        raise SettingsError(
            f"{what} with an open store cannot be pickled: pass store= as a folder, or True for one in memory, which "
            "is opened again where it is unpickled"
        )


def is_store(place: StorePlace) -> bool:
    """Whether there is a store; one without passages is false by itself."""
    return place is not None and place is not False


def store_identity(place: Any) -> Any:
    """What tells answers over one store from others in caches and traces: plain values, no object's address.

    An answer to given documents depends on how a store ranks, and not on what else it has.

    Args:
        place: Of the store.
    """
    if isinstance(place, PassageStore):
        folder = None if place.path is None else str(place.path.resolve())
        return {"folder": folder, "precision": place.precision, "heads": place.heads}
    if isinstance(place, (str, Path)):
        return str(Path(place).expanduser().resolve())
    return place if place is None or isinstance(place, bool) else type(place).__name__  # what is none raises later


def for_store(passages: Sequence[Passage]) -> list[Passage]:
    """Passages as a store may keep them: what a prompt has made of a document is known by its text.

    Under the document's id the store would forget the document's own text, and a retriever over it would hand out the
    prompt's, which the prompt would format again.

    Args:
        passages: Of a call.
    """
    return [
        Passage(passage.text, None, passage.title, {**passage.metadata, _DOCUMENT_ID: passage.id}, passage.score)
        if isinstance(passage, FormattedPassage)
        else passage
        for passage in passages
    ]


def is_formatted(metadata: Mapping[str, Any]) -> bool:
    """Whether a passage with this metadata is what `for_store` has made.

    Args:
        metadata: Of the passage.
    """
    return _DOCUMENT_ID in metadata


def document_id(passage: Passage) -> str | None:
    """The id of the document that a passage was made of.

    Args:
        passage: One that was read.
    """
    found: str | None = passage.metadata.get(_DOCUMENT_ID, passage.id)
    return found
