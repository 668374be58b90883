"""Answers that are generated side by side, and begin and end at any step: continuous batching (Orca, OSDI 2022).

Each step is one pass for all of them, over caches of unequal length, so the weights are read once for all. On a GPU the
pass is a captured step whose places answers take and leave (`finch_rag.decode.static_step`). Caches of the model's own
kind share no pass: those answers are generated one after another, each by a captured step of its own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from ..errors import FinchError
from ..models.cache import CompressedCache
from ..models.forward import memory_guard, on_device, varlen_logits
from ..models.inspection import input_embedding
from ..models.kept_cache import KeptCache
from ..models.varlen import VarlenSequence
from .cuda_graphs import LARGEST, CudaGraphs
from .generation import Decoder, Writer, choose_together
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
        self._alone: deque[RunningAnswer] = deque()  # whose caches share no pass
        self._passes: Generator[torch.Tensor, None, None] | None = None  # of the first of them

    def join(self, answer: RunningAnswer) -> None:
        """Takes part from the next step on.

        Args:
            answer: Of which nothing is generated yet.
        """
        self.answers.append(answer)
        (self._new if isinstance(answer.cache, CompressedCache) else self._alone).append(answer)

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
        if answer in self._alone:
            if self._passes is not None and answer is self._alone[0]:
                self._passes.close()
                self._passes = None
            self._alone.remove(answer)
        if self._step is None or answer.place is None:
            return
        self._step.clear(answer.place)
        answer.place = None
        if all(other.place is None for other in self.answers):
            self._graphs.give_back(self._step)
            self._step = None

    def step(self, meanwhile: Callable[[], None] = lambda: None) -> list[tuple[RunningAnswer, str]]:
        """Generates a token of each answer; of those whose caches share no pass, of the first.

        Args:
            meanwhile: Called when a GPU has its work, before its tokens are waited for.

        Returns:
            Each of these answers with the text that became certain, maybe none. Those that have ended, see
            `RunningAnswer.ended`, have left.
        """
        new, self._new = self._new, []
        older = [answer for answer in self.answers if answer not in new and answer not in self._alone]
        # The prompts in a pass of their own: where memory runs out for them, the others go on.
        with memory_guard(self._model, f"a token of each of {len(self.answers)} answers"):
            deltas = [
                *self._pushed(self._next_tokens(older), meanwhile),
                *self._pushed(self._prompts(new), meanwhile),
                *self._pushed(self._next_alone(), meanwhile),
            ]
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

    def _pushed(self, passed: _Passed, meanwhile: Callable[[], None]) -> list[tuple[RunningAnswer, str]]:
        """The text that each answer's next token makes certain."""
        found = list(passed)
        rows = {answer: logits for answer, logits in found if isinstance(logits, torch.Tensor)}
        choices = dict(zip(rows, choose_together([own.writer for own in rows], [*rows.values()]), strict=True))
        deltas: dict[RunningAnswer, str] = {}
        chosen: list[tuple[RunningAnswer, torch.Tensor]] = []
        for answer, failed in found:
            choice = choices.get(answer, failed)
            deltas[answer] = ""
            if isinstance(choice, FinchError):
                answer.error = choice
            else:
                chosen.append((answer, choice))
        meanwhile()
        tokens = torch.stack([choice for _, choice in chosen]).tolist() if chosen else []  # one transfer for all
        for (answer, _), (token, broken) in zip(chosen, tokens, strict=True):
            try:
                deltas[answer] = answer.writer.take(token, bool(broken))
            except FinchError as error:  # NaN or infinity
                answer.error = error
        return list(deltas.items())

    def _prompts(self, new: Sequence[RunningAnswer]) -> _Passed:
        """Logits after the prompts."""
        passed = self._joint_pass(new, [[*answer.cache.take_unread(), *answer.prompt] for answer in new])
        for answer, logits in passed:
            yield answer, logits if isinstance(logits, FinchError) else logits + answer.cache.zero_or_nan(logits.device)

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
        loose = [answer for answer in older if answer.place is None]
        yield from self._joint_pass(loose, [answer.writer.token_ids[-1:] for answer in loose])

    def _next_alone(self) -> _Passed:
        """Logits of the first answer whose cache shares no pass."""
        if not self._alone:
            return
        answer = self._alone[0]
        if self._passes is None:
            decoder = Decoder(
                self._model,
                answer.cache,
                answer.prompt,
                answer.writer,
                new_tokens=answer.new_tokens,
                graphs=self._graphs,
                chunk_size=self._chunk_size,
            )
            self._passes = decoder.logits()
        try:
            logits: torch.Tensor | FinchError = next(self._passes)
        except FinchError as error:
            logits = error
        yield answer, logits

    def _joint_pass(self, answers: Sequence[RunningAnswer], tokens: Sequence[Sequence[int]]) -> _Passed:
        """One pass that appends each answer's tokens to its cache."""
        if not answers:
            return
        device = input_embedding(self._model).device
        try:
            with torch.inference_mode(), memory_guard(self._model, f"a token of each of {len(answers)} answers"):
                batch = [
                    VarlenSequence.onto(answer.cache, on_device(own, device))
                    for answer, own in zip(answers, tokens, strict=True)
                    if isinstance(answer.cache, CompressedCache)
                ]
                logits = varlen_logits(self._model, batch)
        except FinchError as error:  # some layers have the tokens, others not: no answer can go on
            yield from ((answer, error) for answer in answers)
        else:
            yield from zip(answers, logits.split(1), strict=True)

    def _place(self, answer: RunningAnswer) -> None:
        """Moves an answer whose prompt is read into the captured step, if there is one for it."""
        if not self._graphs.enabled:
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
        places = 1 if len(self.answers) == 1 else self._most
        if len(placed) >= places:
            return None
        tokens = max(each.tokens for each in (answer, *placed))
        if places > 1:  # with room for longer ones to come: a capture takes a second
            tokens = max(tokens, min(LARGEST, 1 << (tokens - 1).bit_length()))
        step = self._graphs.take(answer.cache, places, tokens)
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


def decode_many(
    model: PreTrainedModel,
    caches: Sequence[KeptCache],
    prompts: Sequence[Sequence[int]],
    writers: Sequence[Writer],
    *,
    new_tokens: Sequence[int],
    graphs: CudaGraphs,
    check: Callable[[], None] = lambda: None,
    chunk_size: int | None = None,
) -> list[str]:
    """Generates several answers side by side, to the end of the last.

    Args:
        model: The model that filled the caches.
        caches: One an answer, with room for its prompt and the answer.
        prompts: Token ids to read before each answer.
        writers: Make the answers.
        new_tokens: The most tokens of each answer.
        graphs: CUDA graphs of the model.
        check: Called before each step; what it raises ends the generation.
        chunk_size: Of caches of the model's own kind, see `Decoder`.

    Returns:
        The answers' texts.
    """
    batch = RunningBatch(model, graphs, most=len(caches), chunk_size=chunk_size)
    answers = [RunningAnswer(*each) for each in zip(caches, prompts, writers, new_tokens, strict=True)]
    texts = dict.fromkeys(answers, "")
    for answer in answers:
        batch.join(answer)
    with closing(batch):
        while batch.answers:
            check()
            for answer, delta in batch.step():
                if answer.error is not None:
                    raise answer.error
                texts[answer] += delta
    return [text.strip() for text in texts.values()]
