"""FinchLLM: a local model that reads all retrieved nodes in one call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llama_index.core.base.llms.generic_utils import messages_to_prompt as generic_messages_to_prompt
from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    LLMMetadata,
    MessageRole,
)
from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.constants import DEFAULT_NUM_OUTPUTS
from llama_index.core.indices.prompt_helper import PromptHelper
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.custom import CustomLLM
from llama_index.core.llms.llm import default_completion_to_prompt
from llama_index.core.prompts import PromptTemplate
from llama_index.core.types import Model

from finch_rag import AnswerStream, Finch, Passage, SettingsError
from finch_rag.adapters import (
    AsyncAnswerStream,
    ChunkSize,
    Message,
    Render,
    Selection,
    can_force_json,
    check_options,
    shared_engine,
)

from .messages import apieces, chat_piece, chat_response, completion_piece, completion_response, pieces, split_messages

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_GENERATE_KWARGS = ("do_sample", "max_new_tokens", "seed", "temperature", "top_k", "top_p")
_ACCELERATE_MAPS = ("balanced", "balanced_low_0", "sequential")  # device maps that accelerate works out
_MARK = "FinchCompletionGoesHere"


class FinchLLM(CustomLLM):
    """A local Hugging Face model that reads far more passages than its window holds, and cites them.

    A drop-in for any query engine or chat engine: passages and question are found in LlamaIndex's prompts. The model
    is loaded at the first call; instances with the same model and loading options share it.

    Args:
        model_name: A hub id, a folder, a GGUF file or "embedded".
        tokenizer_name: Hub id or folder of the tokenizer, where it is not the model's.
        model: A loaded model, with ``tokenizer``; or a model's name.
        tokenizer: A loaded tokenizer.
        engine: A `finch_rag.Finch` to share; model and tokenizer are then its own.
        device_map: "auto" (the first GPU, else the CPU), a device, or a device map as transformers takes it.
        max_new_tokens: The most tokens of an answer; a given engine's own when None, else 256.
        budget: Document tokens kept per layer; derived from the window when None.
        chunk_size: Document tokens scanned per step; "auto" or None derives it from device, memory, model and window.
        selection: "passage" keeps whole passages, "token" single tokens; a given engine's own when None.
        max_context_tokens: What Finch reads in one call; LlamaIndex packs nodes by it.
        instructions: Read before the passages; a default that asks for a short answer when None.
        generate_kwargs: do_sample, temperature, top_k, top_p, seed, max_new_tokens of each call.
        model_kwargs: Handed to transformers' ``from_pretrained``.
        system_prompt: System message of each call.
        stop: Texts that end an answer.
        stopping_ids: Tokens that end an answer.
        is_chat_model: Whether LlamaIndex sends messages, else flat prompts; Finch takes both apart.
        messages_to_prompt: Makes a prompt of messages in place of the tokenizer's chat template.
        completion_to_prompt: The same for flat prompts.
        kwargs: Fields of `LLM`: ``callback_manager``, ``output_parser``, ``pydantic_program_mode`` and so on.

    Raises:
        SettingsError: If there is no model, or a setting cannot work.
    """

    model_name: str = Field(description="Hub id, folder or GGUF file of the model.")
    tokenizer_name: str | None = Field(default=None, description="Hub id or folder of the tokenizer.")
    device_map: str | dict[str, Any] = Field(default="auto", description="Where the model runs.")
    max_new_tokens: int = Field(default=DEFAULT_NUM_OUTPUTS, description="The most tokens of an answer.")
    budget: int | None = Field(default=None, description="Document tokens kept per layer.")
    chunk_size: ChunkSize = Field(default=None, description='Document tokens read per step; "auto" chooses.')
    selection: str = Field(default="passage", description='"passage" or "token".')
    max_context_tokens: int = Field(default=1_000_000, description="Document tokens that one call reads.", gt=0)
    instructions: str | None = Field(default=None, description="Read before the passages.")
    generate_kwargs: dict[str, Any] = Field(default_factory=dict, description="Options of generation.")
    model_kwargs: dict[str, Any] = Field(default_factory=dict, description="Options of from_pretrained.")
    stop: list[str] = Field(default_factory=list, description="Texts that end an answer.")
    stopping_ids: list[int] = Field(default_factory=list, description="Tokens that end an answer.")
    is_chat_model: bool = Field(default=True, description="Whether LlamaIndex sends messages.")

    _engine: Finch | None = PrivateAttr(default=None)

    def __init__(
        self,
        model_name: str | None = None,
        *,
        tokenizer_name: str | None = None,
        model: PreTrainedModel | str | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        engine: Finch | None = None,
        device_map: str | dict[str, Any] | None = "auto",
        max_new_tokens: int | None = None,
        budget: int | None = None,
        chunk_size: ChunkSize = None,
        selection: Selection | None = None,
        max_context_tokens: int = 1_000_000,
        instructions: str | None = None,
        generate_kwargs: Mapping[str, Any] | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        system_prompt: str | None = None,
        stop: str | Sequence[str] | None = None,
        stopping_ids: Sequence[int] | None = None,
        is_chat_model: bool = True,
        messages_to_prompt: Callable[[Sequence[ChatMessage]], str] | None = None,
        completion_to_prompt: Callable[[str], str] | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(model, str):
            model_name, model = model_name or model, None
        if max_new_tokens is None:
            max_new_tokens = DEFAULT_NUM_OUTPUTS if engine is None else engine.max_new_tokens
        if selection is None:
            selection = "passage" if engine is None else engine.selection
        checked = check_options(
            {
                "max_new_tokens": max_new_tokens,
                "budget": budget,
                "chunk_size": chunk_size,
                "selection": selection,
                "max_context_tokens": max_context_tokens,
                "instructions": instructions,
                "system_prompt": system_prompt,
                "stop": stop,
                "stop_token_ids": stopping_ids,
            },
            SettingsError,
        )
        generation = _checked_generate_kwargs(generate_kwargs or {})
        if unknown := set(kwargs) - set(type(self).model_fields):  # pydantic would ignore them
            raise SettingsError(
                f"FinchLLM has no setting {', '.join(sorted(unknown))}: use {', '.join(type(self).model_fields)}"
            )
        if tokenizer is not None and model is None:
            raise SettingsError("tokenizer is for a loaded model: pass model= too, or a name as tokenizer_name=")
        if model is not None:
            engine = Finch.from_pretrained(model, tokenizer=tokenizer)
        if engine is None and model_name is None:
            raise SettingsError("there is no model: pass model_name, a loaded model with its tokenizer, or engine")
        super().__init__(
            model_name=model_name or getattr(engine, "name", ""),
            tokenizer_name=tokenizer_name,
            device_map=device_map or "auto",
            max_new_tokens=max_new_tokens,
            budget=budget,
            chunk_size=chunk_size,
            selection=selection,
            max_context_tokens=max_context_tokens,
            instructions=instructions,
            generate_kwargs=generation,
            model_kwargs=dict(model_kwargs or {}),
            system_prompt=system_prompt,
            stop=list(checked["stop"]),
            stopping_ids=list(checked["stop_token_ids"]),
            is_chat_model=is_chat_model,
            messages_to_prompt=messages_to_prompt,
            completion_to_prompt=completion_to_prompt,
            **kwargs,
        )
        self._engine = engine

    @classmethod
    def class_name(cls) -> str:
        """Name in serialised components."""
        return "Finch_LLM"

    @property
    def engine(self) -> Finch:
        """The engine, loaded at the first use.

        Raises:
            ModelError: If the model cannot be loaded, or Finch cannot run it.
        """
        if self._engine is None:
            placed = _placement(self.device_map)
            model_kwargs = {**placed.pop("model_kwargs", {}), **self.model_kwargs}
            self._engine = shared_engine(
                self.model_name, tokenizer=self.tokenizer_name, model_kwargs=model_kwargs, **placed
            )
        return self._engine

    @property
    def metadata(self) -> LLMMetadata:
        """What LlamaIndex packs prompts by; the context window is what Finch reads, not the model's own."""
        return LLMMetadata(
            context_window=self.max_context_tokens,
            num_output=self.generate_kwargs.get("max_new_tokens", self.max_new_tokens),
            is_chat_model=self.is_chat_model,
            model_name=self.model_name,
        )

    def prompt_helper(self, **kwargs: Any) -> PromptHelper:
        """A prompt helper that counts with the model's tokenizer; LlamaIndex's own counts with another.

        Args:
            kwargs: Keyword arguments of `PromptHelper.from_llm_metadata`.
        """

        def tokenize(text: str) -> list[int]:
            return self.engine.prompts.encode([text])[0]

        return PromptHelper.from_llm_metadata(self.metadata, tokenizer=tokenize, **kwargs)

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Answers a flat prompt.

        Args:
            prompt: A prompt; passages and question are found in those of LlamaIndex.
            formatted: Whether ``system_prompt`` and ``completion_to_prompt`` have been applied to it.
            kwargs: Options of the call: temperature, max_tokens, stop, seed, budget and so on.
        """
        stream = self._completion(prompt, formatted, kwargs)
        return completion_response(stream.read(), stream.passages)

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        """Like `complete`, in pieces as they are made; the last one carries report and citations.

        Args:
            prompt: See `complete`.
            formatted: See `complete`.
            kwargs: See `complete`.
        """
        return pieces(self._completion(prompt, formatted, kwargs), completion_piece, completion_response)

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Answers the last message of a conversation.

        Args:
            messages: Text, and passages as citable blocks or documents; else passages are found in the texts.
            kwargs: See `complete`.
        """
        stream = self._conversation(messages, kwargs)
        return chat_response(stream.read(), stream.passages)

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        """Like `chat`, in pieces as they are made; the last one carries report and citations.

        Args:
            messages: See `chat`.
            kwargs: See `complete`.
        """
        return pieces(self._conversation(messages, kwargs), chat_piece, chat_response)

    @llm_completion_callback()
    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Like `complete`, for an event loop; a cancelled task ends the generation.

        Args:
            prompt: See `complete`.
            formatted: See `complete`.
            kwargs: See `complete`.
        """
        stream = AsyncAnswerStream(lambda: self._completion(prompt, formatted, kwargs))
        return completion_response(await stream.read(), stream.passages)

    @llm_completion_callback()
    async def astream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseAsyncGen:
        """Like `stream_complete`, for an event loop; a cancelled task ends the generation.

        Args:
            prompt: See `complete`.
            formatted: See `complete`.
            kwargs: See `complete`.
        """
        stream = AsyncAnswerStream(lambda: self._completion(prompt, formatted, kwargs))
        return apieces(stream, completion_piece, completion_response)

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Like `chat`, for an event loop; a cancelled task ends the generation.

        Args:
            messages: See `chat`.
            kwargs: See `complete`.
        """
        stream = AsyncAnswerStream(lambda: self._conversation(messages, kwargs))
        return chat_response(await stream.read(), stream.passages)

    @llm_chat_callback()
    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        """Like `stream_chat`, for an event loop; a cancelled task ends the generation.

        Args:
            messages: See `chat`.
            kwargs: See `complete`.
        """
        stream = AsyncAnswerStream(lambda: self._conversation(messages, kwargs))
        return apieces(stream, chat_piece, chat_response)

    def structured_predict(
        self,
        output_cls: type[Model],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Model:
        """An object by a pydantic class; forced where llguidance is installed, and else as far as the model can.

        Args:
            output_cls: The class.
            prompt: The prompt.
            llm_kwargs: Options of the call.
            prompt_args: Of the prompt.
        """
        return super().structured_predict(output_cls, prompt, _forced(output_cls, llm_kwargs), **prompt_args)

    async def astructured_predict(
        self,
        output_cls: type[Model],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Model:
        """Like `structured_predict`, for an event loop.

        Args:
            output_cls: See `structured_predict`.
            prompt: See `structured_predict`.
            llm_kwargs: See `structured_predict`.
            prompt_args: See `structured_predict`.
        """
        return await super().astructured_predict(output_cls, prompt, _forced(output_cls, llm_kwargs), **prompt_args)

    def _structured_stream_call(
        self,
        output_cls: type[Model],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Any:
        return super()._structured_stream_call(output_cls, prompt, _forced(output_cls, llm_kwargs), **prompt_args)

    async def _structured_astream_call(
        self,
        output_cls: type[Model],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Any:
        forced = _forced(output_cls, llm_kwargs)
        return await super()._structured_astream_call(output_cls, prompt, forced, **prompt_args)

    def _conversation(self, messages: Sequence[ChatMessage], kwargs: Mapping[str, Any]) -> AnswerStream:
        """Starts the answer to a conversation."""
        texts, passages = split_messages(messages)
        return self._start(texts, passages, self._messages_template(), kwargs)

    def _completion(self, prompt: str, formatted: bool, kwargs: Mapping[str, Any]) -> AnswerStream:
        """Starts the answer to a flat prompt."""
        if formatted:
            prompt = self._unformatted(prompt)
        return self._start([Message(role="user", content=prompt)], [], self._completion_template(), kwargs)

    def _start(
        self, messages: list[Message], passages: list[Passage], render: Render | None, kwargs: Mapping[str, Any]
    ) -> AnswerStream:
        if self.system_prompt and not any(message["content"] == self.system_prompt for message in messages):
            messages = [Message(role="system", content=self.system_prompt), *messages]
        options = self._options(kwargs)
        if render is not None:
            options["render"] = render
        return self.engine.stream_chat(messages, passages, **options)

    def _options(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Options of a call: the call's own before those of this LLM."""
        options: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "selection": self.selection,
            "max_context_tokens": self.max_context_tokens,
            "stop": self.stop,
            "stop_token_ids": self.stopping_ids,
        }
        own = {"budget": self.budget, "chunk_size": self.chunk_size, "instructions": self.instructions}
        options |= {name: value for name, value in own.items() if value is not None}
        call = {name: value for name, value in kwargs.items() if value is not None}
        if "max_tokens" in call:
            call["max_new_tokens"] = call.pop("max_tokens")
        return {**options, **self.generate_kwargs, **call}

    def _messages_template(self) -> Render | None:
        convert = self.messages_to_prompt
        if convert is None or convert is generic_messages_to_prompt:  # LlamaIndex's default, which knows no model
            return None
        return lambda messages: convert(
            [ChatMessage(role=MessageRole(message["role"]), content=message["content"]) for message in messages]
        )

    def _completion_template(self) -> Render | None:
        convert = self.completion_to_prompt
        if convert is None or convert is default_completion_to_prompt:
            return None

        def render(messages: Sequence[Message]) -> str:
            if not any(message["role"] == "assistant" for message in messages):
                return convert(messages[-1]["content"])
            turns = "\n".join(f"{message['role']}: {message['content']}" for message in messages)
            return convert(f"{turns}\nassistant: ")

        return render

    def _unformatted(self, prompt: str) -> str:
        """The prompt without what `LLM.predict` has put around it, which is put there again, control tokens as such."""
        if self.system_prompt:
            prompt = prompt.removeprefix(f"{self.system_prompt}\n\n")
        if (render := self._completion_template()) is None:
            return prompt
        before, _, after = render([Message(role="user", content=_MARK)]).partition(_MARK)
        return prompt.removeprefix(before).removesuffix(after)

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> FinchLLM:
        return super().__deepcopy__({**(memo or {}), id(self._engine): self._engine})  # which copies share

    def __getstate__(self) -> dict[str, Any]:
        # A copy loads the model itself, or shares it; a pickle of the weights is nothing that anybody wants.
        plain = self.model_copy()
        plain._engine = None
        return super(FinchLLM, plain).__getstate__()


def _forced(output_cls: type[Model], llm_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """Options of a call whose answer is parsed as a class."""
    schema = {"json_schema": output_cls.model_json_schema()} if can_force_json() else {}
    return {**schema, **(llm_kwargs or {})}


def _placement(device_map: str | dict[str, Any]) -> dict[str, Any]:
    """A device map as arguments of the engine."""
    if isinstance(device_map, dict) or device_map in _ACCELERATE_MAPS:
        return {"model_kwargs": {"device_map": device_map}}
    return {"device": device_map}


def _checked_generate_kwargs(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Options of generation as Finch names them.

    Raises:
        SettingsError: If one is unknown or out of its range.
    """
    if unknown := set(kwargs) - set(_GENERATE_KWARGS):
        raise SettingsError(
            f"generate_kwargs has {', '.join(sorted(unknown))}, which Finch does not have: use "
            f"{', '.join(_GENERATE_KWARGS)}"
        )
    options = dict(kwargs)
    sample = options.pop("do_sample", None)
    if sample is False:
        options["temperature"] = 0.0
    elif sample:
        options.setdefault("temperature", 1.0)
    check_options(options, SettingsError)
    return options
