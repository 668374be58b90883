"""FinchRetriever: the model's own retrieval heads search all nodes of a store; no embedding model."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.callbacks.base import CallbackManager
from llama_index.core.indices.base import BaseIndex
from llama_index.core.schema import BaseNode, IndexNode, NodeWithScore, QueryBundle
from llama_index.core.settings import Settings
from llama_index.core.storage.docstore.types import BaseDocumentStore

from finch_rag import InputError, PassageStore, SettingsError
from finch_rag.adapters import StorePlace

from .base import FinchLLM
from .nodes import known_nodes, node_of, passage_of
from .settings import split_store


class FinchRetriever(BaseRetriever):
    """Finds the nodes of a store that the question pays most attention to.

    A node's score is its share of the attention that the question pays to the whole store. The order is that of the
    scores, or with ``fuse`` the fused one.

    Args:
        store: An open `PassageStore`, a folder, or True for one in memory; the LLM's own when None.
        llm: A `FinchLLM`, which opens the store at its first use; ``Settings.llm`` when None and the store is not open.
        similarity_top_k: The most nodes to find.
        fuse: Other retrievers over the same nodes: their rankings and the store's are made one by reciprocal rank
            fusion. What they find that is not in the store is left out.
        fuse_k: The constant of the fusion.
        callback_manager: See `BaseRetriever`.
        object_map: See `BaseRetriever`.
        objects: See `BaseRetriever`.
        verbose: See `BaseRetriever`.

    Attributes:
        similarity_top_k: The most nodes to find.

    Raises:
        SettingsError: If there is no store, or a setting cannot work.
    """

    def __init__(
        self,
        store: StorePlace = None,
        llm: FinchLLM | None = None,
        similarity_top_k: int = 10,
        fuse: Sequence[BaseRetriever] = (),
        fuse_k: int = 20,
        callback_manager: CallbackManager | None = None,
        object_map: dict[str, Any] | None = None,
        objects: list[IndexNode] | None = None,
        verbose: bool = False,
    ) -> None:
        split_store(store)  # raises if it is none
        self._store: PassageStore | None = None
        self._llm: FinchLLM | None = None
        if isinstance(store, PassageStore):
            self._store = store
        else:
            self._llm = _with_store(llm if llm is not None else Settings.llm, store)
        for name, value in (("similarity_top_k", similarity_top_k), ("fuse_k", fuse_k)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise SettingsError(f"{name} is {value!r}: pass a whole number, the least is 1")
        if isinstance(fuse, BaseRetriever) or not isinstance(fuse, Sequence):
            raise SettingsError(f"fuse is {type(fuse).__name__}: pass a list of retrievers")
        if other := next((each for each in fuse if not isinstance(each, BaseRetriever)), None):
            raise SettingsError(f"fuse holds {type(other).__name__}: pass retrievers, such as index.as_retriever()")
        self.similarity_top_k = similarity_top_k
        self._fuse, self._fuse_k = list(fuse), fuse_k
        super().__init__(
            callback_manager=callback_manager or Settings.callback_manager,
            object_map=object_map,
            objects=objects,
            verbose=verbose,
        )

    @classmethod
    def from_nodes(cls, nodes: Iterable[BaseNode], **settings: Any) -> FinchRetriever:
        """A retriever over nodes, which are read now if the store does not know them.

        Args:
            nodes: The nodes.
            settings: The keyword arguments of `FinchRetriever`.
        """
        made = cls(**settings)
        made.add_nodes(nodes)
        return made

    @classmethod
    def from_defaults(
        cls,
        index: BaseIndex[Any] | None = None,
        nodes: Iterable[BaseNode] | None = None,
        docstore: BaseDocumentStore | None = None,
        **settings: Any,
    ) -> FinchRetriever:
        """A retriever over the nodes of an index or a docstore, or over nodes.

        Args:
            index: Its docstore must hold its nodes.
            nodes: The nodes.
            docstore: Holds the nodes.
            settings: The keyword arguments of `FinchRetriever`.

        Raises:
            SettingsError: If not exactly one of the three is given.
            InputError: If the docstore is empty.
        """
        given = [name for name, value in (("index", index), ("nodes", nodes), ("docstore", docstore)) if value]
        if nodes is not None:
            given = sorted({*given, "nodes"})
        if len(given) != 1:
            raise SettingsError(
                f"{len(given)} of index, nodes and docstore are given ({', '.join(given) or 'none'}): pass one of them"
            )
        if nodes is None:
            held = index.docstore if index is not None else docstore
            nodes = [] if held is None else [node for node in held.docs.values() if isinstance(node, BaseNode)]
            if not nodes:
                raise InputError(
                    f"the docstore of the {given[0]} has 0 nodes, as where a vector store keeps the texts: pass nodes="
                )
        return cls.from_nodes(nodes, **settings)

    @property
    def store(self) -> PassageStore:
        """The store, opened at the first use.

        Raises:
            ModelError: If the model cannot be loaded.
            StoreError: If the store cannot be opened.
        """
        if self._store is not None:
            return self._store
        opened = None if self._llm is None else self._llm.open_store()
        if opened is None:
            raise SettingsError("FinchRetriever has no store any more: its LLM's store was set to none")
        return opened

    def add_nodes(self, nodes: Iterable[BaseNode]) -> list[str]:
        """Adds nodes; those that are new, or whose text has changed, are read. A node without text is skipped.

        Args:
            nodes: The nodes, or documents that are read whole. A node whose id is known takes the other's place.

        Returns:
            The ids of all of them.

        Raises:
            InputError: If one is no node, or longer than the model's window.
            StoreError: If the store cannot be written.
        """
        items = [_with_score(node, place) for place, node in enumerate(_listed(nodes, "nodes", "nodes"))]
        self.store.add([passage_of(item) for item in items])
        return [item.node.node_id for item in items]

    async def aadd_nodes(self, nodes: Iterable[BaseNode]) -> list[str]:
        """Like `add_nodes`, for an event loop, which is not blocked.

        Args:
            nodes: See `add_nodes`.
        """
        return await asyncio.to_thread(self.add_nodes, nodes)

    def delete_nodes(self, node_ids: Iterable[str]) -> None:
        """Removes nodes.

        Args:
            node_ids: Their ids.

        Raises:
            InputError: If one of them is not there; then none is removed.
            StoreError: If the store cannot be written.
        """
        self.store.remove(_listed(node_ids, "node_ids", "ids"))

    async def adelete_nodes(self, node_ids: Iterable[str]) -> None:
        """Like `delete_nodes`, for an event loop, which is not blocked.

        Args:
            node_ids: See `delete_nodes`.
        """
        await asyncio.to_thread(self.delete_nodes, node_ids)

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return self._find(query_bundle.query_str, [other.retrieve(query_bundle) for other in self._fuse])

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        rankings = await asyncio.gather(*(other.aretrieve(query_bundle) for other in self._fuse))
        return await asyncio.to_thread(self._find, query_bundle.query_str, rankings)

    def _find(self, question: str, rankings: Sequence[Sequence[NodeWithScore]]) -> list[NodeWithScore]:
        store = self.store
        if not question.strip():  # of an empty store, too
            raise InputError("the query is empty: ask one")
        ids = [[item.node.node_id for item in ranking] for ranking in rankings]
        found = store.retrieve(question, self.similarity_top_k, ids, self._fuse_k)
        items = [NodeWithScore(node=node_of(each.passage), score=each.share) for each in found]
        known_nodes(store).remember(items)
        return items


def _with_store(llm: Any, store: StorePlace) -> FinchLLM:
    """The LLM that opens a store."""
    if not isinstance(llm, FinchLLM):
        raise SettingsError(
            f"FinchRetriever needs an open store, or a FinchLLM that opens one, not {type(llm).__name__}: pass store= "
            "or llm="
        )
    storing = llm.with_store(store)
    if storing.store_place in (None, False):
        raise SettingsError("there is no store: pass store= (a folder, or True for memory), or an LLM that has one")
    return storing


def _listed(items: Any, name: str, kind: str) -> list[Any]:
    if isinstance(items, (str, BaseNode, Mapping)) or not isinstance(items, Iterable):
        raise InputError(f"{name} is {type(items).__name__}: pass a list of {kind}")
    return list(items)


def _with_score(node: Any, place: int) -> NodeWithScore:
    """A node as one without a score."""
    if isinstance(node, NodeWithScore):
        return node
    if not isinstance(node, BaseNode):
        raise InputError(f"node {place} is {type(node).__name__}: pass nodes, such as TextNode(text=...)")
    return NodeWithScore(node=node)
