"""Answers that are generated side by side, and begin and end at any step: continuous batching (Orca, OSDI 2022).

Each step is one pass for all of them, over caches of unequal length, so the weights are read once for all. On a GPU the
pass is a captured step whose places answers take and leave (`finch_rag.decode.static_step`).
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from ..errors import FinchError
from ..models.cache import CompressedCache
from ..models.forward import on_device, varlen_logits
from ..models.inspection import input_embedding
from ..models.kept_cache import KeptCache
from ..models.varlen import VarlenSequence
from .cuda_graphs import CudaGraphs
from .generation import Decoder, Writer
from .static_step import StaticStep

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(eq=False)
class RunningAnswer:
    """An answer that is being generated.

    Attributes:
        cache: With room for prompt and answer; what it has ``unread`` is read with the prompt.
        prompt: Token ids to read before the answer, at least one.
        writer: Makes the answer.
        new_tokens: The most tokens of it.
        tokens: The most tokens that it comes to, with all that was read.
        place: In the captured step; None where its tokens go to its cache.
        error: What ended it early.
    """

    cache: KeptCache
    prompt: Sequence[int]
    writer: Writer
    new_tokens: int
    tokens: int = field(init=False)
    place: int | None = None
    error: FinchError | None = None

    def __post_init__(self) -> None:
        self.tokens = self.cache.length + self.cache.unread_tokens + len(self.prompt) + self.new_tokens

    @property
    def ended(self) -> bool:
        """Whether no further step is needed."""
        return self.writer.ended or self.error is not None


_Passed = Iterator[tuple[RunningAnswer, torch.Tensor | FinchError]]  # logits, shape [1, vocabulary], or what failed


class RunningBatch:
    """Answers of one model that are generated side by side. One thread at a time uses it.

    Args:
        model: The model that filled the caches.
        graphs: CUDA graphs of the model.
        most: The most answers that a captured step serves; what comes beyond them runs by plain passes.
        chunk_size: Of caches of the model's own kind, see `finch_rag.decode.generation.Decoder`.

    Attributes:
        answers: Those that run.
    """

    def __init__(self, model: PreTrainedModel, graphs: CudaGraphs, *, most: int, chunk_size: int | None = None) -> None:
        self.answers: list[RunningAnswer] = []
        self._new: list[RunningAnswer] = []
        self._model, self._graphs = model, graphs
        self._most, self._chunk_size = most, chunk_size
        self._step: StaticStep | None = None
        self._passes: dict[RunningAnswer, Generator[torch.Tensor, None, None]] = {}  # of caches that can share none

    def join(self, answer: RunningAnswer) -> None:
        """Takes part from the next step on.

        Args:
            answer: Of which nothing is generated yet.
        """
        self.answers.append(answer)
        self._new.append(answer)

    def leave(self, answer: RunningAnswer) -> None:
        """Takes part no more; nothing happens where it has left already.

        Args:
            answer: One that has joined.
        """
        if answer not in self.answers:
            return
        self.answers.remove(answer)
        if answer in self._new:
            self._new.remove(answer)
        if answer in self._passes:
            self._passes.pop(answer).close()
        if self._step is None or answer.place is None:
            return
        self._step.clear(answer.place)
        answer.place = None
        if all(other.place is None for other in self.answers):
            self._graphs.give_back(self._step)
            self._step = None

    def step(self) -> list[tuple[RunningAnswer, str]]:
        """Generates a token of each answer.

        Returns:
            Each answer with the text that became certain, maybe none. Those that have ended, see
            `RunningAnswer.ended`, have left.
        """
        new, self._new = self._new, []
        older = [answer for answer in self.answers if answer not in new]
        # The prompts in a pass of their own: where memory runs out for them, the others go on.
        deltas = [*self._pushed(self._next_tokens(older)), *self._pushed(self._prompts(new))]
        for answer, _ in deltas:
            if answer.ended:
                self.leave(answer)
            elif answer in new:
                self._place(answer)
        return deltas

    def close(self) -> None:
        """Ends all answers."""
        for answer in list(self.answers):
            self.leave(answer)

    def _pushed(self, passed: _Passed) -> Iterator[tuple[RunningAnswer, str]]:
        for answer, logits in passed:
            delta = ""
            if isinstance(logits, FinchError):
                answer.error = logits
            else:
                try:
                    delta = answer.writer.push(logits)
                except FinchError as error:  # NaN, or a form that leaves no token: the others go on
                    answer.error = error
            yield answer, delta

    def _prompts(self, new: Sequence[RunningAnswer]) -> _Passed:
        """Logits after the prompts."""
        joinable = [answer for answer in new if isinstance(answer.cache, CompressedCache)]
        yield from self._joint_pass(joinable, [[*answer.cache.take_unread(), *answer.prompt] for answer in joinable])
        for answer in new:
            if answer not in joinable:
                decoder = Decoder(
                    self._model,
                    answer.cache,
                    answer.prompt,
                    answer.writer,
                    new_tokens=answer.new_tokens,
                    graphs=self._graphs,
                    chunk_size=self._chunk_size,
                )
                self._passes[answer] = decoder.logits()
                yield self._own_pass(answer)

    def _next_tokens(self, older: Sequence[RunningAnswer]) -> _Passed:
        """Logits after the last tokens."""
        placed = {answer.place: answer for answer in older if answer.place is not None}
        if self._step is not None and placed:
            tokens = [0] * self._step.answers
            for place, answer in placed.items():
                tokens[place] = answer.writer.token_ids[-1]
            rows = self._step(tokens).split(1)
            for place, answer in placed.items():
                yield answer, rows[place]
        rest = [answer for answer in older if answer.place is None]
        joinable = [answer for answer in rest if answer not in self._passes]
        yield from self._joint_pass(joinable, [answer.writer.token_ids[-1:] for answer in joinable])
        for answer in rest:
            if answer in self._passes:
                yield self._own_pass(answer)

    def _joint_pass(self, answers: Sequence[RunningAnswer], tokens: Sequence[Sequence[int]]) -> _Passed:
        """One pass that appends each answer's tokens to its cache."""
        if not answers:
            return
        device = input_embedding(self._model).device
        batch = [
            VarlenSequence.onto(answer.cache, on_device(own, device))
            for answer, own in zip(answers, tokens, strict=True)
            if isinstance(answer.cache, CompressedCache)
        ]
        try:
            with torch.inference_mode():
                logits = varlen_logits(self._model, batch)
        except FinchError as error:  # some layers have the tokens, others not: no answer can go on
            yield from ((answer, error) for answer in answers)
        else:
            yield from zip(answers, logits.split(1), strict=True)

    def _own_pass(self, answer: RunningAnswer) -> tuple[RunningAnswer, torch.Tensor | FinchError]:
        try:
            return answer, next(self._passes[answer])
        except FinchError as error:
            return answer, error

    def _place(self, answer: RunningAnswer) -> None:
        """Moves an answer whose prompt is read into the captured step, if there is one for it."""
        if answer in self._passes or not self._graphs.enabled:
            return
        placed = [other for other in self.answers if other.place is not None]
        step = self._step
        if step is None or answer.tokens > step.capacity or len(placed) == step.answers:
            step = self._larger(answer, placed)
        if step is None:
            return
        answer.place = min(set(range(step.answers)) - {other.place for other in placed})
        step.load_one(answer.place, answer.cache)

    def _larger(self, answer: RunningAnswer, placed: Sequence[RunningAnswer]) -> StaticStep | None:
        """A step with room for one answer more, to which those in the present one have moved; None if there is none."""
        places = 1 if not placed else self._most
        if len(placed) == places:
            return None
        step = self._graphs.take(answer.cache, places, max(each.tokens for each in (answer, *placed)))
        if not isinstance(step, StaticStep):
            return None
        for place in range(step.answers):
            step.clear(place)
        if self._step is not None:
            for place, other in enumerate(placed):
                if other.place is not None:
                    step.move_in(place, self._step, other.place)
                    other.place = place
            self._graphs.give_back(self._step)
        self._step = step
        return step
