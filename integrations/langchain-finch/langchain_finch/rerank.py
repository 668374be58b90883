"""FinchReranker: attention as a reranker and compressor, for any LLM."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from langchain_core.callbacks import Callbacks
from langchain_core.documents import BaseDocumentCompressor, Document
from langchain_core.runnables import run_in_executor
from pydantic import ConfigDict

from finch_rag import SettingsError
from finch_rag.adapters import Cancelled, ReadingOptions, check_options

from ._convert import SCORE, passages_of
from ._stores import StoreField, StoreHolder
from .chat_models import ChatFinch
from .llms import FinchLLM


class FinchReranker(StoreHolder, BaseDocumentCompressor):
    """Ranks documents by the attention that the question pays to them in one reading, and keeps the best.

    A document's ``metadata["relevance_score"]`` becomes its share of that attention; the shares of all documents sum
    to 1. The documents that it is given stay as they are.

    Args:
        llm: Whose attention ranks the documents.
        top_n: The most documents to keep; no limit when None.
        budget: The most tokens to keep, whole documents only, and the best one in any case; no limit when None.
        store: Keeps what is read, so that each document is read once for all questions: a folder, True for memory, or
            an open `finch_rag.PassageStore`; False for none; the LLM's own when None.

    Raises:
        SettingsError: If the LLM is another one, a limit is below 1, or the store is none.

    Example:
        >>> ContextualCompressionRetriever(base_compressor=FinchReranker(llm=llm, top_n=5), base_retriever=retriever)
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    llm: FinchLLM | ChatFinch
    top_n: int | None = None
    budget: int | None = None
    store: StoreField = None

    def __init__(self, **settings: Any) -> None:
        llm = settings.get("llm")
        if not isinstance(llm, (FinchLLM, ChatFinch)):
            raise SettingsError(f"FinchReranker needs a FinchLLM or a ChatFinch, not {type(llm).__name__}: pass llm=")
        if unknown := set(settings) - set(type(self).model_fields):
            known = ", ".join(type(self).model_fields)
            raise SettingsError(f"unknown setting {', '.join(sorted(unknown))}: use {known}")
        for name in ("top_n", "budget"):
            value = settings.get(name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise SettingsError(f"{name} is {value!r}: the least is 1; leave it out for no limit")
        check_options({"store": settings.get("store")}, SettingsError)
        super().__init__(**settings)

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """The best documents for a question, best first.

        Args:
            documents: Any number; none give none.
            query: The question.
            callbacks: Not used: no text is generated.

        Raises:
            InputError: If the question is empty.
        """
        return self._compress(documents, query, threading.Event())

    async def acompress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """Like `compress_documents`, for an event loop; a cancelled task ends the reading.

        Args:
            documents: See `compress_documents`.
            query: See `compress_documents`.
            callbacks: See `compress_documents`.
        """
        cancelled = threading.Event()
        try:
            return await run_in_executor(None, self._compress, documents, query, cancelled)
        finally:
            cancelled.set()

    def _compress(self, documents: Sequence[Document], query: str, cancelled: threading.Event) -> list[Document]:
        if not documents:
            return []
        engine = self.llm.engine

        def on_progress(stage: str, done: int, total: int) -> None:
            engine.on_progress(stage, done, total)
            if cancelled.is_set():
                raise Cancelled  # nobody waits for the ranking any more

        options = ReadingOptions(max_context_tokens=self.llm.max_context_tokens, on_progress=on_progress)
        if self.llm.chunk_size is not None:
            options["chunk_size"] = self.llm.chunk_size
        store = self.llm.store if self.store is None else self.store
        if not any(document.page_content.strip() for document in documents):
            store = False  # it could rank none of them
        if store is not None:
            options["store"] = store
        ranked = engine.rank(query, passages_of(documents), **options)
        kept: list[Document] = []
        tokens = 0
        for citation in ranked[: self.top_n]:
            tokens += citation.passage_tokens
            if self.budget is not None and tokens > self.budget and kept:
                break
            document = documents[citation.index]
            scored = {**document.metadata, SCORE: citation.share}
            kept.append(document.model_copy(update={"metadata": scored}))
        return kept
