"""FinchRerank: attention as a reranker, for any LLM."""

from __future__ import annotations

from typing import Any

import llama_index.core.instrumentation as instrument
from llama_index.core.bridge.pydantic import Field, SerializeAsAny
from llama_index.core.callbacks.schema import CBEventType, EventPayload
from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import NodeWithScore, QueryBundle
from llama_index.core.settings import Settings

from finch_rag import InputError, SettingsError
from finch_rag.adapters import ReadingOptions, StorePlace

from .base import FinchLLM
from .nodes import known_nodes, passage_of

dispatcher = instrument.get_dispatcher(__name__)


class FinchRerank(BaseNodePostprocessor):
    """Ranks nodes by the attention that the question pays to them in one reading, and keeps the best.

    A node's score becomes its share of that attention; the shares of all nodes sum to 1.

    Args:
        llm: A `FinchLLM`; ``Settings.llm`` when None.
        top_n: The most nodes to keep; no limit when None.
        budget: The most tokens to keep, whole nodes only, and the best one in any case; no limit when None.
        store: Where nodes that were read are kept, see `FinchLLM`; the LLM's own when None.
        kwargs: Fields of `BaseNodePostprocessor`: ``callback_manager``.

    Raises:
        SettingsError: If the LLM is another one, or a limit is below 1.
    """

    llm: SerializeAsAny[FinchLLM] = Field(description="Whose attention ranks the nodes.")
    top_n: int | None = Field(default=None, description="The most nodes to keep.")
    budget: int | None = Field(default=None, description="The most tokens to keep.")

    def __init__(
        self,
        llm: FinchLLM | dict[str, Any] | None = None,
        top_n: int | None = None,
        budget: int | None = None,
        store: StorePlace = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(llm, dict):  # from to_dict
            llm = FinchLLM.from_dict(llm)
        chosen = llm if llm is not None else Settings.llm
        if not isinstance(chosen, FinchLLM):
            raise SettingsError(f"FinchRerank needs a FinchLLM, not {type(chosen).__name__}: pass one as llm=")
        for name, value in (("top_n", top_n), ("budget", budget)):
            if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
                raise SettingsError(f"{name} is {value!r}: pass a whole number, or leave it out for no limit")
            if value is not None and value < 1:
                raise SettingsError(f"{name} is {value}: the least is 1; leave it out for no limit")
        kwargs.pop("class_name", None)  # in what to_dict makes
        if unknown := set(kwargs) - set(type(self).model_fields):  # pydantic would ignore them
            raise SettingsError(
                f"FinchRerank has no setting {', '.join(sorted(unknown))}: use {', '.join(type(self).model_fields)}"
            )
        fields: dict[str, Any] = {"llm": chosen.with_store(store), "top_n": top_n, "budget": budget, **kwargs}
        super().__init__(**fields)

    @classmethod
    def class_name(cls) -> str:
        """Name in serialised components."""
        return "FinchRerank"

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        if query_bundle is None:
            raise InputError("there is no query to rank by: pass query_str or query_bundle")
        if not nodes:
            return []
        limit = len(nodes) if self.top_n is None else self.top_n
        dispatcher.event(ReRankStartEvent(query=query_bundle, nodes=nodes, top_n=limit, model_name=self.llm.model_name))
        with self.callback_manager.event(
            CBEventType.RERANKING,
            payload={
                EventPayload.NODES: nodes,
                EventPayload.MODEL_NAME: self.llm.model_name,
                EventPayload.QUERY_STR: query_bundle.query_str,
                EventPayload.TOP_K: limit,
            },
        ) as event:
            ranked = self._rank(nodes, query_bundle.query_str)[:limit]
            event.on_end(payload={EventPayload.NODES: ranked})
        dispatcher.event(ReRankEndEvent(nodes=ranked))
        return ranked

    def _rank(self, nodes: list[NodeWithScore], question: str) -> list[NodeWithScore]:
        passages = [passage_of(node) for node in nodes]
        chunk_size = self.llm.chunk_size or self.llm.engine.chunk_size  # None would be the default, not the engine's
        store = self.llm.open_store()
        if store is not None:
            known_nodes(store).remember(nodes)
        options: ReadingOptions = {
            "chunk_size": chunk_size,
            "max_context_tokens": self.llm.max_context_tokens,
            "store": store,
        }
        citations = self.llm.engine.rank(question, passages, **options)
        kept: list[NodeWithScore] = []
        tokens = 0
        for citation in citations:
            tokens += citation.passage_tokens
            if self.budget is not None and tokens > self.budget and kept:
                break
            kept.append(NodeWithScore(node=nodes[citation.index].node, score=citation.share))
        return kept
