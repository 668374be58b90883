"""ChatFinch: a chat model that reads all documents of a conversation in one call."""

from __future__ import annotations

import json
import warnings
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from operator import itemgetter
from typing import TYPE_CHECKING, Any, cast

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.language_models.chat_models import agenerate_from_stream, generate_from_stream
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.messages.block_translators import register_translator
from langchain_core.output_parsers import JsonOutputParser, PydanticOutputParser
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable, RunnableBinding, RunnableConfig, RunnableMap, RunnablePassthrough
from langchain_core.utils.function_calling import convert_to_json_schema
from langchain_core.utils.pydantic import is_basemodel_subclass
from pydantic import BaseModel, Field

from finch_rag import AnswerStream, InputError
from finch_rag.adapters import SYSTEM, can_force_json

from ._convert import content_blocks_of, conversation_of, usage_of
from ._settings import PROVIDER, FinchSettings
from ._streaming import AnyStream, achunks, chunks, outcome_of

if TYPE_CHECKING:
    from langchain_core.language_models.chat_models import _ChatModelBinding as _Binding  # its types are narrower
    from langchain_core.output_parsers.base import BaseOutputParser
    from langchain_core.tools import BaseTool
else:
    _Binding = RunnableBinding[LanguageModelInput, AIMessage]

_METHODS = ("json_schema", "function_calling", "json_mode")

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
        passages = self._storable([*passages, *documents], options)
        return self.engine.stream_chat(conversation, passages, **options)

    def bind(self, **kwargs: Any) -> BoundChat:
        """The model with options, or documents, of its calls; also of those of its `with_structured_output`.

        Args:
            kwargs: See the README.
        """
        return BoundChat(bound=self, kwargs=kwargs)

    def with_config(self, config: RunnableConfig | None = None, **kwargs: Any) -> BoundChat:
        """The model with a configuration of its calls; also of those of its `with_structured_output`.

        Args:
            config: See LangChain.
            kwargs: Its entries.
        """
        return BoundChat(bound=self, config=cast(RunnableConfig, {**(config or {}), **kwargs}))

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
        """A runnable whose answers are JSON by a schema, parsed.

        With llguidance (``pip install 'finch-rag[json]'``) the model can say nothing else. Without it, the schema is
        asked for in the instructions alone, to which small models often do not keep; a warning says so.

        The schema stands behind the model's own instructions. Where neither model nor call says ``max_tokens``, an
        answer may have 512 tokens, or a quarter of the window if that is less, in place of 128, which may cut JSON off;
        a given ``engine`` keeps its own number. JSON that is cut off cannot be parsed.

        Args:
            schema: A pydantic class, whose instances are returned; or a TypedDict or JSON schema, for dictionaries.
            include_raw: Return a dictionary with "raw", "parsed" and "parsing_error" instead, and raise nothing where
                the answer cannot be parsed.
            kwargs: ``method`` and ``strict``. The method "json_mode" forces JSON, but not the schema, which is then
                only asked for; "json_schema" (the default) and "function_calling" force the schema. ``strict`` makes
                no difference: what is forced always is.

        Raises:
            InputError: If there are other arguments, or when it runs and llguidance cannot force the schema.
            OutputParserException: When it runs and the answer cannot be parsed.
        """
        return _structured(self, schema, include_raw=include_raw, **kwargs)


class BoundChat(_Binding):
    """A `ChatFinch` with bound options; they hold for its structured output, too.

    LangChain's own binding would hand `with_structured_output` on to the bare model, and lose them.
    """

    if TYPE_CHECKING:  # LangChain's make the same class again, and say less of it

        def bind(self, **kwargs: Any) -> BoundChat: ...  # noqa: D102

        def with_config(self, config: RunnableConfig | None = None, **kwargs: Any) -> BoundChat: ...  # noqa: D102

    @classmethod
    def lc_id(cls) -> list[str]:
        """Serialised, it is what LangChain knows: a binding."""
        return RunnableBinding.lc_id()

    def with_structured_output(
        self, schema: dict[str, Any] | type, *, include_raw: bool = False, **kwargs: Any
    ) -> Runnable[LanguageModelInput, dict[str, Any] | BaseModel]:
        """See `ChatFinch.with_structured_output`.

        Args:
            schema: See there.
            include_raw: See there.
            kwargs: See there.
        """
        return _structured(self, schema, include_raw=include_raw, **kwargs)


def _structured(
    model: ChatFinch | BoundChat,
    schema: dict[str, Any] | type,
    *,
    include_raw: bool,
    method: str | None = None,
    strict: bool | None = None,
    **unknown: Any,
) -> Runnable[LanguageModelInput, dict[str, Any] | BaseModel]:
    if unknown:
        raise InputError(f"unknown argument {', '.join(sorted(unknown))}: use schema, include_raw, method, strict")
    method = method or _METHODS[0]
    if method not in _METHODS:
        raise InputError(f"method is {method!r}: use one of {', '.join(map(repr, _METHODS))}")
    parser: BaseOutputParser[Any] = JsonOutputParser()
    if isinstance(schema, type) and is_basemodel_subclass(schema):
        parser = PydanticOutputParser(pydantic_object=schema)
    wanted = convert_to_json_schema(schema)
    options: dict[str, Any] = {
        "format_instructions": "Answer with a JSON object by this JSON schema, and with nothing else:\n"
        + json.dumps(wanted, ensure_ascii=False),
        "ls_structured_output_format": {"kwargs": {"method": method}, "schema": schema},
    }
    if can_force_json():
        options["json_schema"] = {"type": "object"} if method == "json_mode" else _forced(schema, wanted)
    else:
        warnings.warn(
            "the JSON of with_structured_output is only asked for, and a model may say something else: to force it, "
            "install the extra: pip install 'finch-rag[json]'",
            stacklevel=3,
        )
    bound = model.bind(**options)
    if not include_raw:
        return bound | parser
    parsed = RunnablePassthrough.assign(parsed=itemgetter("raw") | parser, parsing_error=lambda _: None)
    failed = RunnablePassthrough.assign(parsed=lambda _: None)
    # The model comes first and by itself, because a chain hands its options, documents among them, to its first step.
    raw = bound | RunnableMap(raw=RunnablePassthrough())
    return raw | parsed.with_fallbacks([failed], exception_key="parsing_error")


def _forced(schema: dict[str, Any] | type, wanted: dict[str, Any]) -> dict[str, Any]:
    """The schema to force. LangChain's, which the prompt shows, has lost what a class says of itself inside itself."""
    if isinstance(schema, type) and issubclass(schema, BaseModel):
        return schema.model_json_schema()
    return wanted


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
