"""Generating from a cache: sampling, stopping, streaming of text."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from .attention import input_embedding
from .errors import FinchError, InputError, NumericsError
from .prefill import memory_guard

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .cache import CompressedCache
    from .step_graph import StepGraphs

StopReason = Literal["eos", "stop", "length"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen and when generation ends.

    Attributes:
        max_new_tokens: The most tokens to generate, at least 1.
        temperature: 0 takes the likeliest token; above 0 samples.
        top_p: Sample only from the likeliest tokens whose probabilities sum to this, in (0, 1].
        top_k: Sample only from this many of the likeliest tokens.
        seed: Makes sampling repeatable.
        stop: Strings that end the answer; they are never shown.
        stop_token_ids: Tokens that end the answer as the model's own end tokens do.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()

    def check(self, error: type[FinchError] = InputError) -> None:
        """Raises ``error`` if a value is out of its range."""
        for name in ("max_new_tokens", "temperature"):
            if not isinstance(value := getattr(self, name), (int, float)):
                raise error(f"{name} is {value!r}: pass a number")
        if self.max_new_tokens < 1:
            raise error(f"max_new_tokens is {self.max_new_tokens}: the least is 1")
        if self.temperature < 0:
            raise error(f"temperature is {self.temperature}: the least is 0, which is greedy")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise error(f"top_p is {self.top_p}: it must be above 0 and at most 1")
        if self.top_k is not None and self.top_k < 1:
            raise error(f"top_k is {self.top_k}: the least is 1")
        if not all(self.stop):
            raise error("a stop string is empty: leave it out")


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that end an answer, by whichever of a model's files names them.

    Args:
        model: A model.
        tokenizer: Its tokenizer.
    """
    found: set[int] = set()
    for source in (model.generation_config, model.config, tokenizer):
        ids = getattr(source, "eos_token_id", None)
        found.update(ids if isinstance(ids, (list, tuple)) else [ids] if ids is not None else [])
    return frozenset(found)


class Decoder:
    """Generates an answer on top of a cache, as text deltas.

    Iterate it once. After that ``token_ids``, ``stop_reason`` and ``cancelled`` say what happened.

    Args:
        model: The model that filled the cache.
        cache: With room for the prompt and ``sampling.max_new_tokens``.
        prompt: Token ids to read before the answer, at least one.
        sampling: How tokens are chosen.
        eos_token_ids: Tokens that end the answer.
        detokenise: Token ids -> text.
        graphs: Recorded steps of the model; plain forward passes when None.
        cancelled: Asked before each token; the generation ends where it says yes.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: CompressedCache,
        prompt: Sequence[int],
        sampling: Sampling,
        eos_token_ids: frozenset[int],
        detokenise: Callable[[Sequence[int]], str],
        graphs: StepGraphs | None = None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> None:
        self._model = model
        self._graphs = graphs
        self._cache = cache
        self._prompt = list(prompt)
        self._sampling = sampling
        self._eos = eos_token_ids | frozenset(sampling.stop_token_ids)
        self._detokenise = detokenise
        self._asked_to_end = cancelled
        self.cancelled = False
        self.token_ids: list[int] = []
        self.stop_reason: StopReason = "length"

    def __iter__(self) -> Iterator[str]:
        return strip_stream(self._deltas())

    def _deltas(self) -> Iterator[str]:
        text = TextStream(self._detokenise)
        stopper = StopStrings(self._sampling.stop)
        for token in self._tokens():
            if token in self._eos:
                self.stop_reason = "eos"
                break
            if delta := stopper.push(text.push(token)):
                yield delta
            if stopper.stopped:
                break
        if not stopper.stopped and (delta := stopper.push(text.flush()) + stopper.flush()):
            yield delta
        if stopper.stopped:
            self.stop_reason = "stop"

    def _tokens(self) -> Iterator[int]:
        """Generated tokens, one forward pass each; the pass for a token runs when the next one is asked for."""
        pick = _sampler(self._sampling, self._model)
        with closing(self._logits()) as passes:
            for number in range(self._sampling.max_new_tokens):
                if self._asked_to_end():
                    self.cancelled = True
                    return
                logits = next(passes)
                token = self._checked(pick(logits), logits, number)
                self.token_ids.append(token)
                yield token

    def _logits(self) -> Generator[torch.Tensor, None, None]:
        """Logits after the prompt, then after each generated token; float32, shape [1, vocabulary]."""
        yield self._forward(self._prompt)
        graphs = self._graphs
        left = self._sampling.max_new_tokens - 1
        with nullcontext() if graphs is None else graphs.lend(self._cache, left) as step:
            while True:
                token = self.token_ids[-1]
                yield self._forward([token]) if step is None else step(token)

    @torch.inference_mode()
    def _forward(self, token_ids: list[int]) -> torch.Tensor:
        """Appends tokens to the cache; logits after the last of them, float32, shape [1, vocabulary]."""
        device = input_embedding(self._model).device
        with memory_guard(device, f"{len(token_ids)} tokens on a cache of {self._cache.length}"):
            output = self._model(
                input_ids=torch.tensor([token_ids], device=device),
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )
        logits: torch.Tensor = output.logits[:, -1].float()
        return logits

    def _checked(self, token: torch.Tensor, logits: torch.Tensor, number: int) -> int:
        """The token's id, in one transfer with the check of the logits that it was chosen by."""
        chosen, has_nan = torch.stack((token.view(()), logits.isnan().any().long())).tolist()
        if has_nan:
            raise NumericsError(
                f"the model's logits are NaN at token {number} of the answer: load it with dtype float32 or "
                "bfloat16, and check its weights"
            )
        return int(chosen)


