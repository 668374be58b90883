"""FinchRetriever: documents that are read once, searched by the model's own retrieval heads."""

from __future__ import annotations

import asyncio
import hashlib
import threading
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Self

from langchain_core.callbacks import AsyncCallbackManagerForRetrieverRun, CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever, RetrieverLike
from langchain_core.runnables import Runnable, run_in_executor
from pydantic import ConfigDict, Field

from finch_rag import FinchError, InputError, Passage, PassageStore, SettingsError
from finch_rag.adapters import Cancelled, StorePlace, check_options

from ._convert import SCORE, passages_of
from ._stores import StoreField, StoreHolder, is_formatted, is_store
from .chat_models import ChatFinch
from .llms import FinchLLM

_OPEN_ONE = "what finch.open_store(...) returns"


class FinchRetriever(StoreHolder, BaseRetriever):
    """Finds documents in a store by the attention that the question pays to them; it needs no embedding model.

    A document comes back as it was added: text, id and metadata, and ``metadata["relevance_score"]``, its share of the
    attention that the question pays to all documents of the store. One that was added without an id has one of its
    title and text. `ChatFinch`, the documents chain and the reranker read what it finds no second time where they have
    the same store.

    Args:
        store: An open `finch_rag.PassageStore`; or a folder, or True for one in memory, which ``llm`` opens; the LLM's
            own when None.
        llm: A `ChatFinch` or `FinchLLM`; its model reads the documents.
        k: The most documents to find; also an option of a call: ``invoke(question, k=3)``.
        fuse: Other retrievers, whose rankings are fused with the store's own (reciprocal rank fusion). Documents are
            known by their ids, or by title and text. Only what is in the store is found.
        fuse_k: The constant of the fusion.
        tags: See `BaseRetriever`.
        metadata: See `BaseRetriever`.

    Raises:
        SettingsError: If there is no store, or a setting cannot work.

    Example:
        >>> llm = ChatFinch(model="embedded", store="contracts.store")
        >>> retriever = FinchRetriever.from_documents(documents, llm=llm, k=20)
        >>> create_retrieval_chain(retriever, create_finch_documents_chain(llm))
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    store: StoreField = None
    llm: FinchLLM | ChatFinch | None = None
    k: int = 10
    fuse: list[RetrieverLike] = Field(default_factory=list)
    fuse_k: int = 20

    def __init__(self, **settings: Any) -> None:
        if unknown := set(settings) - set(type(self).model_fields):
            raise SettingsError(f"unknown setting {', '.join(sorted(unknown))}: use store, llm, k, fuse, fuse_k")
        llm, fuse = settings.get("llm"), settings.get("fuse") or []
        if llm is not None and not isinstance(llm, (FinchLLM, ChatFinch)):
            raise SettingsError(f"llm is {type(llm).__name__}: pass a FinchLLM or a ChatFinch")
        for name in ("k", "fuse_k"):
            if name in settings:
                _check_number(name, settings[name], SettingsError)
        if not isinstance(fuse, (list, tuple)) or not all(isinstance(other, Runnable) for other in fuse):
            raise SettingsError("fuse holds something else than retrievers: pass a list of them, such as fuse=[bm25]")
        store = check_options({"store": settings.get("store")}, SettingsError)["store"]
        if not is_store(_place(store, llm)):
            raise SettingsError(f"there is no store: pass store= (a folder or True, with llm=), or {_OPEN_ONE}")
        if llm is None and not isinstance(store, PassageStore):
            raise SettingsError(f"store is {store!r} and there is no llm= that opens it: pass one, or {_OPEN_ONE}")
        super().__init__(**{**settings, "store": store, "fuse": list(fuse)})

    @classmethod
    def from_documents(
        cls,
        documents: Iterable[Document],
        *,
        store: StorePlace = None,
        llm: FinchLLM | ChatFinch | None = None,
        **settings: Any,
    ) -> Self:
        """A retriever over documents: those that its store does not know yet are read.

        Args:
            documents: The documents. What the store has already stays in it.
            store: See `FinchRetriever`; one in memory where neither this nor the LLM names one.
            llm: See `FinchRetriever`.
            settings: All other settings.

        Raises:
            SettingsError: See `FinchRetriever`.
            InputError: See `add_documents`.
        """
        if llm is not None and not is_store(_place(store, llm)):
            store = True
        made = cls(store=store, llm=llm, **settings)
        made.add_documents(documents)
        return made

    @classmethod
    def from_texts(
        cls,
        texts: Iterable[str],
        metadatas: Iterable[dict[str, Any]] | None = None,
        ids: Iterable[str] | None = None,
        **settings: Any,
    ) -> Self:
        """Like `from_documents`, for texts.

        Args:
            texts: The texts.
            metadatas: Of each.
            ids: Of each.
            settings: See `from_documents`.

        Raises:
            InputError: If there are not as many metadatas or ids as texts.
        """
        listed = [texts] if isinstance(texts, str) else list(texts)
        found = [{} for _ in listed] if metadatas is None else list(metadatas)
        if len(found) != len(listed):
            raise InputError(f"there are {len(found)} metadatas for {len(listed)} texts: pass one each")
        named = _one_each(ids, len(listed))
        documents = [
            Document(text, metadata=own, id=name) for text, own, name in zip(listed, found, named, strict=True)
        ]
        return cls.from_documents(documents, **settings)

    @property
    def passage_store(self) -> PassageStore:
        """The store, opened at the first use.

        Raises:
            SettingsError: If it has gone: an attribute was changed.
            StoreError: If it cannot be opened.
        """
        place = _place(self.store, self.llm)
        if isinstance(place, PassageStore):
            return place
        opened = None if self.llm is None else self.llm.engine.runtime.stores.at(place)
        if opened is None:
            raise SettingsError(f"there is no store any more: set store= and llm=, or pass {_OPEN_ONE}")
        return opened

    def add_documents(
        self,
        documents: Iterable[Document],
        ids: Iterable[str] | None = None,
        *,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[str]:
        """Adds documents to the store, which reads those that it does not know.

        One with an id that is known gets the new text. One without text is skipped.

        Args:
            documents: The documents; ``metadata["title"]`` is read before the text.
            ids: Of each, in place of its own.
            on_progress: Called with the tokens read and in all, of those that are not known.

        Returns:
            Their ids, in their order.

        Raises:
            InputError: If one of them is no document, or longer than the model's window, or two have one id.
            StoreError: If the store cannot be written.
        """
        single = isinstance(documents, (str, Document, Passage))
        passages = passages_of(documents if single else list(documents))  # raises if single
        named = [
            Passage(passage.text, given or _names(passage)[0], passage.title, passage.metadata)
            for passage, given in zip(passages, _one_each(ids, len(passages)), strict=True)
            if passage.text.strip()
        ]
        self.passage_store.add(named, on_progress)
        return [str(passage.id) for passage in named]

    async def aadd_documents(self, documents: Iterable[Document], ids: Iterable[str] | None = None) -> list[str]:
        """Like `add_documents`, for an event loop; a cancelled task ends the reading, and what was read stays.

        Args:
            documents: See `add_documents`.
            ids: See `add_documents`.
        """
        cancelled = threading.Event()

        def on_progress(done: int, total: int) -> None:
            if cancelled.is_set():
                raise Cancelled  # nobody waits for it any more

        def add() -> list[str]:
            return self.add_documents(documents, ids, on_progress=on_progress)

        try:
            return await run_in_executor(None, add)
        finally:
            cancelled.set()

    def delete(self, ids: Sequence[str]) -> bool:
        """Removes documents from the store.

        Args:
            ids: As `add_documents` returned them.

        Returns:
            True: all of them are gone.

        Raises:
            InputError: If one of them is not there; then none is removed.
            StoreError: If the store cannot be written.
        """
        self.passage_store.remove(ids)
        return True

    async def adelete(self, ids: Sequence[str]) -> bool:
        """Like `delete`, for an event loop.

        Args:
            ids: See `delete`.
        """
        return await run_in_executor(None, self.delete, ids)

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun, k: int | None = None, **unknown: Any
    ) -> list[Document]:
        most = self._most(k, unknown)
        config: Any = {"callbacks": run_manager.get_child()}
        return self._find(query, most, [other.invoke(query, config) for other in self.fuse])

    async def _aget_relevant_documents(
        self, query: str, *, run_manager: AsyncCallbackManagerForRetrieverRun, k: int | None = None, **unknown: Any
    ) -> list[Document]:
        most = self._most(k, unknown)
        config: Any = {"callbacks": run_manager.get_child()}
        found = await asyncio.gather(*(other.ainvoke(query, config) for other in self.fuse))
        return await run_in_executor(None, self._find, query, most, found)

    def _most(self, k: int | None, unknown: dict[str, Any]) -> int:
        if unknown:
            raise InputError(f"unknown option {', '.join(sorted(unknown))}: use k")
        if k is None:
            return self.k
        _check_number("k", k, InputError)
        return k

    def _find(self, query: str, most: int, others: Sequence[Sequence[Document]]) -> list[Document]:
        store = self.passage_store
        rankings = [[name for passage in passages_of(found) for name in _names(passage)] for found in others]
        for retriever, ranking in zip(self.fuse, rankings, strict=True):
            if ranking and not any(name in store for name in ranking):
                warnings.warn(
                    f"nothing that {retriever.get_name()} found for {query[:60]!r} is in the store, so that it does "
                    "not count: add the same documents to both, with the same ids",
                    stacklevel=2,
                )
        wanted = most
        while True:
            found = store.retrieve(query, wanted, rankings, self.fuse_k)
            # What a prompt has made of documents is there for the chain that reads it.
            own = [each for each in found if not is_formatted(each.passage.metadata)]
            if len(own) >= most or len(found) < wanted:
                return [_document(each.passage, each.share) for each in own[:most]]
            wanted *= 2


def _place(store: StorePlace, llm: FinchLLM | ChatFinch | None) -> StorePlace:
    """Where the documents are: in a retriever's own store, its LLM's, or the one of the engine that this was given."""
    if is_store(store) or llm is None:
        return store
    engine = llm._source.given
    return engine.settings.store if llm.store is None and engine is not None else llm.store


def _check_number(name: str, value: object, error: type[FinchError]) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise error(f"{name} is {value!r}: pass a whole number, the least is 1")


def _one_each(ids: Iterable[str] | None, count: int) -> list[str | None]:
    given: list[str | None] = [None] * count if ids is None else list(ids)
    if len(given) != count:
        raise InputError(f"there are {len(given)} ids for {count} documents: pass one each")
    return given


def _names(passage: Passage) -> list[str]:
    """What a store may know a passage by, its own id first: where it had none, one of its title and text."""
    made = hashlib.sha256(passage.titled_text.encode(errors="surrogatepass")).hexdigest()[:32]
    return [passage.id, made] if passage.id else [made]


def _document(passage: Passage, share: float) -> Document:
    # A title that only the passage has is read before the text, so the document needs it to be the same passage again.
    title = {"title": passage.title} if passage.title else {}
    return Document(passage.text, id=passage.id, metadata={**passage.metadata, **title, SCORE: share})
