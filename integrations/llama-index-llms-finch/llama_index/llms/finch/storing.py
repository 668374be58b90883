"""An LLM that reads each passage once: which store it has, and which of its nodes a prompt is made of."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, Self

from llama_index.core.bridge.pydantic import Field, PrivateAttr

from finch_rag import Finch, Passage, PassageStore
from finch_rag.adapters import StorePlace

from .nodes import known_nodes
from .prompting import PromptedLLM
from .settings import split_store


class StoringLLM(PromptedLLM):
    """An LLM with a store for the passages that it has read."""

    store: str | bool | None = Field(default=None, description="Folder of passages read once; True for memory.")
    shortlist_tokens: int | None = Field(default=None, description="Tokens of the best passages that the loop scans.")

    _is_given: bool = PrivateAttr(default=False)  # the engine; else it can be loaded again
    _given_store: PassageStore | None = PrivateAttr(default=None)  # an open one, in place of a folder
    _opened_store: PassageStore | None = PrivateAttr(default=None)  # what was opened last

    @property
    @abstractmethod
    def engine(self) -> Finch:
        """The engine, loaded at the first use."""

    @property
    def store_place(self) -> StorePlace:
        """Where passages that were read are kept: a folder, True or an open store; None or False for nowhere."""
        if self._given_store is not None:  # an empty one is false
            return self._given_store
        return self.engine.settings.store if self.store is None and self._is_given else self.store

    def stores(self, call: Mapping[str, Any]) -> bool:
        """Whether a call has a store.

        Args:
            call: Its options.
        """
        asked = call.get("store")
        return (self.store_place if asked is None else asked) not in (None, False)

    def open_store(self) -> PassageStore | None:
        """The store, opened if need be, once for all LLMs on one engine; None where there is none.

        Raises:
            ModelError: If the model cannot be loaded.
            StoreError: If the store cannot be opened.
        """
        place = self.store_place
        if isinstance(place, PassageStore):
            self._opened_store = place
        else:
            self._opened_store = self.engine.runtime.stores.at(place) if place else None
        return self._opened_store

    def with_store(self, store: StorePlace) -> Self:
        """The same LLM with another store; this one for None, or where it is this one's.

        Args:
            store: See `FinchLLM`.

        Raises:
            SettingsError: If it is no store.
        """
        place, given = split_store(store)
        own_place, own_given = split_store(self.store_place)
        if store is None or (place == own_place and given is own_given):
            return self
        other = self.model_copy(update={"store": place})
        other._given_store, other._opened_store = given, None
        return other

    def known_passages(self, context: str) -> list[Passage] | None:
        """The passages of a context that is made of nodes from this LLM's store; None where it is not.

        Args:
            context: Nodes as LlamaIndex joins them.
        """
        store = self._opened_store if self._given_store is None else self._given_store
        return None if store is None else known_nodes(store).passages_of(context)
