"""What a measuring process does: one way of reading a document, timed from the first passage to the answer.

full      one plain forward pass (SDPA) and its steps, as transformers runs them
finch     chunk by chunk into a small cache, and the recorded steps where there is a GPU
kvpress   kvpress' FinchPress: one forward pass, each layer compressed after it; needs its own environment
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache

from ..attention import use_finch_attention
from ..compiling import compile_layers
from ..engine import Finch
from ..errors import FinchError, InputError, MissingExtraError
from ..forward import memory_guard, on_device
from ..models import resolve_device, resolve_dtype
from ..planning import FixedTokens, PrefillPlan, RetrievalHeads, fit, window_of
from ..prefill import prefill
from ..prompt import Prompt
from ..reading import usual_chunk_size
from ..rope import KeyRotation
from ..step_graph import StepGraphs
from .clock import Clock
from .memory import in_use, peak_memory
from .peer_methods import compression_ratio
from .shapes import random_model, random_prompt, text_prompt, worst_heads

if TYPE_CHECKING:
    from transformers import PreTrainedModel

COMPILED = "finch-compiled"
_DECODED = 16  # tokens decoded to time a step
_WARM_UP_CHUNKS = 3
_WARM_UP_TOKENS = 2048
_RATE_TOKENS = 4096  # rows of the product that the matrix rate is measured on
_RATE_RUNS = 10


class SkippedError(Exception):
    """A case that cannot be measured here; the message says why."""


@dataclass(frozen=True, slots=True)
class Case:
    """One method at one length.

    Attributes:
        method: Of `METHODS`.
        tokens: Tokens of the passages.
        model: What `Finch.from_pretrained` takes; "" with a shape.
        shape: Of `finch_rag.bench.shapes.SHAPES`; "" with a model.
        budget: Document tokens in the cache, for those methods that compress.
        chunk_size: Finch's chunk size; 0 takes the default.
    """

    method: str
    tokens: int
    model: str
    shape: str
    budget: int
    chunk_size: int

    @property
    def by_finch(self) -> bool:
        """Whether Finch reads, with its attention and its recorded steps."""
        return self.method in ("finch", COMPILED)


@dataclass(frozen=True, slots=True)
class Run:
    """One measurement.

    Attributes:
        prefill_seconds: From the first passage to the cache that is answered from.
        first_token_seconds: From the first passage to the logits of the first answer token.
        decode_ms: Milliseconds of one decoding step, the median of some.
        peak_mib: Peak of memory beyond the loaded model.
        matrix_share: Products with the weights of the layers that ran, per second of ``prefill_seconds``, as a part
            of the rate that one such product reaches alone.
    """

    prefill_seconds: float
    first_token_seconds: float
    decode_ms: float
    peak_mib: float
    matrix_share: float


@dataclass(frozen=True)
class Subject:
    """The model that is measured.

    Attributes:
        model: On its device.
        rotation: How it rotates keys.
        heads: Its retrieval heads.
        graphs: Its recorded steps.
        prompt: Tokens of all passages -> a prompt.
        name: For messages.
    """

    model: PreTrainedModel
    rotation: KeyRotation
    heads: RetrievalHeads | None
    graphs: StepGraphs
    prompt: Callable[[int], Prompt]
    name: str

    @classmethod
    def of(cls, case: Case) -> Subject:
        """Loads the model of a case, or makes it."""
        if not case.shape:
            finch = Finch.from_pretrained(case.model, compile_layers=case.method == COMPILED)

            def prompt(tokens: int) -> Prompt:
                return text_prompt(finch, tokens)

            heads = finch.retrieval_heads()
            return cls(finch.model, finch.rotation, heads, finch.step_graphs, prompt, finch.name)
        device = resolve_device("auto")
        model = random_model(case.shape, device, resolve_dtype("auto", device, None))
        rotation = KeyRotation.of(model, window_of(model.config))
        use_finch_attention(model)
        heads = worst_heads(model)
        graphs = StepGraphs(model)
        if case.method == COMPILED:
            compile_layers(model)
        return cls(model, rotation, heads, graphs, lambda tokens: random_prompt(model, tokens), case.shape)


@dataclass(frozen=True, slots=True)
class Read:
    """A prompt in a cache.

    Attributes:
        cache: Any cache of transformers.
        logits: After the last token read; None where the question is not read yet.
        layer_tokens: Tokens that ran through a layer, summed over the layers.
    """

    cache: Any
    logits: torch.Tensor | None
    layer_tokens: int


class Measurement:
    """One case, loaded and warmed up.

    Args:
        case: What to measure.

    Raises:
        SkippedError: If the case cannot be measured on this machine.
    """

    def __init__(self, case: Case) -> None:
        self._case = case
        self._subject = Subject.of(case)
        model = self._subject.model
        if not case.by_finch:
            model.set_attn_implementation("sdpa")
            if case.tokens > (window := window_of(model.config)):
                raise SkippedError(f"the model's window is {window:,}")
        self._device: torch.device = model.device
        self._prompt = self._subject.prompt(case.tokens)
        self._loaded = in_use(self._device)
        warm_up = max(_WARM_UP_TOKENS, _WARM_UP_CHUNKS * plan_of(case, self._subject, self._prompt).chunk_size)
        self._measure(self._subject.prompt(min(case.tokens, warm_up)))
        self._rate = matrix_rate(model)

    def run(self) -> Run:
        """Measures once.

        Raises:
            SkippedError: If the device has not the memory.
        """
        with peak_memory(self._device, self._loaded) as peak:
            prefill_seconds, first_token_seconds, decode_ms, layer_tokens = self._measure(self._prompt)
        done = 2 * layer_tokens * sum(weight.numel() for weight in _layer_weights(self._subject.model))
        return Run(prefill_seconds, first_token_seconds, decode_ms, peak[0], done / prefill_seconds / self._rate)

    @torch.inference_mode()
    def _measure(self, prompt: Prompt) -> tuple[float, float, float, int]:
        """Seconds to the cache and to the first token's logits, milliseconds of a step, layers x tokens."""
        case, model = self._case, self._subject.model
        clock = Clock(self._device)
        try:
            with memory_guard(self._device, f"{case.method} on {case.tokens:,} tokens"):
                read = METHODS[case.method](self._subject, plan_of(case, self._subject, prompt), prompt)
                clock.mark()
                logits = read.logits
                if logits is None:
                    logits = _logits(model, read.cache, [*prompt.question, *prompt.tail])
                token = int(logits.argmax())
                clock.mark()
                steps = self._steps(read.cache, token)
        except FinchError as error:
            raise SkippedError(str(error)) from error
        prefill_seconds, question_seconds = clock.laps()
        return prefill_seconds, prefill_seconds + question_seconds, 1e3 * statistics.median(steps), read.layer_tokens

    def _steps(self, cache: Any, token: int) -> list[float]:
        graphs = self._subject.graphs
        with graphs.lend([cache], _DECODED) if self._case.by_finch else contextlib.nullcontext() as step:
            clock = Clock(self._device)
            for _ in range(_DECODED):
                logits = _logits(self._subject.model, cache, [token]) if step is None else step([token])
                token = int(logits.argmax())
                clock.mark()
        return clock.laps()


