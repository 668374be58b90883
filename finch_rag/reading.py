"""One question's reading of passages: checked when it is built, run once."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from .attention import input_embedding
from .cache import CachedDocument, CompressedCache
from .errors import InputError, NumericsError
from .options import check_length, check_names, check_reading, chunk_tokens
from .planning import FixedTokens, PrefillPlan, chunk_within, default_chunk_size, fit
from .prefill import Prefilled, prefill

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .engine import Finch
    from .prompt import Passage, Prompt


class Reading:
    """Reads passages under a question.

    Args:
        finch: The engine.
        question: The question.
        passages: Checked passages.
        max_new_tokens: Room to leave for the answer.
        options: What differs from the engine's settings, see `finch_rag.options.ReadingOptions`.
        check: Called before the first step and after each; what it raises ends the reading.
        like: A reading of the same passages, whose token ids are taken.

    Attributes:
        prompt: Token ids.
        answer_prompt: Token ids to read behind the cache, before the answer.

    Raises:
        InputError: If question or options cannot work.
    """

    def __init__(
        self,
        finch: Finch,
        question: str,
        passages: Sequence[Passage],
        max_new_tokens: int,
        options: Mapping[str, Any],
        check: Callable[[], None] = lambda: None,
        like: Reading | None = None,
    ) -> None:
        check_names(options)
        self._check = check
        self._finch, self._question, self._passages = finch, question, passages
        self._selection = options.get("selection", finch.selection)
        self._on_progress = options.get("on_progress") or finch.on_progress
        self._reread = options.get("reread", finch.reread) and self._selection == "passage"
        budget, chunk_size = options.get("budget", finch.budget), options.get("chunk_size", finch.chunk_size)
        check_reading(budget, chunk_size, self._selection, InputError)
        self.prompt: Prompt = finch.prompts.build(
            question,
            passages,
            options.get("instructions", finch.instructions),
            options.get("system_prompt", finch.system_prompt),
            options.get("history", ()),
            options.get("render"),
            None if like is None else like.prompt.passages,
        )
        prompt = self.prompt
        check_length(sum(map(len, prompt.passages)), options.get("max_context_tokens"))
        self.answer_prompt = [*prompt.question, *prompt.tail]
        fixed = FixedTokens(len(prompt.prefix), len(prompt.question), len(prompt.tail), max_new_tokens)
        default = usual_chunk_size(finch.model)
        longest = max(map(len, prompt.passages), default=0) if self._selection == "passage" else 0
        document = sum(map(len, prompt.passages))
        sizes = budget, chunk_tokens(chunk_size), default, longest, document
        self._budget, self._chunk_size = fit(finch.window, fixed, *sizes)

    @cached_property
    def plan(self) -> PrefillPlan:
        """How the passages are read; finds the model's retrieval heads if need be."""
        heads = self._finch.retrieval_heads() if self._selection == "passage" and self._passages else None
        return PrefillPlan(self._budget, self._chunk_size, self._selection, heads, self._reread)

    def run(self) -> CompressedCache:
        """Reads the passages into a cache that remembers them for citations and report."""
        self._check()
        plan = self.plan
        start = time.perf_counter()
        read = prefill(self._finch.model, self.prompt, plan, self._finch.rotation, self.on_progress)
        return self.finish(read, time.perf_counter() - start)

    def on_progress(self, done: int, total: int) -> None:
        """Tells of document tokens read so far and in all, and ends a reading that is not wanted any more."""
        self._on_progress("prefill", done, total)
        self._check()

    def finish(self, read: Prefilled, seconds: float) -> CompressedCache:
        """The cache that remembers what was read.

        Args:
            read: By this reading's plan.
            seconds: That it took.

        Raises:
            NumericsError: If the model computed NaN.
        """
        finch, cache, attention = self._finch, read.cache, read.attention
        lengths = [len(passage) for passage in self.prompt.passages]
        total = float(attention.sum())
        if math.isnan(total):
            raise NumericsError("the model's attention is NaN: use dtype float32 or bfloat16, and check its weights")
        cache.document = CachedDocument(
            passage_ids=tuple(passage.id for passage in self._passages),
            titles=tuple(passage.title for passage in self._passages),
            passage_tokens=tuple(lengths),
            shares=tuple((attention / total if total else attention).tolist()),
            question=self._question,
            model=finch.fingerprint,
            figures={
                "model": finch.name,
                "selection": self._selection if self._passages else "none",
                "reread": self._reread,
                "heads": [[layer, head] for layer, its in (self.plan.heads or {}).items() for head in its],
                "budget": self._budget,
                "chunk_size": read.steps.chunk_size,
                "chunk_size_planned": self._chunk_size,
                "chunks": read.steps.chunks,
                "prefill_seconds": seconds,
            },
        )
        return cache


def usual_chunk_size(model: PreTrainedModel) -> int:
    """Document tokens that a model reads well in one step, by its device, its size and the memory that is free now.

    Args:
        model: On its device.
    """
    device = input_embedding(model).device
    chunk_size = default_chunk_size(device.type, model.config)
    if device.type != "cuda":
        return chunk_size
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch's, for later
    free = torch.cuda.mem_get_info(device)[0] + unused
    return chunk_within(free, chunk_size, model.config, model.dtype.itemsize)
