"""FinchSynthesizer: nodes go to the model apart, and citations come back with their ids."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator, Sequence
from typing import Any

import llama_index.core.instrumentation as instrument
from llama_index.core.base.llms.types import ChatMessage, ChatResponse
from llama_index.core.base.response.schema import (
    RESPONSE_TYPE,
    AsyncStreamingResponse,
    Response,
    StreamingResponse,
)
from llama_index.core.callbacks.base import CallbackManager
from llama_index.core.callbacks.schema import CBEventType, EventPayload
from llama_index.core.instrumentation.events.synthesis import SynthesizeEndEvent, SynthesizeStartEvent
from llama_index.core.prompts import BasePromptTemplate
from llama_index.core.prompts.default_prompt_selectors import DEFAULT_TEXT_QA_PROMPT_SEL
from llama_index.core.prompts.mixin import PromptDictType
from llama_index.core.response_synthesizers.base import BaseSynthesizer
from llama_index.core.schema import NodeWithScore, QueryBundle, QueryType
from llama_index.core.settings import Settings
from llama_index.core.types import RESPONSE_TEXT_TYPE

from finch_rag import Passage, SettingsError
from finch_rag.adapters import StorePlace

from .base import FinchLLM
from .messages import PassagesMessage
from .prompting import passages_messages, shows

_TEMPLATE = "text_qa_template"

dispatcher = instrument.get_dispatcher(__name__)


class FinchSynthesizer(BaseSynthesizer):
    """Answers from all nodes in one call; ``response.metadata["finch"]`` has citations by node id, and the report.

    Beside them, "statements" has the answer's sentences, each with the nodes' sentences that it rests on, and "support"
    how well they support it, where the LLM judges that.

    Args:
        llm: A `FinchLLM`; ``Settings.llm`` when None.
        streaming: Whether the response streams.
        callback_manager: Of the LLM and of this.
        text_qa_template: Asks in the user's own words; what stands around ``{context_str}`` and ``{query_str}`` becomes
            the instructions, and the nodes stay apart. Finch's own words when None, or LlamaIndex's default.
        store: Where nodes that were read are kept, see `FinchLLM`; the LLM's own when None.

    Raises:
        SettingsError: If the LLM is another one, or the template has no place for the nodes.
    """

    def __init__(
        self,
        llm: FinchLLM | None = None,
        streaming: bool = False,
        callback_manager: CallbackManager | None = None,
        text_qa_template: BasePromptTemplate | None = None,
        store: StorePlace = None,
    ) -> None:
        chosen = llm if llm is not None else Settings.llm
        if not isinstance(chosen, FinchLLM):
            raise SettingsError(
                f"FinchSynthesizer needs a FinchLLM, not {type(chosen).__name__}: pass llm=FinchLLM(...)"
            )
        chosen = chosen.with_store(store)
        super().__init__(llm=chosen, streaming=streaming, callback_manager=callback_manager)
        self._finch = chosen
        self._template: BasePromptTemplate = DEFAULT_TEXT_QA_PROMPT_SEL
        self._update_prompts({} if text_qa_template is None else {_TEMPLATE: text_qa_template})

    def _get_prompts(self) -> PromptDictType:
        return {_TEMPLATE: self._template}

    def _update_prompts(self, prompts_dict: PromptDictType) -> None:
        template = prompts_dict.get(_TEMPLATE, self._template)
        if not shows(template):
            raise SettingsError(f"{_TEMPLATE} has no {{context_str}}: put it where the nodes go")
        if "context_str" in (template.function_mappings or {}):
            raise SettingsError(
                f"{_TEMPLATE} makes context_str with a function, and FinchSynthesizer reads each node apart: leave the "
                "function out, or use another synthesizer with FinchLLM"
            )
        self._template = template

    def synthesize(
        self,
        query: QueryType,
        nodes: list[NodeWithScore],
        additional_source_nodes: Sequence[NodeWithScore] | None = None,
        **response_kwargs: Any,
    ) -> RESPONSE_TYPE:
        """Answers a query from nodes.

        Args:
            query: The query.
            nodes: What to read.
            additional_source_nodes: Added to the response's source nodes.
            response_kwargs: Options of the call, see `FinchLLM.complete`.

        Raises:
            InputError: If the query is empty.
        """
        if not nodes:  # LlamaIndex says "Empty Response"
            return super().synthesize(query, nodes, additional_source_nodes, **response_kwargs)
        question = query.query_str if isinstance(query, QueryBundle) else query
        dispatcher.event(SynthesizeStartEvent(query=query))
        sources, metadata = self._sources(nodes, additional_source_nodes)
        messages = self._messages(question, nodes)
        with self._callback_manager.event(CBEventType.SYNTHESIZE, payload={EventPayload.QUERY_STR: question}) as event:
            response: RESPONSE_TYPE
            if self._streaming:
                texts = _texts(self._finch.stream_chat(messages, **response_kwargs), metadata)
                response = StreamingResponse(texts, source_nodes=sources, metadata=metadata)
            else:
                answered = self._finch.chat(messages, **response_kwargs)
                metadata["finch"] = answered.additional_kwargs
                response = Response(answered.message.content, source_nodes=sources, metadata=metadata)
            event.on_end(payload={EventPayload.RESPONSE: response})
        dispatcher.event(SynthesizeEndEvent(query=query, response=response))
        return response

    async def asynthesize(
        self,
        query: QueryType,
        nodes: list[NodeWithScore],
        additional_source_nodes: Sequence[NodeWithScore] | None = None,
        **response_kwargs: Any,
    ) -> RESPONSE_TYPE:
        """Like `synthesize`, for an event loop.

        Args:
            query: See `synthesize`.
            nodes: See `synthesize`.
            additional_source_nodes: See `synthesize`.
            response_kwargs: See `synthesize`.
        """
        if not nodes:
            return await super().asynthesize(query, nodes, additional_source_nodes, **response_kwargs)
        question = query.query_str if isinstance(query, QueryBundle) else query
        dispatcher.event(SynthesizeStartEvent(query=query))
        sources, metadata = self._sources(nodes, additional_source_nodes)
        messages = self._messages(question, nodes)
        with self._callback_manager.event(CBEventType.SYNTHESIZE, payload={EventPayload.QUERY_STR: question}) as event:
            response: RESPONSE_TYPE
            if self._streaming:
                texts = _atexts(await self._finch.astream_chat(messages, **response_kwargs), metadata)
                response = AsyncStreamingResponse(texts, source_nodes=sources, metadata=metadata)
            else:
                answered = await self._finch.achat(messages, **response_kwargs)
                metadata["finch"] = answered.additional_kwargs
                response = Response(answered.message.content, source_nodes=sources, metadata=metadata)
            event.on_end(payload={EventPayload.RESPONSE: response})
        dispatcher.event(SynthesizeEndEvent(query=query, response=response))
        return response

    def get_response(self, query_str: str, text_chunks: Sequence[str], **response_kwargs: Any) -> RESPONSE_TEXT_TYPE:
        """Answers from texts without ids.

        Args:
            query_str: The question.
            text_chunks: What to read.
            response_kwargs: See `synthesize`.
        """
        messages = self._messages(query_str, [Passage(text) for text in text_chunks])
        if self._streaming:
            return _texts(self._finch.stream_chat(messages, **response_kwargs), {})
        return self._finch.chat(messages, **response_kwargs).message.content or ""

    async def aget_response(
        self, query_str: str, text_chunks: Sequence[str], **response_kwargs: Any
    ) -> RESPONSE_TEXT_TYPE:
        """Like `get_response`, for an event loop.

        Args:
            query_str: See `get_response`.
            text_chunks: See `get_response`.
            response_kwargs: See `get_response`.
        """
        messages = self._messages(query_str, [Passage(text) for text in text_chunks])
        if self._streaming:
            return _atexts(await self._finch.astream_chat(messages, **response_kwargs), {})
        return (await self._finch.achat(messages, **response_kwargs)).message.content or ""

    def _messages(self, question: str, nodes: Sequence[NodeWithScore | Passage]) -> list[ChatMessage]:
        """What is asked of the LLM."""
        asked = passages_messages(self._template, self._finch, {"query_str": question}, nodes=nodes)
        return [PassagesMessage(question, nodes)] if asked is None else asked

    def _sources(
        self, nodes: Sequence[NodeWithScore], additional: Sequence[NodeWithScore] | None
    ) -> tuple[list[NodeWithScore], dict[str, Any]]:
        """Source nodes of a response and its metadata, as LlamaIndex fills them."""
        sources = [*nodes, *(additional or ())]
        return sources, dict(self._get_metadata_for_response([source.node for source in sources]) or {})


def _texts(responses: Generator[ChatResponse, None, None], metadata: dict[str, Any]) -> Generator[str, None, None]:
    """The deltas of a stream; at its end ``metadata`` gets citations and report."""
    for response in responses:
        if response.additional_kwargs:
            metadata["finch"] = response.additional_kwargs
        if response.delta:
            yield response.delta


async def _atexts(responses: AsyncGenerator[ChatResponse, None], metadata: dict[str, Any]) -> AsyncGenerator[str, None]:
    async for response in responses:
        if response.additional_kwargs:
            metadata["finch"] = response.additional_kwargs
        if response.delta:
            yield response.delta
