"""ChatFinch: a chat model that reads all documents of a conversation in one call."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.language_models.chat_models import agenerate_from_stream, generate_from_stream
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.messages.block_translators import register_translator
from langchain_core.output_parsers import JsonOutputParser, PydanticOutputParser
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable, RunnableMap, RunnablePassthrough
from langchain_core.utils.function_calling import convert_to_json_schema
from langchain_core.utils.pydantic import is_basemodel_subclass
from pydantic import BaseModel, Field

from finch_rag import AnswerStream, InputError
from finch_rag.adapters import SYSTEM

from ._convert import content_blocks_of, conversation_of, usage_of
from ._settings import PROVIDER, FinchSettings
from ._streaming import AnyStream, achunks, chunks, outcome_of

if TYPE_CHECKING:
    from langchain_core.output_parsers.base import BaseOutputParser
    from langchain_core.tools import BaseTool

register_translator(PROVIDER, content_blocks_of, content_blocks_of)


class ChatFinch(FinchSettings, BaseChatModel):
    """A local Hugging Face chat model that reads far more documents than its window holds, and cites them.

    Documents come with ``bind(documents=docs)``, as ``text-plain`` blocks of the messages, or inside a known prompt of
    LangChain, where they are found. The model is loaded at the first call, and shared by all instances with the same
    settings of loading.

    An answer's ``content`` is a str; its ``content_blocks`` have the citations as annotations. Its
    ``response_metadata`` has the citations as plain values, the report, the parse mode and the model's name; its
    ``usage_metadata`` the tokens that were read, kept and made.

    Args:
        model: A hub id, a folder, a GGUF file or "embedded".
        engine: A `finch_rag.Finch` to use; settings that are left out are then its own.
        budget: Document tokens kept per layer; derived from the window when None.
        max_tokens: The most tokens of an answer; 128 when None. finch-rag's name, ``max_new_tokens``, is the same.
        settings: All other fields, see the README.

    Raises:
        SettingsError: If there is no model, or a setting is unknown or cannot work.

    Example:
        >>> chat = ChatFinch(model="embedded", budget=256)
        >>> chat.bind(documents=docs).invoke("Who signed it?").content_blocks
    """

    # None and not False, which LangChain takes for an order not to stream.
    streaming: bool | None = Field(default=None, description="Whether invoke, too, makes its answer through stream.")

    @property
    def _llm_type(self) -> str:
        return "finch-chat"

    @property
    def _identifying_params(self) -> Mapping[str, Any]:
        # The version decides what a cached message holds.
        return {**super()._identifying_params, **self._differing(("output_version",))}

    def _get_invocation_params(self, stop: list[str] | None = None, **kwargs: Any) -> dict[str, Any]:
        # Traces would otherwise carry every document's text with every call.
        return super()._get_invocation_params(stop=self._stop_of(stop), **self._call_params(kwargs))

    def _get_llm_string(self, stop: list[str] | None = None, **kwargs: Any) -> str:
        # LangChain's own is made once an instance, knows nothing of a given engine, and holds the documents' texts.
        return str(sorted(self._get_invocation_params(stop, **kwargs).items()))

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return generate_from_stream(self._stream(messages, stop, run_manager, **kwargs))

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return await agenerate_from_stream(self._astream(messages, stop, run_manager, **kwargs))

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        return chunks(self._open(messages, stop, kwargs), run_manager, _piece, _last)

    def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        return achunks(lambda: self._open(messages, stop, kwargs), run_manager, _piece, _last)

    def _open(
        self, messages: Sequence[BaseMessage], stop: Sequence[str] | None, kwargs: dict[str, Any]
    ) -> AnswerStream:
        documents, options = self._request(stop, kwargs)
        conversation, passages = conversation_of(messages)
        if "system_prompt" not in kwargs and any(turn["role"] == SYSTEM for turn in conversation):
            options.pop("system_prompt", None)  # the model's own gives way to the conversation's
        return self.engine.stream_chat(conversation, [*passages, *documents], **options)

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: str | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """Raises, because a local model that reads through Finch calls no tools.

        Args:
            tools: Not used.
            tool_choice: Not used.
            kwargs: Not used.

        Raises:
            NotImplementedError: Always, as LangChain has it for models without tools.
        """
        raise NotImplementedError(
            "ChatFinch calls no tools: retrieve first and pass documents=, see the agents recipe in the README"
        )

    def with_structured_output(
        self, schema: dict[str, Any] | type, *, include_raw: bool = False, **kwargs: Any
    ) -> Runnable[LanguageModelInput, dict[str, Any] | BaseModel]:
        """A runnable whose answers are parsed by a schema.

        The schema is asked for in the instructions, and what the model answers is parsed; nothing forces a model to
        keep to it, and small ones often do not. The ``method`` makes no difference, therefore.

        Args:
            schema: A pydantic class, whose instances are returned; or a TypedDict or JSON schema, for dictionaries.
            include_raw: Return a dictionary with "raw", "parsed" and "parsing_error" instead, and raise nothing where
                the answer cannot be parsed.
            kwargs: ``method`` and ``strict``, which LangChain passes and a prompt cannot heed.

        Raises:
            InputError: If there are other arguments.
            OutputParserException: When it runs and the answer cannot be parsed.
        """
        if unknown := set(kwargs) - {"method", "strict"}:
            raise InputError(f"unknown argument {', '.join(sorted(unknown))}: use schema, include_raw, method, strict")
        parser: BaseOutputParser[Any] = JsonOutputParser()
        if isinstance(schema, type) and is_basemodel_subclass(schema):
            parser = PydanticOutputParser(pydantic_object=schema)
        wanted = json.dumps(convert_to_json_schema(schema), ensure_ascii=False)
        model = self.bind(
            instructions=f"Answer with a JSON object by this JSON schema, and with nothing else:\n{wanted}",
            ls_structured_output_format={"kwargs": {"method": "json_mode"}, "schema": schema},
        )
        if not include_raw:
            return model | parser
        parsed = RunnablePassthrough.assign(parsed=itemgetter("raw") | parser, parsing_error=lambda _: None)
        failed = RunnablePassthrough.assign(parsed=lambda _: None)
        return RunnableMap(raw=model) | parsed.with_fallbacks([failed], exception_key="parsing_error")


def _piece(delta: str) -> ChatGenerationChunk:
    return ChatGenerationChunk(message=AIMessageChunk(content=delta, response_metadata={"model_provider": PROVIDER}))


def _last(stream: AnyStream) -> ChatGenerationChunk:
    """A chunk without text that says what the answer took and where it came from.

    All of it stands on this chunk alone: LangChain joins chunks' metadata by adding them up.
    """
    answer = stream.answer
    message = AIMessageChunk(
        content="",
        response_metadata={
            "model_provider": PROVIDER,
            "model_name": answer.report.model,
            "parse_mode": answer.report.parse_mode,
            **outcome_of(stream),
        },
        usage_metadata=usage_of(answer.report),
        chunk_position="last",
    )
    return ChatGenerationChunk(message=message)
