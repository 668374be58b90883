"""What executes requests: a model with its rotation, retrieval heads and CUDA graphs. Safe to share between threads."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from .decode.cuda_graphs import CudaGraphs
from .decode.generation import Decoder, Writer, end_tokens
from .decode.sampling import Sampling
from .errors import InputError, ModelError, NumericsError, WindowError
from .heads.pairs import Heads
from .heads.stored import resolve_heads
from .models import compiling
from .models.attention import use_finch_attention
from .models.cache import CompressedCache
from .models.cached_document import CachedDocument, ReadingFigures
from .models.fingerprint import fingerprint
from .models.inspection import input_embedding, window_of
from .models.rope import KeyRotation
from .prefill.loop import prefill
from .prefill.planning import (
    FixedTokens,
    PrefillPlan,
    RetrievalHeads,
    chunk_within,
    default_chunk_size,
    fit,
)
from .prefill.scan import Prefilled
from .prompts.builder import Prompt, PromptBuilder
from .prompts.parsing import APART
from .prompts.passages import Passage
from .request import Cancellation, Progress, Request, check_length
from .settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_LOOKS_FOR_CANCELLATION = 0.05  # seconds, while another call finds the model's heads


class Runtime:
    """Executes requests on one model. A request keeps nothing in it.

    Args:
        model: A decoder-only transformers model with rotary positions. It is switched to Finch's attention function,
            which computes what SDPA computes.
        tokenizer: Its tokenizer.
        name: Name in reports; the model's own when None.
        heads: Heads that rank passages, checked; see `finch_rag.Finch`.
        compile_layers: See `finch_rag.Finch`.

    Attributes:
        window: Positions in which the model's attention is plain causal attention.
        rotation: How the model rotates keys.
        prompts: Builds its prompts.
        graphs: Its decoding steps as CUDA graphs.

    Raises:
        ModelError: If Finch cannot run the model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str | None = None,
        heads: Heads = "auto",
        compile_layers: bool = False,
    ) -> None:
        if getattr(model.config, "is_encoder_decoder", False):
            raise ModelError(f"{type(model).__name__} is an encoder-decoder; Finch runs decoder-only models")
        self.model, self.tokenizer, self.heads = model, tokenizer, heads
        self.name = name or str(getattr(model, "name_or_path", "") or type(model).__name__)
        self.window = window_of(model.config)
        self.rotation = KeyRotation.of(model, self.window)
        use_finch_attention(model)
        self.prompts = PromptBuilder(tokenizer)
        self.graphs = CudaGraphs(model)
        if compile_layers:
            compiling.compile_layers(model)
        self._found_heads: tuple[RetrievalHeads | None] | None = None
        self._finding_heads = threading.Lock()

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the model."""
        return fingerprint(self.model)

    @cached_property
    def _end_tokens(self) -> frozenset[int]:
        return end_tokens(self.model, self.tokenizer)

    @property
    def usual_chunk_size(self) -> int:
        """Document tokens that the model scans well in one step, by its device, its size and the memory free now."""
        device = input_embedding(self.model).device
        chunk_size = default_chunk_size(device.type, self.model.config)
        if device.type != "cuda":
            return chunk_size
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch's, for later
        free = torch.cuda.mem_get_info(device)[0] + unused
        return chunk_within(free, chunk_size, self.model.config, self.model.dtype.itemsize)

    def retrieval_heads(
        self, on_progress: Progress = lambda stage, done, total: None, cancellation: Cancellation | None = None
    ) -> RetrievalHeads | None:
        """The heads that rank passages, by layer; None when all are summed. Found on the first call if need be.

        Args:
            on_progress: Told of the stage "heads", and of the examples done and in all.
            cancellation: Asked after each example.
        """
        wanted = Cancellation() if cancellation is None else cancellation

        def tell(done: int, total: int) -> None:
            on_progress("heads", done, total)
            wanted.check()

        while self._found_heads is None:
            if not self._finding_heads.acquire(timeout=_LOOKS_FOR_CANCELLATION):
                wanted.check()
                continue
            try:
                if self._found_heads is None:
                    wanted.check()
                    self._found_heads = (resolve_heads(self.heads, self.model, self.tokenizer, self.name, tell),)
            finally:
                self._finding_heads.release()
        return self._found_heads[0]

    def request(
        self,
        question: str,
        passages: Sequence[Passage],
        settings: Settings,
        *,
        ranks_only: bool = False,
        like: Request | None = None,
        parse_mode: str = APART,
        cancellation: Cancellation | None = None,
    ) -> Request:
        """Resolves a call; nothing is read yet.

        Args:
            question: The question.
            passages: Checked passages.
            settings: Of the call.
            ranks_only: Whether the passages are only ranked, and nothing is answered.
            like: A request with the same passages, whose token ids are taken.
            parse_mode: How passages and question were told apart.
            cancellation: Asked at each step.

        Raises:
            InputError: If question or settings cannot work with this model.
        """
        own = settings.prompt
        encoded = None if like is None else like.prompt.passages
        prompt = self.prompts.build(
            question, passages, own.instructions, own.system_prompt, own.history, own.render, encoded
        )
        return self.request_of(
            prompt,
            settings,
            question=question,
            passages=passages,
            ranks_only=ranks_only,
            parse_mode=parse_mode,
            cancellation=cancellation,
        )

    def request_of(
        self,
        prompt: Prompt,
        settings: Settings,
        *,
        question: str = "",
        passages: Sequence[Passage] | None = None,
        ranks_only: bool = False,
        parse_mode: str = APART,
        cancellation: Cancellation | None = None,
    ) -> Request:
        """Resolves a call whose prompt is built.

        Args:
            prompt: Token ids.
            settings: Of the call.
            question: For the record.
            passages: Those of the prompt; nameless ones when None.
            ranks_only: See `request`.
            parse_mode: See `request`.
            cancellation: See `request`.

        Raises:
            WindowError: If something does not fit into the window.
            InputError: If the passages have more tokens than the settings allow.
        """
        reading, sampling = settings.reading, settings.sampling
        if ranks_only:
            sampling = replace(sampling, max_new_tokens=0)
        lengths = [len(passage) for passage in prompt.passages]
        check_length(sum(lengths), reading.max_context_tokens)
        whole = reading.selection == "passage"
        budget, chunk_size = fit(
            FixedTokens(len(prompt.prefix), len(prompt.question), len(prompt.tail), sampling.max_new_tokens),
            window=self.window,
            budget=reading.budget,
            chunk_size=reading.chunk_tokens,
            usual_chunk_size=self.usual_chunk_size,
            longest_passage=max(lengths, default=0) if whole else 0,
            document=sum(lengths),
        )
        reread = reading.reread and whole
        plan = PrefillPlan(budget, chunk_size, reading.selection, reread=reread, ranks_only=ranks_only)
        return Request(
            question=question,
            passages=[Passage("") for _ in lengths] if passages is None else passages,
            prompt=prompt,
            plan=plan,
            sampling=sampling,
            on_progress=settings.on_progress,
            cancellation=Cancellation() if cancellation is None else cancellation,
            parse_mode=parse_mode,
        )

    def request_cached(self, cache: CompressedCache, question: str | None, sampling: Sampling) -> Request:
        """Resolves a question to a cache.

        Args:
            cache: That `read` made, with this model.
            question: The one that the cache was compressed under when None.
            sampling: How the answer is generated.

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
        asked = cache.document.question if question is None else question
        prompt = self.prompts.build(asked, [])
        fixed = FixedTokens(cache.length, len(prompt.question), len(prompt.tail), sampling.max_new_tokens)
        if fixed.total > self.window:
            raise WindowError(
                f"the cache has {cache.length} tokens, the question {fixed.question + fixed.tail} and the answer up to "
                f"{fixed.new}, more than the window of {self.window}: shorten the question or lower max_new_tokens"
            )
        return Request(asked, (), prompt, None, sampling, Settings().on_progress)

    def plan(self, request: Request) -> PrefillPlan:
        """How a request's passages are read; finds the model's retrieval heads if need be.

        Args:
            request: One that reads passages.
        """
        if request.plan is None:
            raise InputError("the request has no passages to read: it answers from a cache")
        if request.plan.selection == "token" or not request.passages:
            return request.plan
        return replace(request.plan, heads=self.retrieval_heads(request.on_progress, request.cancellation))

    def read(self, request: Request) -> CompressedCache:
        """Reads the passages of a request into a cache that remembers them for citations and report.

        Args:
            request: One that reads passages.

        Raises:
            NumericsError: If the model computes NaN.
            DeviceMemoryError: If the device runs out of memory.
        """
        request.cancellation.check()
        plan = self.plan(request)
        start = time.perf_counter()
        prefilled = prefill(self.model, request.prompt, plan, self.rotation, request.on_step("prefill"))
        return self.remember(request, plan, prefilled, time.perf_counter() - start)

    def remember(self, request: Request, plan: PrefillPlan, prefilled: Prefilled, seconds: float) -> CompressedCache:
        """The cache of what was read, with the record of it.

        Args:
            request: What was asked for.
            plan: How it was read.
            prefilled: What was read.
            seconds: That it took.

        Raises:
            NumericsError: If the model computed NaN.
        """
        cache, attention = prefilled.cache, prefilled.attention.cpu()
        total = float(attention.sum())
        if math.isnan(total):
            raise NumericsError("the model's attention is NaN: use dtype float32 or bfloat16, and check its weights")
        cache.document = CachedDocument(
            passage_ids=tuple(passage.id for passage in request.passages),
            titles=tuple(passage.title for passage in request.passages),
            passage_tokens=tuple(request.passage_tokens),
            shares=tuple((attention / total if total else attention).tolist()),
            question=request.question,
            model=self.fingerprint,
            figures=ReadingFigures(
                model=self.name,
                selection=plan.selection if request.passages else "none",
                reread=plan.reread,
                heads=tuple((layer, head) for layer, heads in (plan.heads or {}).items() for head in heads),
                budget=plan.budget,
                chunk_size=prefilled.steps.chunk_size,
                chunk_size_planned=plan.chunk_size,
                chunks=prefilled.steps.chunks,
                scanned_layers=prefilled.steps.layers,
                prefill_seconds=seconds,
            ),
        )
        return cache

    def writer(self, sampling: Sampling) -> Writer:
        """What makes an answer of the model's logits.

        Args:
            sampling: How tokens are chosen.
        """
        return Writer(sampling, self._end_tokens, self.prompts.decode)

    def decoder(self, cache: CompressedCache, request: Request) -> Decoder:
        """The generation of a request's answer.

        Args:
            cache: With room for question and answer; they are appended to it.
            request: The request.
        """
        return Decoder(
            self.model,
            cache,
            request.answer_prompt,
            self.writer(request.sampling),
            new_tokens=request.sampling.max_new_tokens,
            graphs=self.graphs,
            cancelled=request.cancellation.is_cancelled,
        )