def plan_of(case: Case, subject: Subject, prompt: Prompt, new_tokens: int = _DECODED) -> PrefillPlan:
    """How Finch reads a prompt.

    Args:
        case: For budget and chunk size.
        subject: The model.
        prompt: The prompt.
        new_tokens: Tokens that will be decoded.
    """
    fixed = FixedTokens(len(prompt.prefix), len(prompt.question), len(prompt.tail), new_tokens)
    lengths = [len(passage) for passage in prompt.passages]
    sizes = case.budget, case.chunk_size or None, usual_chunk_size(subject.model), max(lengths), sum(lengths)
    budget, chunk_size = fit(window_of(subject.model.config), fixed, *sizes)
    return PrefillPlan(budget, chunk_size, "passage", subject.heads, reread=True)


def full(subject: Subject, plan: PrefillPlan, prompt: Prompt) -> Read:
    """One plain forward pass."""
    cache = DynamicCache()
    tokens = [*_document(prompt), *prompt.question, *prompt.tail]
    return Read(cache, _logits(subject.model, cache, tokens), len(tokens) * _layers(subject.model))


def finch(subject: Subject, plan: PrefillPlan, prompt: Prompt) -> Read:
    """Finch's two readings."""
    model = subject.model
    read = prefill(model, prompt, plan, subject.rotation)
    lengths = [len(passage) for passage in prompt.passages]
    scanned = plan.layers_to_scan(lengths, _layers(model))
    layer_tokens = (len(prompt.prefix) + sum(lengths) + read.steps.chunks * len(prompt.question)) * scanned
    if read.cache.kept_tokens < sum(lengths):
        layer_tokens += read.cache.length * _layers(model)
    return Read(read.cache.fork(len(prompt.question) + len(prompt.tail) + _DECODED), None, layer_tokens)


def kvpress(subject: Subject, plan: PrefillPlan, prompt: Prompt) -> Read:
    """Kvpress' FinchPress at the same cache size."""
    from kvpress.presses.finch_press import FinchPress

    document = _document(prompt)
    tokens = [*document, *prompt.question]
    press = FinchPress()
    press.compression_ratio = compression_ratio(len(tokens), len(prompt.prefix) + plan.budget + len(prompt.question))
    used = set(tokens)
    press.delimiter_token_id = next(i for i in range(int(subject.model.config.vocab_size)) if i not in used)
    cache = DynamicCache()
    ids = torch.tensor([[*document, press.delimiter_token_id, *prompt.question]], device=subject.model.device)
    with press(subject.model):
        subject.model.base_model(input_ids=ids, past_key_values=cache, use_cache=True)
    tail = torch.tensor([prompt.tail], device=subject.model.device)
    logits = subject.model(input_ids=tail, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    return Read(cache, logits, len(tokens) * _layers(subject.model))


METHODS: dict[str, Callable[[Subject, PrefillPlan, Prompt], Read]] = {
    "full": full,
    "finch": finch,
    COMPILED: finch,
    "kvpress": kvpress,
}


def check_methods(methods: Sequence[str]) -> None:
    """Raises if a method does not exist, or its package is not installed.

    Args:
        methods: What to measure.

    Raises:
        InputError: If there is no such method.
        MissingExtraError: If kvpress is not installed.
    """
    if unknown := [method for method in methods if method not in METHODS]:
        raise InputError(f"method {', '.join(unknown)} is unknown: use {', '.join(METHODS)}")
    if "kvpress" in methods:
        try:
            import kvpress  # noqa: F401
        except ImportError as error:
            raise MissingExtraError(
                "kvpress is not installed: it needs transformers below 5.3, so run this with the finch-rag of the "
                "environment .venv-peers, which 'make bench-peers' sets up"
            ) from error


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


def _layers(model: PreTrainedModel) -> int:
    return int(model.config.num_hidden_layers)


def _document(prompt: Prompt) -> list[int]:
    return [*prompt.prefix, *(token for passage in prompt.passages for token in passage)]


def _logits(model: PreTrainedModel, cache: Any, tokens: list[int]) -> torch.Tensor:
    ids = on_device(tokens, model.device)[None]
    logits: torch.Tensor = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    return logits