def _sampler(sampling: Sampling, model: PreTrainedModel) -> Callable[[torch.Tensor], torch.Tensor]:
    """Logits of shape [1, vocabulary] -> a token's id, one element, on their device."""
    if sampling.temperature == 0:
        return lambda logits: logits.argmax(dim=-1)
    warpers: list[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = [
        TemperatureLogitsWarper(float(sampling.temperature))
    ]
    if sampling.top_k is not None:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p is not None:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    generator: torch.Generator | None = None

    def pick(logits: torch.Tensor) -> torch.Tensor:
        nonlocal generator
        logits = logits.nan_to_num(nan=0.0)  # reported with the token; sampling from NaN would break the device
        if generator is None:
            generator = torch.Generator(logits.device)
            if sampling.seed is not None:
                generator.manual_seed(sampling.seed)
            else:
                generator.seed()
        for warper in warpers:
            logits = warper(torch.empty(1, 0, dtype=torch.long), logits)
        return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)

    return pick


def strip_stream(deltas: Iterator[str]) -> Iterator[str]:
    """Deltas whose sum is the stripped sum of ``deltas``: white space waits until text follows it."""
    held, started = "", False
    for delta in deltas:
        text = held + delta if started else delta.lstrip()
        shown = text.rstrip()
        held = text[len(shown) :]
        if shown:
            started = True
            yield shown


class TextStream:
    """Tokens -> text deltas whose sum is the decoded text.

    A delta is held back while its end may be half a character (a multi-byte character can be split over tokens).
    Only a short window of tokens is decoded at each step, so a long answer costs linear time.

    Args:
        detokenise: Token ids -> text.
    """

    def __init__(self, detokenise: Callable[[Sequence[int]], str]) -> None:
        self._detokenise = detokenise
        self._tokens: list[int] = []
        self._window = 0  # first token that is decoded again: a token's text can depend on the one before it
        self._shown = 0  # tokens whose text has been handed out

    def push(self, token: int) -> str:
        """The text that became certain with this token."""
        self._tokens.append(token)
        delta = self._delta()
        if not delta or delta.endswith("\ufffd"):
            return ""
        self._window, self._shown = self._shown, len(self._tokens)
        return delta

    def flush(self) -> str:
        """The text held back, at the end."""
        delta = self._delta()
        self._window = self._shown = len(self._tokens)
        return delta

    def _delta(self) -> str:
        known = self._detokenise(self._tokens[self._window : self._shown])
        return self._detokenise(self._tokens[self._window :])[len(known) :]


class StopStrings:
    """Ends a stream of text before the first stop string, also when it arrives in pieces.

    Args:
        stops: The stop strings.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""  # text that may be the start of a stop string
        self.stopped = False

    def push(self, text: str) -> str:
        """The part of the text so far that can be shown."""
        self._held += text
        found = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            shown, self._held = self._held[: min(found)], ""
            return shown
        hold = max((self._overlap(stop) for stop in self._stops), default=0)
        cut = len(self._held) - hold
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def flush(self) -> str:
        """The text held back, at the end."""
        shown, self._held = self._held, ""
        return shown

    def _overlap(self, stop: str) -> int:
        """Characters at the end of the held text that a stop string starts with."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if stop.startswith(self._held[-n:])), 0)
