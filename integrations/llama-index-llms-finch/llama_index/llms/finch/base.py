"""FinchLLM: a local model that reads all retrieved nodes in one call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    LLMMetadata,
)
from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.constants import DEFAULT_NUM_OUTPUTS
from llama_index.core.indices.prompt_helper import PromptHelper
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.prompts import BasePromptTemplate

from finch_rag import Answer, AnswerStream, Finch, Passage, SettingsError
from finch_rag.adapters import (
    AsyncAnswerStream,
    ChunkSize,
    Message,
    Prior,
    Render,
    Selection,
    StorePlace,
    Strategy,
    check_options,
    shared_engine,
)

from .messages import split_messages
from .prompting import PromptText
from .rendering import completion_render, messages_render, unformatted
from .responses import apieces, chat_piece, chat_response, completion_piece, completion_response, pieces
from .settings import (
    as_wrapper,
    call_options,
    checked_generate_kwargs,
    checked_mapping,
    one_line,
    placement,
    split_store,
)
from .storing import StoringLLM

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_TEMPLATE_TOKENS = 128  # room for what a chat template adds


class FinchLLM(StoringLLM):
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
        strategy: How passages are ranked: "auto", "loop" or "independent", see `finch_rag.Finch`; a given engine's own
            when None.
        selection: "passage" keeps whole passages, "token" single tokens; a given engine's own when None.
        cutoff: Passages with less than this part of the best one's attention are left out; 0 leaves none out; a given
            engine's own when None.
        prior: What the retriever's order counts beside the attention: "auto" or "none"; a given engine's own when None.
        rounds: How often passages are ranked: 1, or 2 for questions that need several; a given engine's own when None.
        max_context_tokens: What Finch reads in one call; LlamaIndex packs nodes by it.
        context_window: What LlamaIndex packs nodes by instead; several calls where they have more tokens.
        instructions: Read before the passages; a default that asks for a short answer when None.
        strict: Whether a prompt is an error that is of no known template and does not fit into the model's window; a
            given engine's own when None.
        repetition_penalty: Above 1, makes tokens less likely that the answer has already.
        store: Where passages are kept that were read, so that each is read once for all questions: a folder, True for
            memory, or an open `PassageStore`; False for none; a given engine's own when None.
        shortlist_tokens: The most tokens of the best passages that the loop then scans; see `finch_rag.Finch`.
        support: Whether to judge how well the nodes support an answer, for the response's "support"; a given engine's
            own when None.
        min_support: Withhold an answer that is supported less; a given engine's own when None.
        quotes: Whether to find the sentences of the nodes that each sentence of an answer rests on, for the response's
            "statements", its citations' "quotes" and a chat's citation blocks; a given engine's own when None.
        citation_blocks: Whether a chat's answer has a `CitationBlock` for each quote or, where there are none, for each
            node that was kept. LLMs of some other packages refuse a history that has such blocks.
        generate_kwargs: do_sample, temperature, top_k, top_p, repetition_penalty, seed, max_new_tokens of each call.
        model_kwargs: Handed to transformers' ``from_pretrained``.
        tokenizer_kwargs: The same for the tokenizer.
        trust_remote_code: Whether code that comes with the model may run.
        system_prompt: System message of each call.
        stop: Texts that end an answer.
        stopping_ids: Tokens that end an answer.
        is_chat_model: Whether LlamaIndex sends messages, else flat prompts; Finch takes both apart.
        messages_to_prompt: Makes a prompt of messages in place of the tokenizer's chat template.
        completion_to_prompt: The same for flat prompts.
        query_wrapper_prompt: Put around flat prompts; a template, or its text, with ``{query_str}``.
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
    strategy: str | None = Field(default=None, description='"auto", "loop" or "independent".')
    selection: str = Field(default="passage", description='"passage" or "token".')
    cutoff: float | None = Field(default=None, description="Leave out what got less than this part of the best's.")
    prior: str | None = Field(default=None, description='What the order counts: "auto" or "none".')
    rounds: int | None = Field(default=None, description="How often passages are ranked: 1 or 2.")
    max_context_tokens: int = Field(default=1_000_000, description="Document tokens that one call reads.", gt=0)
    context_window: int | None = Field(default=None, description="What LlamaIndex packs nodes by.", gt=0)
    instructions: str | None = Field(default=None, description="Read before the passages.")
    strict: bool | None = Field(default=None, description="Whether an unknown prompt that does not fit is an error.")
    repetition_penalty: float | None = Field(default=None, description="Above 1, makes what was said less likely.")
    support: bool | None = Field(default=None, description="Whether to judge how well nodes support an answer.")
    min_support: float | None = Field(default=None, description="Withhold an answer that is supported less.")
    quotes: bool | None = Field(default=None, description="Whether to find the sentences that an answer rests on.")
    citation_blocks: bool = Field(default=True, description="Whether an answer of a chat has citation blocks.")
    generate_kwargs: dict[str, Any] = Field(default_factory=dict, description="Options of generation.")
    model_kwargs: dict[str, Any] = Field(default_factory=dict, description="Options of from_pretrained.")
    tokenizer_kwargs: dict[str, Any] = Field(default_factory=dict, description="The same for the tokenizer.")
    trust_remote_code: bool = Field(default=False, description="Whether code that comes with the model may run.")
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
        strategy: Strategy | None = None,
        selection: Selection | None = None,
        cutoff: float | None = None,
        prior: Prior | None = None,
        rounds: int | None = None,
        max_context_tokens: int = 1_000_000,
        context_window: int | None = None,
        instructions: str | None = None,
        strict: bool | None = None,
        repetition_penalty: float | None = None,
        store: StorePlace = None,
        shortlist_tokens: int | None = None,
        support: bool | None = None,
        min_support: float | None = None,
        quotes: bool | None = None,
        citation_blocks: bool = True,
        generate_kwargs: Mapping[str, Any] | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
        trust_remote_code: bool = False,
        system_prompt: str | None = None,
        stop: str | Sequence[str] | None = None,
        stopping_ids: Sequence[int] | None = None,
        is_chat_model: bool = True,
        messages_to_prompt: Callable[[Sequence[ChatMessage]], str] | None = None,
        completion_to_prompt: Callable[[str], str] | None = None,
        query_wrapper_prompt: str | BasePromptTemplate | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(model, str):
            model_name, model = model_name or model, None
        if engine is not None and not isinstance(engine, Finch):
            raise SettingsError(f"engine is {type(engine).__name__}: pass a finch_rag.Finch, or a name as model_name")
        if max_new_tokens is None:
            max_new_tokens = DEFAULT_NUM_OUTPUTS if engine is None else engine.max_new_tokens
        if selection is None:
            selection = "passage" if engine is None else engine.selection
        checked = check_options(
            {
                "max_new_tokens": max_new_tokens,
                "budget": budget,
                "chunk_size": chunk_size,
                "strategy": "auto" if strategy is None else strategy,
                "selection": selection,
                "cutoff": cutoff,
                "prior": "auto" if prior is None else prior,
                "rounds": rounds,
                "max_context_tokens": max_context_tokens,
                "instructions": instructions,
                "repetition_penalty": repetition_penalty,
                "store": store,
                "shortlist_tokens": shortlist_tokens,
                "quotes": True if quotes is None else quotes,
                "support": False if support is None else support,
                "min_support": min_support,
                "strict": False if strict is None else strict,
                "system_prompt": system_prompt,
                "stop": stop,
                "stop_token_ids": stopping_ids,
            },
            SettingsError,
        )
        generation = checked_generate_kwargs(generate_kwargs)
        place, given_store = split_store(store)
        if unknown := set(kwargs) - set(type(self).model_fields):  # pydantic would ignore them
            raise SettingsError(
                f"FinchLLM has no setting {', '.join(sorted(unknown))}: use {', '.join(type(self).model_fields)}"
            )
        if tokenizer is not None and model is None:
            raise SettingsError("tokenizer is for a loaded model: pass model= too, or a name as tokenizer_name=")
        if model is not None:
            engine = Finch.from_pretrained(model, tokenizer=tokenizer)
        if engine is None and not model_name:
            raise SettingsError("there is no model: pass model_name, a loaded model with its tokenizer, or engine")
        fields = dict(
            model_name=model_name or getattr(engine, "name", ""),
            tokenizer_name=tokenizer_name,
            device_map=device_map or "auto",
            max_new_tokens=max_new_tokens,
            budget=budget,
            chunk_size=chunk_size,
            strategy=strategy,
            selection=selection,
            cutoff=cutoff,
            prior=prior,
            rounds=rounds,
            max_context_tokens=max_context_tokens,
            context_window=context_window,
            instructions=instructions,
            strict=strict,
            repetition_penalty=repetition_penalty,
            store=place,
            shortlist_tokens=shortlist_tokens,
            quotes=quotes,
            citation_blocks=citation_blocks,
            support=support,
            min_support=min_support,
            generate_kwargs=generation,
            model_kwargs=checked_mapping("model_kwargs", model_kwargs),
            tokenizer_kwargs=checked_mapping("tokenizer_kwargs", tokenizer_kwargs),
            trust_remote_code=trust_remote_code,
            system_prompt=system_prompt,
            stop=list(checked["stop"]),
            stopping_ids=list(checked["stop_token_ids"]),
            is_chat_model=is_chat_model,
            messages_to_prompt=messages_to_prompt,
            completion_to_prompt=completion_to_prompt,
            query_wrapper_prompt=as_wrapper(query_wrapper_prompt),
            **kwargs,
        )
        with one_line():
            super().__init__(**fields)
        self._engine = engine
        self._is_given = engine is not None
        self._given_store = given_store

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
            placed = placement(self.device_map)
            self._engine = shared_engine(
                self.model_name,
                tokenizer=self.tokenizer_name,
                model_kwargs={**placed.pop("model_kwargs", {}), **self.model_kwargs},
                tokenizer_kwargs=self.tokenizer_kwargs,
                trust_remote_code=self.trust_remote_code,
                **placed,
            )
        return self._engine

    @property
    def own_instructions(self) -> str | None:
        """The instructions that the user gave, to this LLM or to its engine; None for Finch's own."""
        if self.instructions is not None or not self._is_given:
            return self.instructions
        return self.engine.instructions

    def fits(self, prompt: str) -> bool:
        """Whether a prompt fits into the model's window, with the system prompt and the answer.

        Args:
            prompt: As one text.
        """
        taken = self.engine.count_tokens(f"{self.system_prompt or ''}\n{prompt}") + self.metadata.num_output
        return taken + _TEMPLATE_TOKENS <= self.engine.window

    @property
    def metadata(self) -> LLMMetadata:
        """What LlamaIndex packs prompts by; the context window is what Finch reads, not the model's own."""
        return LLMMetadata(
            context_window=self.context_window or self.max_context_tokens,
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
        return self._chatted(stream.read(), stream.passages)

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        """Like `chat`, in pieces as they are made; the last one carries report and citations.

        Args:
            messages: See `chat`.
            kwargs: See `complete`.
        """
        return pieces(self._conversation(messages, kwargs), chat_piece, self._chatted)

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
        return self._chatted(await stream.read(), stream.passages)

    @llm_chat_callback()
    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        """Like `stream_chat`, for an event loop; a cancelled task ends the generation.

        Args:
            messages: See `chat`.
            kwargs: See `complete`.
        """
        stream = AsyncAnswerStream(lambda: self._conversation(messages, kwargs))
        return apieces(stream, chat_piece, self._chatted)

    def _conversation(self, messages: Sequence[ChatMessage], kwargs: Mapping[str, Any]) -> AnswerStream:
        """Starts the answer to a conversation."""
        found = split_messages(messages, own_ids=self.stores(kwargs))
        return self._start(
            found.messages, found.passages, messages_render(self.messages_to_prompt), {**found.options, **kwargs}
        )

    def _completion(self, prompt: str, formatted: bool, kwargs: Mapping[str, Any]) -> AnswerStream:
        """Starts the answer to a flat prompt."""
        if isinstance(prompt, PromptText):
            found = split_messages(prompt.messages, own_ids=self.stores(kwargs))
            options = {**found.options, **kwargs}
            return self._start(
                found.messages,
                found.passages,
                completion_render(self.completion_to_prompt, self.query_wrapper_prompt),
                options,
            )
        if formatted:
            prompt = unformatted(prompt, self._extend_prompt, self.completion_to_prompt)
        return self._start(
            [Message(role="user", content=prompt)],
            [],
            completion_render(self.completion_to_prompt, self.query_wrapper_prompt),
            kwargs,
        )

    def _start(
        self, messages: list[Message], passages: list[Passage], render: Render | None, kwargs: Mapping[str, Any]
    ) -> AnswerStream:
        if self.system_prompt and not any(message["content"] == self.system_prompt for message in messages):
            messages = [Message(role="system", content=self.system_prompt), *messages]
        options = call_options(self, kwargs)
        if kwargs.get("store") is None:
            self.open_store()
        if render is not None:
            options["render"] = render
        return self.engine.stream_chat(messages, passages, **options)

    def _chatted(self, answer: Answer, passages: Sequence[Passage], delta: str | None = None) -> ChatResponse:
        """An answer as the response of a chat."""
        return chat_response(answer, passages, delta, cites=self.citation_blocks)

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> FinchLLM:
        shared = (self._engine, self._given_store, self._opened_store)
        return super().__deepcopy__({**(memo or {}), **{id(each): each for each in shared}})  # which copies share

    def __getstate__(self) -> dict[str, Any]:
        if self._is_given:
            raise SettingsError(
                "a FinchLLM with engine= or a loaded model cannot be pickled, because it holds the weights: pass "
                "model_name=, which is loaded again where it is unpickled"
            )
        if self._given_store is not None:
            raise SettingsError(
                "a FinchLLM with an open store cannot be pickled: pass the store's folder, or True for one in memory, "
                "which is opened again where it is unpickled"
            )
        # A copy loads the model itself, or shares it; a pickle of the weights is nothing that anybody wants.
        plain = self.model_copy()
        plain._engine = plain._opened_store = None
        return super(FinchLLM, plain).__getstate__()
