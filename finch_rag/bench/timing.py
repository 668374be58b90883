"""What a measuring process does: one way of reading a document, timed from the first passage to the answer.

The ways are in `finch_rag.bench.readings`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from ..engine import Finch
from ..errors import FinchError
from ..models.forward import memory_guard
from ..models.inspection import plain_attention, positions_of, text_config
from ..prefill.planning import Strategy
from ..prompts.builder import Prompt
from ..prompts.passages import Passage
from ..request import Request
from ..resolving import resolve_prompt
from ..settings import Settings
from .clock import Clock
from .memory import in_use, peak_memory
from .readings import COMPILED, READINGS, STORE_SHORTLISTS, STRATEGIES, Reading, from_store
from .shapes import (
    QUESTION,
    made_passages,
    random_finch,
    random_passages,
    random_prompt,
    text_prompt,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_DECODED = 16  # tokens decoded to time a step
_WARM_UP_CHUNKS = 3
_WARM_UP_TOKENS = 2048
_RATE_TOKENS = 4096  # rows of the product that the matrix rate is measured on
_RATE_RUNS = 10


class SkippedError(Exception):
    """A case that cannot be measured here; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedCase:
    """One method at one length.

    Attributes:
        method: Of `finch_rag.bench.readings.READINGS`.
        tokens: Tokens of the passages.
        model: What `Finch.from_pretrained` takes; "" with a shape.
        shape: Of `finch_rag.bench.shapes.SHAPES`; "" with a model.
        budget: Document tokens in the cache, for those methods that compress.
        chunk_size: Finch's chunk size; the default when None.
    """

    method: str
    tokens: int
    model: str
    shape: str
    budget: int
    chunk_size: int | None = None

    @property
    def by_finch(self) -> bool:
        """Whether Finch reads, with its attention and its CUDA graphs."""
        return self.method in STRATEGIES or self.by_store

    @property
    def by_store(self) -> bool:
        """Whether the document is known to a store."""
        return self.method in STORE_SHORTLISTS


@dataclass(frozen=True, slots=True)
class Run:
    """One measurement.

    Attributes:
        prefill_seconds: From the first passage to the cache that is answered from.
        first_token_seconds: From the first passage to the logits of the first answer token.
        decode_ms: Milliseconds of one decoding step, the median of some.
        peak_mib: Peak of memory beyond the loaded model.
        matrix_share: Products with the weights of the layers that ran, per second of ``prefill_seconds``, as a part
            of the rate that one such product reaches alone; None where it is not counted.
        add_seconds: Seconds in which a store read the document before; 0 for other methods.
        bytes_per_token: Bytes of a token's head keys in the store; 0 for other methods.
    """

    prefill_seconds: float
    first_token_seconds: float
    decode_ms: float
    peak_mib: float
    matrix_share: float | None
    add_seconds: float = 0.0
    bytes_per_token: int = 0


@dataclass(frozen=True)
class Subject:
    """The engine that is measured.

    Attributes:
        finch: On a loaded model, or on one with random weights.
        prompt: Tokens of all passages -> a prompt.
        passages: The same for the passages of a store.
    """

    finch: Finch
    prompt: Callable[[int], Prompt]
    passages: Callable[[int], list[Passage]]

    @classmethod
    def of(cls, *, model: str, shape: str, compile_layers: bool = False) -> Subject:
        """Loads a model, or makes one.

        Args:
            model: What `Finch.from_pretrained` takes; "" with a shape.
            shape: Of `finch_rag.bench.shapes.SHAPES`; "" with a model.
            compile_layers: See `finch_rag.Finch`.
        """
        if shape:
            finch = random_finch(shape, compile_layers)
            return cls(finch, lambda tokens: random_prompt(finch.model, tokens), random_passages)
        finch = Finch.from_pretrained(model, compile_layers=compile_layers)
        finch.retrieval_heads("alone")
        finch.retrieval_heads()  # found now, so that no measurement holds the search
        return cls(finch, lambda tokens: text_prompt(finch, tokens), lambda tokens: made_passages(finch, tokens))

    def settings(
        self, *, budget: int, chunk_size: int | None = None, strategy: Strategy = "auto", new_tokens: int
    ) -> Settings:
        """Settings of a call whose answer has all of its tokens: where a model would end it, it goes on.

        Args:
            budget: Document tokens kept.
            chunk_size: Document tokens of a step; the default when None.
            strategy: See `finch_rag.Finch`.
            new_tokens: Tokens of the answer.
        """
        options = {
            "budget": budget,
            "chunk_size": chunk_size,
            "strategy": strategy,
            "max_new_tokens": new_tokens,
        }
        settings = self.finch.settings.updated(options)
        return replace(settings, sampling=replace(settings.sampling, ignore_eos=True))

    def request(
        self,
        prompt: Prompt,
        *,
        budget: int,
        chunk_size: int | None = None,
        strategy: Strategy = "auto",
        new_tokens: int,
    ) -> Request:
        """A request to answer from a prompt, see `settings`.

        Args:
            prompt: What is read.
            budget: See `settings`.
            chunk_size: See `settings`.
            strategy: See `settings`.
            new_tokens: See `settings`.
        """
        settings = self.settings(budget=budget, chunk_size=chunk_size, strategy=strategy, new_tokens=new_tokens)
        return resolve_prompt(self.finch.runtime, prompt, settings)


