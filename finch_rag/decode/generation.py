"""Generation from a cache: one answer as a stream, or several side by side."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from typing import TYPE_CHECKING, Literal

import torch

from ..errors import FinchError, NumericsError
from ..models.cache import CompressedCache
from ..models.finite import CURE, not_finite
from ..models.forward import memory_guard, on_device, own_positions
from ..models.inspection import input_embedding
from ..models.kept_cache import KeptCache
from .constraint import JsonConstraint
from .cuda_graphs import CudaGraphs
from .detokenising import StopStrings, TextStream, strip_stream
from .sampling import Sampling, is_greedy, sampler
from .step import Step

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

StopReason = Literal["eos", "stop", "length"]


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


class Writer:
    """Makes an answer of logits, token by token.

    Args:
        sampling: How tokens are chosen, and when the answer ends.
        eos_token_ids: Tokens that end it.
        detokenise: Token ids -> text.
        constraint: Decides which tokens may come next, and when nothing may; all may when None.

    Attributes:
        greedy: Whether it takes the likeliest of all tokens.
        token_ids: Generated so far, the end token included.
        ended: Whether the answer is complete.
        stop_reason: Why it ended.
    """

    def __init__(
        self,
        sampling: Sampling,
        eos_token_ids: frozenset[int],
        detokenise: Callable[[Sequence[int]], str],
        constraint: JsonConstraint | None = None,
    ) -> None:
        self._pick = sampler(sampling)
        self._constraint = constraint
        self.greedy = constraint is None and is_greedy(sampling)
        own = frozenset() if sampling.ignore_eos else eos_token_ids
        free = constraint is None  # what is held to a form ends by it alone
        self._eos = own | frozenset(sampling.stop_token_ids if free else ())
        self._most = sampling.max_new_tokens
        self._text = TextStream(detokenise)
        self._stops = StopStrings(sampling.stop if free else ())
        self.token_ids: list[int] = []
        self.ended = False
        self.stop_reason: StopReason = "length"

    def push(self, logits: torch.Tensor) -> str:
        """Chooses the next token; returns the text that became certain, maybe none.

        Args:
            logits: Float32, shape [1, vocabulary].

        Raises:
            NumericsError: If one of them is NaN or infinite.
            InputError: If the constraint leaves no token.
        """
        token, broken = self.choose(logits).tolist()
        return self.take(token, bool(broken))

    def choose(self, logits: torch.Tensor) -> torch.Tensor:
        """The next token's id, and 1 where a logit is NaN or infinite, else 0: shape [2], on their device.

        The first half of `push`: several answers' tokens then come to the host in one transfer.

        Args:
            logits: Float32, shape [1, vocabulary].

        Raises:
            InputError: If the constraint leaves no token.
        """
        token = self._pick(logits if self._constraint is None else self._constraint.mask(logits))
        return torch.stack((token.view(()), not_finite(logits).long()))

    def take(self, token: int, broken: bool) -> str:
        """Appends a token; returns the text that became certain, maybe none.

        Args:
            token: That `choose` has chosen.
            broken: Whether one of its logits was NaN or infinite.

        Raises:
            NumericsError: If one was.
        """
        if broken:
            raise NumericsError(
                f"the model's logits are NaN or infinite at token {len(self.token_ids)} of the answer: {CURE}"
            )
        constraint = self._constraint
        complete = constraint is not None and constraint.take(token)
        self.token_ids.append(token)
        if token in self._eos:
            self.stop_reason = "eos"
            return self.end()
        text = self._stops.push(self._text.push(token))
        if complete:
            self.stop_reason = "eos"
        if complete or self._stops.stopped or len(self.token_ids) == self._most:
            text += self.end()
        return text

    def end(self) -> str:
        """Ends the answer; returns the text held back."""
        self.ended = True
        text = "" if self._stops.stopped else self._stops.push(self._text.flush()) + self._stops.flush()
        if self._stops.stopped:
            self.stop_reason = "stop"
        return text


def choose_together(writers: Sequence[Writer], logits: Sequence[torch.Tensor]) -> list[torch.Tensor | FinchError]:
    """What `Writer.choose` returns for each of several answers, or the error that it raises.

    The greedy ones choose by the same few kernels: on a GPU one answer's launches take longer than what they launch.

    Args:
        writers: Make the answers.
        logits: Of each, float32, shape [1, vocabulary].
    """
    chosen: list[torch.Tensor | FinchError] = []
    greedy = [rows for writer, rows in zip(writers, logits, strict=True) if writer.greedy]
    if greedy:
        together = torch.cat(greedy)
        likeliest = iter(torch.stack((together.argmax(-1), not_finite(together, -1).long()), dim=1))
    for writer, rows in zip(writers, logits, strict=True):
        try:
            chosen.append(next(likeliest) if writer.greedy else writer.choose(rows))
        except FinchError as error:  # a form that leaves no token: the others go on
            chosen.append(error)
    return chosen


class Decoder:
    """Generates an answer on top of a cache, as text deltas.

    Iterate it once, or its `steps`. After that ``writer`` and ``cancelled`` say what happened.

    Args:
        model: The model that filled the cache.
        cache: With room for the prompt and the answer; what it has ``unread`` is read with the prompt.
        prompt: Token ids to read before the answer, at least one.
        writer: Makes the answer.
        new_tokens: The most tokens of it.
        graphs: CUDA graphs of the model; plain forward passes when None.
        cancelled: Asked before each token; the generation ends where it says yes.
        chunk_size: The most tokens of the prompt in one pass; no limit when None.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: KeptCache,
        prompt: Sequence[int],
        writer: Writer,
        *,
        new_tokens: int,
        graphs: CudaGraphs | None = None,
        cancelled: Callable[[], bool] = lambda: False,
        chunk_size: int | None = None,
    ) -> None:
        self._model = model
        self._chunk_size = chunk_size
        self._graphs = graphs
        self._cache = cache
        self._prompt = list(prompt)
        self._new_tokens = new_tokens
        self._asked_to_end = cancelled
        self.writer = writer
        self.cancelled = False

    def __iter__(self) -> Generator[str, None, None]:
        return strip_stream(self.steps())

    def steps(self) -> Generator[str, None, None]:
        """One delta a token, maybe empty; the pass for a token runs when the next one is asked for."""
        with closing(self.logits()) as passes:
            while not self.writer.ended:
                if self._asked_to_end():
                    self.cancelled = True
                    yield self.writer.end()
                    return
                yield self.writer.push(next(passes))

    def logits(self) -> Generator[torch.Tensor, None, None]:
        """Logits after the prompt, then after each generated token; float32, shape [1, vocabulary]."""
        tokens = [*self._cache.take_unread(), *self._prompt]
        most = self._chunk_size or len(tokens)
        for start in range(0, len(tokens), most):
            logits = self._forward(tokens[start : start + most])
        yield logits + self._cache.zero_or_nan(logits.device)
        with self._lent() as step:
            while True:
                token = self.writer.token_ids[-1]
                yield self._forward([token]) if step is None else step([token])

    def _lent(self) -> AbstractContextManager[Step | None]:
        """A captured step, where there are graphs."""
        if self._graphs is None:
            return nullcontext()
        return self._graphs.lend([self._cache], self._new_tokens - 1)

    @torch.inference_mode()
    def _forward(self, token_ids: list[int]) -> torch.Tensor:
        """Appends tokens to the cache; logits after the last of them, float32, shape [1, vocabulary]."""
        device = input_embedding(self._model).device
        grows = not isinstance(self._cache, CompressedCache)
        positions = own_positions(self._model, self._cache, len(token_ids)) if grows else {}
        with memory_guard(self._model, f"{len(token_ids)} tokens on a cache of {self._cache.length}"):
            output = self._model(
                input_ids=on_device(token_ids, device)[None],
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
                **positions,
            )
        logits: torch.Tensor = output.logits[:, -1].float()
        return logits
