"""The engine: from a question and passages to an answer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import Unpack

from .answer import Answer, Citation, citations
from .attributes import EngineAttributes
from .batch import answer_together, requests_of
from .errors import InputError, SettingsError
from .fitting import WindowRoom
from .heads.pairs import AloneHeads, Heads, check_alone_heads, check_heads
from .models.cache import CompressedCache
from .models.forward import memory_guard
from .models.inspection import text_config
from .models.loading import load_model
from .prefill.planning import ChunkSize, Prior, Strategy
from .prefill.selection import Selection
from .prompts.chat_template import Message
from .prompts.parsing import parse_prompt
from .prompts.passages import Passage, as_passages
from .quotes.finding import sentences_to_quote
from .reading import read_request
from .request import Cancellation, Progress
from .resolving import resolve, resolve_cached, resolve_parsed, with_store
from .runtime import Runtime
from .settings import CallOptions, EngineSettings, ReadingOptions, SamplingOptions, Settings
from .store.opening import StoreOptions, StorePlace
from .store.store import PassageStore
from .streaming import AnswerStream, AsyncAnswerStream, in_thread

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Finch(EngineAttributes):
    """Reads any number of passages and answers from a small cache.

    Safe to share between threads: a call keeps nothing in the engine.

    Args:
        model: A decoder-only transformers model. It is switched to Finch's attention function, which computes what SDPA
            computes; where Finch cannot move its keys, to a window in front of its own (docs/models.md).
        tokenizer: Its tokenizer; its chat template is used where it has one.
        name: Name in reports; the model's own when None.
        budget: Document tokens kept per layer; derived from the window and the longest passage when None.
        chunk_size: Document tokens scanned per step; "auto" derives it from device, free memory, model and window.
            Where the device's memory runs out, a scan goes on with half of it.
        strategy: How passages are ranked. "loop" reads every chunk behind what was kept of those before it, under the
            question, as in the paper. "independent" reads each passage alone, behind a short prefix, once for all
            questions of a call, as a store does; it answers as well and takes less time (docs/benchmarks.md), and is
            what "auto" takes for an answer. "auto" takes "loop" for `rank`, which it does more sharply; and where
            nothing has to be left out, most passages are longer than the budget, single tokens are kept, older turns
            of the conversation are read along, or ``heads`` are given. An engine made with "loop" stays below the
            sliding window that some layers may have, of 2,048 tokens or more, so that the loop can run.
        selection: "passage" keeps whole passages, "token" keeps tokens layer by layer as in the paper.
        reread: With passage selection, prefill the best passages that fit whole into the budget again at the end,
            and answer from them alone; those that are far below the best one are left out. Keys and values of the scan
            have seen the passages that were evicted since, and fragments lack their sentences; a model mixes both up
            in its answer.
        cutoff: Passages with less than this part of the best one's attention are not answered from, also where the
            budget has room for them; 0 leaves none out. None is 0.25: a question with one clear source is answered from
            it alone; but where three or more passages that are read alone stand out together, it is answered from all
            of these. Lower it for other questions that need several passages.
        prior: What the retriever's order counts where passages are read alone. "auto" weights the attention with it, as
            far as the two agree: an order that carries nothing changes nothing. The order is that of the scores where
            every passage has one, else that of the list. "none" ranks by the attention alone.
        rounds: 2 ranks twice: the best passages of the first round, some 4,096 tokens of them, are scanned once more by
            the loop, where each is read with the others before it. That finds more of what questions over several
            passages need (docs/several-passages.md). 1 answers from the first round. None is 2 on an accelerator where
            passages are read alone, unless one of them, or several together, stand out already; else 1.
        heads: Heads that rank passages in the loop: "auto" (the model's retrieval heads, found at the first use of a
            model), "all", or (layer, head) pairs. Token selection sums all heads.
        alone_heads: Heads that rank passages read alone: "auto", or (layer, head) pairs.
        max_new_tokens: The most tokens of an answer.
        instructions: Read before the passages; a default that asks for a short answer when None.
        system_prompt: System message; a default when None, the chat template's own when empty.
        compile_layers: Fuse norms and MLPs by ``torch.compile``: faster readings on a GPU, for some ten seconds
            before the first answer, see docs/benchmarks.md. It changes ``model`` for good.
        strict: Raise an error where an unknown prompt does not fit into the window, and it would have to be guessed
            what in it may be left out, see `finch_rag.prompts.parsing`.
        store: Asked in place of a scan: passages of a call are read once for all calls; a call without passages asks
            all that the store has. A folder, opened at the first use; True keeps it in memory; or what `open_store`
            returns. None scans the passages of each call.
        shortlist_tokens: The most tokens that the second of two ``rounds`` scans; 0 leaves it out. None is 4,096, or
            twice the budget where that is more.
        quotes: Find the sentences of the passages that each statement of an answer rests on, by one more pass of the
            answer's tokens after the last one: `finch_rag.Answer.statements`, `finch_rag.Citation.quotes`.
        support: Judge how well the passages support an answer (`finch_rag.Answer.support`): the model is asked whether
            they answer the question, and it is seen how sharply the answer looks at one sentence. What both mean for a
            model is calibrated at the first use, on made-up examples, and kept in the user's cache.
        min_support: Withhold an answer whose support is less: its text is empty, and the report's ``stop_reason`` is
            "unsupported". A stream hands out its text in one piece, at the end.
        on_progress: Called with a stage ("heads", "store", "prefill", "support") and the steps done and in all.

    Attributes:
        settings: What a call does where its options do not say otherwise.
        runtime: Executes the calls.

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
        strategy: Strategy = "auto",
        selection: Selection = "passage",
        reread: bool = True,
        cutoff: float | None = None,
        prior: Prior = "auto",
        rounds: int | None = None,
        heads: Heads = "auto",
        alone_heads: AloneHeads = "auto",
        max_new_tokens: int = 128,
        instructions: str | None = None,
        system_prompt: str | None = None,
        compile_layers: bool = False,
        strict: bool = False,
        store: StorePlace = None,
        shortlist_tokens: int | None = None,
        quotes: bool = True,
        support: bool = False,
        min_support: float | None = None,
        on_progress: Progress | None = None,
    ) -> None:
        # Copies, which the caller cannot change.
        heads = list(heads) if not isinstance(heads, str) and isinstance(heads, Iterable) else heads
        if not isinstance(alone_heads, str) and isinstance(alone_heads, Iterable):
            alone_heads = list(alone_heads)
        self.settings = Settings().updated(
            {
                "budget": budget,
                "chunk_size": chunk_size,
                "strategy": strategy,
                "selection": selection,
                "reread": reread,
                "cutoff": cutoff,
                "prior": prior,
                "rounds": rounds,
                "max_new_tokens": max_new_tokens,
                "instructions": instructions,
                "system_prompt": system_prompt,
                "strict": strict,
                "store": store,
                "shortlist_tokens": shortlist_tokens,
                "quotes": quotes,
                "support": support,
                "min_support": min_support,
                "on_progress": on_progress,
            },
            SettingsError,
        )
        check_heads(heads, text_config(model), SettingsError)
        check_alone_heads(alone_heads, text_config(model), SettingsError)
        self.runtime = Runtime(
            model,
            tokenizer,
            name=name,
            heads=heads,
            alone_heads=alone_heads,
            compile_layers=compile_layers,
            held=self.settings.reading.strategy == "loop",
        )

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
        tokenizer_kwargs: Mapping[str, Any] | None = None,
        **settings: Unpack[EngineSettings],
    ) -> Finch:
        """Loads a model and builds an engine on it.

        Args:
            model: A hub id, a local folder, a GGUF file, "embedded", or a loaded model (pass its tokenizer too).
            tokenizer: A loaded one, or a hub id or folder; needed with a loaded model, else the model's own.
            dtype: See `finch_rag.models.loading.load_model`.
            device: See `finch_rag.models.loading.load_model`.
            trust_remote_code: Whether code that comes with the model may run.
            model_kwargs: See `finch_rag.models.loading.load_model`.
            tokenizer_kwargs: See `finch_rag.models.loading.load_model`.
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
        loaded = load_model(model, dtype, device, trust_remote_code, named, model_kwargs, tokenizer_kwargs)
        ready = loaded.tokenizer if tokenizer is None or isinstance(tokenizer, (str, Path)) else tokenizer
        if settings.get("name") is None:
            settings["name"] = loaded.name
        return cls(loaded.model, ready, **settings)

    def open_store(self, path: str | Path | None = None, **options: Unpack[StoreOptions]) -> PassageStore:
        """Opens a store of passages that this model reads once and searches for every question.

        Args:
            path: A folder, made if it is missing; None keeps all in memory.
            options: ``max_bytes``, the most bytes of head keys: the least recently used passages go; None, the default,
                for no limit. ``precision`` of the keys: "bfloat16", or "int8", which takes half the bytes.
                ``read_only=True`` opens a folder beside its one writer. ``heads``, those that search: "auto", the
                model's own for passages read alone, found at its first use, or (layer, head) pairs.

        Raises:
            SettingsError: If a setting cannot work.
            StoreError: If the folder cannot be opened, has another writer, or is of another model or precision.
        """
        return self.runtime.stores.open(path, on_progress=self.settings.on_progress, **options)

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
        chosen, settings = with_store(self.runtime, question, as_passages(passages), self.settings.updated(options))
        return AnswerStream(self.runtime, resolve(self.runtime, question, chosen, settings))

    def chat(
        self, messages: str | Iterable[Message], passages: Iterable[str | Passage] = (), **options: Unpack[CallOptions]
    ) -> Answer:
        """Answers the last message of a conversation, or a flat prompt.

        Without ``passages`` they are looked for in the messages, where RAG frameworks put them, see
        `finch_rag.prompts.parsing`; the report's ``parse_mode`` says how they were found.

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
        settings = self.settings.updated(options)
        room = WindowRoom(self.runtime, settings)
        parsed = parse_prompt(messages, as_passages(passages), room, settings.prompt.instructions, settings.strict)
        if "system_prompt" in options:  # the call's own wins over the conversation's
            parsed = replace(parsed, system_prompt=None)
        if "history" in options:
            parsed = replace(parsed, history=[])
        return AnswerStream(self.runtime, resolve_parsed(self.runtime, parsed, settings))

    def ask_many(
        self,
        questions: Iterable[str],
        passages: Iterable[str | Passage] | Iterable[Iterable[str | Passage]],
        **options: Unpack[CallOptions],
    ) -> list[Answer]:
        """Answers several questions, faster than one by one.

        Each passage of all lists is read once, and the answers are written side by side, with the same outcome as one
        by one, up to rounding. By ``strategy="loop"`` short lists are read side by side; a long one that all questions
        share is scanned once for all of them, and each then scans the part that got most of its attention, see
        `finch_rag.prefill.shared`; for exactly what `ask` reads, pass ``[passages] * len(questions)``.

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
        requests, shared = requests_of(self.runtime, questions, passages, self.settings.updated(options))
        return answer_together(self.runtime, requests, shared=shared)

    async def aask_many(
        self,
        questions: Iterable[str],
        passages: Iterable[str | Passage] | Iterable[Iterable[str | Passage]],
        **options: Unpack[CallOptions],
    ) -> list[Answer]:
        """Like `ask_many`, for an event loop: a cancelled task ends the reading or the generation under way.

        Args:
            questions: See `ask_many`.
            passages: See `ask_many`.
            options: See `ask_many`.
        """
        cancellation = Cancellation()

        def answers() -> list[Answer]:
            settings = self.settings.updated(options)
            requests, shared = requests_of(self.runtime, questions, passages, settings, cancellation)
            return answer_together(self.runtime, requests, shared=shared)

        return await in_thread(answers, cancellation.cancel)

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

    def compress(
        self, question: str, passages: Iterable[str | Passage] = (), **options: Unpack[ReadingOptions]
    ) -> CompressedCache:
        """Reads passages under a question and returns the small cache, to be asked or saved.

        It holds the sentences that it keeps as text too, so that answers from it can quote them, unless the engine's
        ``quotes`` are switched off.

        Args:
            question: Decides what is kept.
            passages: See `ask`.
            options: What differs from the engine's settings for this call.

        Raises:
            InputError: Also if Finch cannot move the model's keys.
        """
        chosen, settings = with_store(self.runtime, question, as_passages(passages), self.settings.updated(options))
        request = resolve(self.runtime, question, chosen, settings)
        read = read_request(self.runtime, request)
        with memory_guard(self.model, f"a copy of a cache of {read.length} tokens"):
            cache = read.fork(0)
        if not isinstance(cache, CompressedCache):
            raise InputError(f"{self.name} keeps passages in a cache of its own ({self.runtime.no_loop}): use ask")
        cache.document = replace(cache.document, sentences=sentences_to_quote(self.runtime, request, cache))
        cache.whole = self.runtime.shared is None
        return cache

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
        request = resolve_cached(self.runtime, cache, question, self.settings.updated(options))
        return AnswerStream(self.runtime, request, cache).read()

    def rank(
        self, question: str, passages: Iterable[str | Passage] = (), **options: Unpack[ReadingOptions]
    ) -> list[Citation]:
        """All passages by the attention that the question pays to them: attention as a reranker.

        Args:
            question: The question.
            passages: Texts or `Passage` objects.
            options: What differs from the engine's settings for this call.

        Returns:
            One citation a passage, by falling share; ``index`` is its place in ``passages``.
        """
        chosen, settings = with_store(self.runtime, question, as_passages(passages), self.settings.updated(options))
        request = resolve(self.runtime, question, chosen, settings, ranks_only=True)
        with memory_guard(self.model, f"ranking {len(request.passages)} passages"):
            return citations(read_request(self.runtime, request))