class Measurement:
    """One case, loaded and warmed up.

    Args:
        case: What to measure.

    Raises:
        SkippedError: If the case cannot be measured on this machine.
    """

    def __init__(self, case: SpeedCase) -> None:
        self._case = case
        self.subject = Subject.of(model=case.model, shape=case.shape, compile_layers=case.method == COMPILED)
        model = self.subject.finch.model
        if not case.by_finch:
            model.set_attn_implementation(plain_attention(model))
            if case.tokens > (window := positions_of(text_config(model))):
                raise SkippedError(f"the model's window is {window:,}")
        self._device: torch.device = model.device
        self._rate = matrix_rate(model)
        if case.by_store:
            self._store = self.subject.finch.open_store()
            self._store.add(self.subject.passages(_WARM_UP_TOKENS))
            self._measure(self._from_store)
            self._store.clear()
            passages, clock = self.subject.passages(case.tokens), Clock(self._device)
            self._store.add(passages)
            clock.mark()
            (self._add_seconds,) = clock.laps()
            self._loaded = in_use(self._device)
            return
        self._prompt = self.subject.prompt(case.tokens)
        self._loaded = in_use(self._device)
        plan = self._request(self._prompt).plan
        chunks = _WARM_UP_CHUNKS * plan.chunk_size if plan is not None else 0
        warm_up = self.subject.prompt(min(case.tokens, max(_WARM_UP_TOKENS, chunks)))
        self._measure(lambda: self._of_prompt(warm_up))

    def run(self) -> Run:
        """Measures once.

        Raises:
            SkippedError: If the device has not the memory.
        """
        with peak_memory(self._device, self._loaded) as peak:
            read = self._from_store if self._case.by_store else lambda: self._of_prompt(self._prompt)
            prefill_seconds, first_token_seconds, decode_ms, layer_tokens = self._measure(read)
        run = Run(prefill_seconds, first_token_seconds, decode_ms, peak[0], None)
        if self._case.by_store:
            return replace(run, add_seconds=self._add_seconds, bytes_per_token=self._store.bytes_per_token)
        if layer_tokens is None:
            return run
        done = 2 * layer_tokens * sum(weight.numel() for weight in _layer_weights(self.subject.finch.model))
        return replace(run, matrix_share=done / prefill_seconds / self._rate)

    def _of_prompt(self, prompt: Prompt) -> Reading:
        return READINGS[self._case.method](self.subject.finch, self._request(prompt))

    def _from_store(self) -> Reading:
        case = self._case
        settings = self.subject.settings(budget=case.budget, chunk_size=case.chunk_size, new_tokens=_DECODED + 1)
        settings = replace(settings, shortlist_tokens=STORE_SHORTLISTS[case.method](case.budget))
        return from_store(self.subject.finch, self._store, QUESTION, settings)

    def _request(self, prompt: Prompt) -> Request:
        case = self._case
        return self.subject.request(
            prompt,
            budget=case.budget,
            chunk_size=case.chunk_size,
            strategy=STRATEGIES.get(case.method, "auto"),
            new_tokens=_DECODED + 1,
        )

    @torch.inference_mode()
    def _measure(self, read: Callable[[], Reading]) -> tuple[float, float, float, int | None]:
        """Seconds to the cache and to the first token, milliseconds of a further one, layers x tokens."""
        case = self._case
        clock = Clock(self._device)
        try:
            with memory_guard(self.subject.finch.model, f"{case.method} on {case.tokens:,} tokens"):
                reading = read()
                clock.mark()
                for _ in range(_DECODED + 1):
                    reading.step()
                    clock.mark()
        except FinchError as error:
            raise SkippedError(str(error)) from error
        prefill_seconds, first_token_seconds, *steps = clock.laps()
        step_ms = 1e3 * statistics.median(steps)
        return prefill_seconds, prefill_seconds + first_token_seconds, step_ms, reading.layer_tokens


def matrix_rate(model: PreTrainedModel) -> float:
    """Operations a second that the device reaches in a product of the model's widest weight.

    Args:
        model: The model.
    """
    weight = max(_layer_weights(model), key=lambda weight: weight.numel())
    rows = torch.randn(_RATE_TOKENS, weight.shape[1], device=weight.device, dtype=weight.dtype)
    seconds = []
    with torch.inference_mode():
        for _ in range(_RATE_RUNS):
            clock = Clock(rows.device)
            torch.nn.functional.linear(rows, weight)
            clock.mark()
            seconds += clock.laps()
    return 2 * _RATE_TOKENS * weight.numel() / statistics.median(seconds)


def _layer_weights(model: PreTrainedModel) -> list[torch.Tensor]:
    """The matrices that a token is multiplied with in the first layer; the others have the same shapes."""
    layers: Any = model.base_model.layers
    return [parameter for parameter in layers[0].parameters() if parameter.dim() == 2]
