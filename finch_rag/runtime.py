"""What executes requests: a model with its rotation, retrieval heads and CUDA graphs. Safe to share between threads.

`finch_rag.resolving` makes the requests.
"""

from __future__ import annotations

import math
import threading
import time
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from .decode.constraint import JsonConstraint, JsonConstraints
from .decode.cuda_graphs import CudaGraphs
from .decode.generation import Decoder, Writer, end_tokens
from .decode.sampling import Sampling
from .errors import InputError, ModelError, NumericsError
from .heads.pairs import Heads
from .heads.stored import resolve_alone_heads, resolve_heads
from .models import compiling
from .models.attention import use_finch_attention
from .models.cache import CompressedCache
from .models.cached_document import CachedDocument, ReadingFigures
from .models.fingerprint import fingerprint
from .models.inspection import input_embedding, window_of
from .models.rope import KeyRotation
from .prefill.loop import prefill
from .prefill.planning import PrefillPlan, RetrievalHeads, chunk_within, default_chunk_size
from .prefill.scan import Prefilled, Steps
from .prefill.shortlists import prefill_best, prefill_shortlists, shortlist_tokens
from .prompts.builder import PromptBuilder
from .request import Cancellation, Progress, Request
from .store.figures import Added
from .store.opening import OpenStores
from .store.store import PassageStore

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
        stores: The stores that calls name by their folders.

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
        self._constraints = JsonConstraints(self.prompts, self._end_tokens)
        if compile_layers:
            compiling.compile_layers(model)
        self._found_heads: tuple[RetrievalHeads | None] | None = None
        self._found_alone_heads: RetrievalHeads | None = None
        self._finding_heads = threading.Lock()
        self.stores = OpenStores(self)

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

    def alone_heads(self, on_progress: Progress = lambda stage, done, total: None) -> RetrievalHeads:
        """The heads that rank passages that were read alone, by layer. Found on the first call if need be.

        Args:
            on_progress: Told of the stage "heads", and of the examples done and in all.
        """
        with self._finding_heads:
            if self._found_alone_heads is None:
                self._found_alone_heads = resolve_alone_heads(
                    self.model, self.tokenizer, self.name, lambda done, total: on_progress("heads", done, total)
                )
            return self._found_alone_heads

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

    def read(self, request: Request, *, ahead: bool = False) -> CompressedCache:
        """Reads the passages of a request into a cache that remembers them for citations and report.

        Args:
            request: One that reads passages.
            ahead: Whether the caller's next pass takes along what the cache may then have as ``unread``.

        Raises:
            NumericsError: If the model computes NaN.
            DeviceMemoryError: If the device runs out of memory.
        """
        request.cancellation.check()
        if request.store is not None and request.passages and request.plan is not None:
            return self._read_known(request, request.store, request.plan, ahead)
        plan = self.plan(request)
        start = time.perf_counter()
        prefilled = prefill(self.model, request.prompt, plan, self.rotation, request.on_step("prefill"), ahead=ahead)
        return self.remember(request, plan, prefilled, time.perf_counter() - start)

    def _read_known(self, request: Request, store: PassageStore, plan: PrefillPlan, ahead: bool) -> CompressedCache:
        """Reads what a store ranks best; it reads the passages that it does not know."""
        start = time.perf_counter()
        if known := request.searched.attention:
            added = Added([], sum(request.passage_tokens), 0)
            searching, attention = start, torch.tensor(known)
        else:
            added = store.add_encoded(
                request.passages, request.prompt.passages, request.on_step("store"), unique_ids=False
            )
            searching = time.perf_counter()
            attention = store.attention_to(request.question, added.hashes)
        searched = time.perf_counter()
        prefilled, used = self._read_ranked(request, plan, attention, ahead)
        return self.remember(
            request,
            used,
            prefilled,
            time.perf_counter() - start + request.searched.seconds,
            known_tokens=added.known_tokens,
            stored_tokens=added.read_tokens,
            store_seconds=searching - start,
            searched_tokens=request.searched.tokens,
            search_seconds=searched - searching + request.searched.seconds,
        )

    def _read_ranked(
        self, request: Request, plan: PrefillPlan, attention: torch.Tensor, ahead: bool
    ) -> tuple[Prefilled, PrefillPlan]:
        """What is read of passages that are ranked, and how: a shortlist by the loop, or the best at once."""
        steps = Steps(0, plan.chunk_size, 0)
        if plan.ranks_only:
            return Prefilled(CompressedCache(0, 0), attention, steps), plan
        shortlist = request.shortlist_tokens
        if shortlist is None:  # on a CPU the loop would take most of the time, see docs/benchmarks.md
            on_cpu = input_embedding(self.model).device.type == "cpu"
            shortlist = 0 if on_cpu else shortlist_tokens(plan.budget)
        if shortlist <= plan.budget:
            return prefill_best(self.model, request.prompt, attention, plan, steps, ahead=ahead), plan
        plan = self.plan(request)
        found = prefill_shortlists(
            self.model, [request.prompt], attention[None], steps, plan, self.rotation, tokens=shortlist, ahead=ahead
        )
        return found[0], plan

    def remember(
        self, request: Request, plan: PrefillPlan, prefilled: Prefilled, seconds: float, **figures: Any
    ) -> CompressedCache:
        """The cache of what was read, with the record of it.

        Args:
            request: What was asked for.
            plan: How it was read.
            prefilled: What was read.
            seconds: That it took.
            figures: What else `ReadingFigures` has.

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
                **figures,
            ),
            older_turns=request.older_turns,
        )
        return cache

    def constraint(self, sampling: Sampling) -> JsonConstraint | None:
        """What holds one answer to a JSON schema; None where it is free text.

        Args:
            sampling: How tokens are chosen.

        Raises:
            InputError: If an answer cannot be held to the schema.
            MissingExtraError: If llguidance is not installed.
            ModelError: If the tokenizer is one that llguidance cannot read.
        """
        return None if sampling.json_schema is None else self._constraints.of(sampling.json_schema)

    def writer(self, sampling: Sampling) -> Writer:
        """What makes an answer of the model's logits.

        Args:
            sampling: How tokens are chosen.
        """
        return Writer(sampling, self._end_tokens, self.prompts.decode, self.constraint(sampling))

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
            chunk_size=self.usual_chunk_size,
        )
