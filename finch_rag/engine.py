"""The engine: from a question and passages to an answer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import Unpack

from . import compiling
from .attention import use_finch_attention
from .chat_template import Message
from .decode import Decoder, Sampling, Writer, end_tokens
from .errors import InputError, ModelError, SettingsError, WindowError
from .heads import Heads, check_heads, fingerprint, resolve_heads
from .many import answer_many
from .models import load_model
from .options import (
    CallOptions,
    ChunkSize,
    Progress,
    ReadingOptions,
    SamplingOptions,
    check_reading,
    chunk_tokens,
    sampling_of,
)
from .planning import FixedTokens, RetrievalHeads, window_of
from .prompt import Passage, PromptBuilder, as_passages
from .reading import Reading, usual_chunk_size
from .report import citations
from .rope import KeyRotation
from .step_graph import StepGraphs
from .stream import AnswerStream, AsyncAnswerStream, Cancellation
from .templates import APART, take_apart

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .cache import CompressedCache
    from .report import Answer, Citation
    from .selection import Selection


class Finch:
    """Reads any number of passages in one chunked prefill and answers from a small cache.

    Safe to share between threads: a call keeps nothing in the engine.

    Args:
        model: A decoder-only transformers model with rotary positions. It is switched to Finch's attention function,
            which computes what SDPA computes.
        tokenizer: Its tokenizer; its chat template is used where it has one.
        name: Name in reports; the model's own when None.
        budget: Document tokens kept per layer; derived from the window and the longest passage when None.
        chunk_size: Document tokens read per step; "auto" derives it from device, free memory, model and window. Where
            the device's memory runs out, a reading goes on with half of it.
        selection: "passage" keeps whole passages, "token" keeps tokens layer by layer as in the paper.
        reread: With passage selection, read the best passages that fit whole into the budget once more at the end, and
            answer from them alone; those that are far below the best one are left out. Keys and values of the first
            reading have seen the passages that were evicted since, and fragments lack their sentences; a model mixes
            both up in its answer.
        heads: Heads that rank passages: "auto" (the model's retrieval heads, found at the first use of a model),
            "all", or (layer, head) pairs. Token selection sums all heads.
        max_new_tokens: The most tokens of an answer.
        instructions: Read before the passages; a default that asks for a short answer when None.
        system_prompt: System message; a default when None, the chat template's own when empty.
        compile_layers: Fuse norms and MLPs by ``torch.compile``: faster readings on a GPU, for some ten seconds
            before the first answer, see docs/benchmarks.md. It changes ``model`` for good.
        on_progress: Called with a stage ("heads", "prefill") and the steps done and in all.

    Raises:
        SettingsError: If a setting cannot work.
        ModelError: If Finch cannot run the model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str | None = None,
        budget: int | None = None,
        chunk_size: ChunkSize = "auto",
        selection: Selection = "passage",
        reread: bool = True,
        heads: Heads = "auto",
        max_new_tokens: int = 128,
        instructions: str | None = None,
        system_prompt: str | None = None,
        compile_layers: bool = False,
        on_progress: Progress | None = None,
    ) -> None:
        if getattr(model.config, "is_encoder_decoder", False):
            raise ModelError(f"{type(model).__name__} is an encoder-decoder; Finch runs decoder-only models")
        if not isinstance(heads, (str, list, tuple)) and isinstance(heads, Iterable):
            heads = list(heads)
        check_reading(budget, chunk_size, selection, SettingsError)
        check_heads(heads, model.config, SettingsError)
        Sampling(max_new_tokens=max_new_tokens).check(SettingsError)
        self.model = model
        self.tokenizer = tokenizer
        self.name = name or str(getattr(model, "name_or_path", "") or type(model).__name__)
        self.budget, self.chunk_size, self.selection, self.reread = budget, chunk_size, selection, reread
        self.max_new_tokens = max_new_tokens
        self.instructions, self.system_prompt = instructions, system_prompt
        self.on_progress: Progress = on_progress or (lambda stage, done, total: None)
        self.window = window_of(model.config)
        self.rotation = KeyRotation.of(model, self.window)
        use_finch_attention(model)
        self.prompts = PromptBuilder(tokenizer)
        self.step_graphs = StepGraphs(model)
        if compile_layers:
            compiling.compile_layers(model)
        self._heads: Heads = heads if isinstance(heads, str) else list(heads)
        self._lock = threading.Lock()

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | PreTrainedModel,
        *,
        tokenizer: PreTrainedTokenizerBase | str | Path | None = None,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "auto",
        trust_remote_code: bool = False,
        model_kwargs: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> Finch:
        """Loads a model and builds an engine on it.

        Args:
            model: A hub id, a local folder, a GGUF file, "embedded", or a loaded model (pass its tokenizer too).
            tokenizer: A loaded one, or a hub id or folder; needed with a loaded model, else the model's own.
            dtype: See `finch_rag.models.load_model`.
            device: See `finch_rag.models.load_model`.
            trust_remote_code: Whether code that comes with the model may run.
            model_kwargs: See `finch_rag.models.load_model`.
            settings: The keyword arguments of `Finch`.

        Raises:
            SettingsError: If a setting cannot work.
            ModelError: If the model cannot be loaded, or Finch cannot run it.
        """
        if not isinstance(model, (str, Path)):
            if tokenizer is None or isinstance(tokenizer, (str, Path)):
                raise SettingsError("a loaded model needs its loaded tokenizer: pass tokenizer=")
            return cls(model, tokenizer, **settings)
        named = tokenizer if isinstance(tokenizer, (str, Path)) else None
        loaded = load_model(model, dtype, device, trust_remote_code, named, model_kwargs)
        ready = loaded.tokenizer if tokenizer is None or isinstance(tokenizer, (str, Path)) else tokenizer
        return cls(loaded.model, ready, **{"name": loaded.name, **settings})

    def ask(self, question: str, passages: Iterable[str | Passage] = (), **options: Unpack[CallOptions]) -> Answer:
        """Answers a question from passages.

        Args:
            question: The question.
            passages: Texts or `Passage` objects; without any the model answers without context, and the report's
                ``selection`` is "none".
            options: What differs from the engine's settings for this call.

        Raises:
            InputError: If passages, question or options cannot work.
            NumericsError: If the model computes NaN.
            DeviceMemoryError: If the device runs out of memory.
        """
        return self.stream(question, passages, **options).read()

    def stream(
        self, question: str, passages: Iterable[str | Passage] = (), **options: Unpack[CallOptions]
    ) -> AnswerStream:
        """Like `ask`, but hands out the answer in pieces as it is made.

        Bad input raises at once. The passages are read when the first piece is asked for.

        Args:
            question: See `ask`.
            passages: See `ask`.
            options: See `ask`.
        """
        return self._stream(question, as_passages(passages), options, APART)

    def chat(
        self, messages: str | Iterable[Message], passages: Iterable[str | Passage] = (), **options: Unpack[CallOptions]
    ) -> Answer:
        """Answers the last message of a conversation, or a flat prompt.

        Without ``passages`` they are looked for in the messages, where RAG frameworks put them, see
        `finch_rag.templates`; the report's ``parse_mode`` says how they were found.

        Args:
            messages: Dictionaries with "role" and "content" as chat templates take them, or a prompt.
            passages: Texts or `Passage` objects.
            options: What differs from the engine's settings for this call.

        Raises:
            InputError: If messages, passages or options cannot work.
            NumericsError: If the model computes NaN.
            DeviceMemoryError: If the device runs out of memory.
        """
        return self.stream_chat(messages, passages, **options).read()

    def stream_chat(
        self, messages: str | Iterable[Message], passages: Iterable[str | Passage] = (), **options: Unpack[CallOptions]
    ) -> AnswerStream:
        """Like `chat`, but hands out the answer in pieces as it is made, see `stream`.

        Args:
            messages: See `chat`.
            passages: See `chat`.
            options: See `chat`.
        """
        check_reading(options.get("budget"), options.get("chunk_size"), self.selection, InputError)
        own = options.pop("instructions", self.instructions)
        request = take_apart(messages, as_passages(passages), lambda texts: self._are_short(texts, options), own)
        merged = {"instructions": own, **request.options, **options}
        return self._stream(request.question, request.passages, merged, request.parse_mode)

    def ask_many(
        self,
        questions: Iterable[str],
        passages: Iterable[str | Passage] | Iterable[Iterable[str | Passage]],
        **options: Unpack[CallOptions],
    ) -> list[Answer]:
        """Answers several questions, faster than one by one.

        The answers are written side by side, and short lists of passages are read side by side, with the same outcome
        as one by one, up to rounding. A long list that all questions share is read once for all of them, and each
        question then reads the part of it that got most of its attention, see `finch_rag.prefill_many`. For exactly
        what `ask` reads, pass ``[passages] * len(questions)``.

        Args:
            questions: The questions.
            passages: One list for all questions, or one list each.
            options: What differs from the engine's settings, for all questions.

        Returns:
            One answer a question, in their order.

        Raises:
            InputError: If questions, passages or options cannot work.
            NumericsError: If the model computes NaN.
            DeviceMemoryError: If the device runs out of memory.
        """
        return answer_many(self, questions, passages, options)

    def astream(
        self, question: str, passages: Iterable[str | Passage] = (), **options: Unpack[CallOptions]
    ) -> AsyncAnswerStream:
        """Like `stream`, for an event loop, which is never blocked. Bad input raises at the first piece.

        Args:
            question: See `ask`.
            passages: See `ask`.
            options: See `ask`.
        """
        return AsyncAnswerStream(lambda: self.stream(question, passages, **options))

    async def aask(
        self, question: str, passages: Iterable[str | Passage] = (), **options: Unpack[CallOptions]
    ) -> Answer:
        """Like `ask`, for an event loop: a cancelled task ends the reading or the generation under way.

        Args:
            question: See `ask`.
            passages: See `ask`.
            options: See `ask`.
        """
        return await self.astream(question, passages, **options).read()

    def count_tokens(self, text: str) -> int:
        """Tokens of a text as Finch reads it."""
        return len(self.prompts.encode([text])[0])

    def compress(
        self, question: str, passages: Iterable[str | Passage], **options: Unpack[ReadingOptions]
    ) -> CompressedCache:
        """Reads passages under a question and returns the small cache, to be asked or saved.

        Args:
            question: Decides what is kept.
            passages: See `ask`.
            options: What differs from the engine's settings for this call.
        """
        return Reading(self, question, as_passages(passages), self.max_new_tokens, options).run().fork(0)

    def ask_cached(
        self, cache: CompressedCache, question: str | None = None, **options: Unpack[SamplingOptions]
    ) -> Answer:
        """Answers from a cache that `compress` made; the cache stays as it is.

        Args:
            cache: From this model.
            question: Any question; the one that the cache was compressed under when None.
            options: Options of generation.

        Raises:
            InputError: If the cache is another model's.
            WindowError: If question and answer do not fit behind the cache.
        """
        if cache.document.model != self.fingerprint:
            raise InputError(f"the cache was filled by another model than {self.name}: compress the passages again")
        keys = cache.layers[0].keys
        if keys is not None and keys.dtype != self.model.dtype:
            raise InputError(
                f"the cache holds {keys.dtype} and {self.name} is loaded in {self.model.dtype}: load the model with "
                "that dtype, or compress the passages again"
            )
        sampling = sampling_of(options, self.max_new_tokens)
        prompt = self.prompts.build(cache.document.question if question is None else question, [])
        fixed = FixedTokens(cache.length, len(prompt.question), len(prompt.tail), sampling.max_new_tokens)
        if fixed.total > self.window:
            raise WindowError(
                f"the cache has {cache.length} tokens, the question {fixed.question + fixed.tail} and the answer up to "
                f"{fixed.new}, more than the window of {self.window}: shorten the question or lower max_new_tokens"
            )
        return self._answer(lambda: cache, [*prompt.question, *prompt.tail], sampling, Cancellation()).read()

    def rank(
        self, question: str, passages: Iterable[str | Passage], **options: Unpack[ReadingOptions]
    ) -> list[Citation]:
        """All passages by the attention that the question pays to them: attention as a reranker.

        Args:
            question: The question.
            passages: Texts or `Passage` objects.
            options: What differs from the engine's settings for this call.

        Returns:
            One citation a passage, by falling share; ``index`` is its place in ``passages``.
        """
        options["reread"] = False  # nothing will be answered from the cache
        return citations(Reading(self, question, as_passages(passages), 0, options).run())

    @property
    def heads(self) -> Heads:
        """The heads as they were asked for; `retrieval_heads` says which ones they are."""
        return self._heads

    def retrieval_heads(self) -> RetrievalHeads | None:
        """The heads that rank passages, by layer; None when all are summed. Found on the first call if need be."""
        with self._lock:
            return self._resolved_heads

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the model's weights."""
        return fingerprint(self.model)

    @cached_property
    def _resolved_heads(self) -> RetrievalHeads | None:
        def on_progress(done: int, total: int) -> None:
            self.on_progress("heads", done, total)

        return resolve_heads(self._heads, self.model, self.tokenizer, self.name, on_progress)

    def writer(self, sampling: Sampling) -> Writer:
        """What makes an answer of the model's logits."""
        return Writer(sampling, self._eos, self.prompts.decode)

    @cached_property
    def _eos(self) -> frozenset[int]:
        return end_tokens(self.model, self.tokenizer)

    def _are_short(self, texts: Sequence[str], options: Mapping[str, Any]) -> bool:
        """Whether each text fits into one chunk and all of them into half the window."""
        default = usual_chunk_size(self.model)
        chunk_size = chunk_tokens(options.get("chunk_size", self.chunk_size)) or default
        lengths = [len(tokens) for tokens in self.prompts.encode(texts)]
        return max(lengths) <= chunk_size and sum(lengths) <= self.window // 2

    def _stream(
        self, question: str, passages: list[Passage], options: Mapping[str, Any], parse_mode: str
    ) -> AnswerStream:
        sampling, cancellation = sampling_of(options, self.max_new_tokens), Cancellation()
        reading = Reading(self, question, passages, sampling.max_new_tokens, options, cancellation.check)
        return self._answer(reading.run, reading.answer_prompt, sampling, cancellation, passages, parse_mode)

    def _answer(
        self,
        open_cache: Callable[[], CompressedCache],
        prompt: Sequence[int],
        sampling: Sampling,
        cancellation: Cancellation,
        passages: Sequence[Passage] = (),
        parse_mode: str = APART,
    ) -> AnswerStream:
        def decoder(cache: CompressedCache) -> Decoder:
            how = sampling.max_new_tokens, self.step_graphs, cancellation.__bool__
            return Decoder(self.model, cache, prompt, self.writer(sampling), *how)

        return AnswerStream(
            open_cache, decoder, len(prompt), sampling.max_new_tokens, cancellation, passages, parse_mode
        )
