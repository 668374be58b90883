"""The loop of Finch (arXiv 2408.00167): read a chunk, look at it with the question, keep what matters, go on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch

from .attention import input_embedding
from .cache import CompressedCache
from .chunking import plan_chunks
from .errors import DeviceMemoryError
from .forward import forward, memory_guard, on_device
from .scoring import QuestionObserver, passage_sums
from .selection import select_passages, select_to_reread, select_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .planning import PrefillPlan
    from .prompt import Prompt
    from .rope import KeyRotation

Progress = Callable[[int, int], None]  # document tokens read so far, and in all
Seen = TypeVar("Seen")

_SMALLEST_CHUNK = 64  # below, a step takes hardly less memory than the question alone

_log = logging.getLogger(__name__)


class Document(NamedTuple):
    """What is read chunk by chunk.

    Attributes:
        lengths: Tokens of each passage.
        chunk_size: The most tokens of a chunk.
        device: Where the model reads.
    """

    lengths: Sequence[int]
    chunk_size: int
    device: torch.device


class Steps(NamedTuple):
    """How a document was read.

    Attributes:
        chunks: Steps.
        chunk_size: Document tokens of a step at the end: the plan's, or less where the device's memory ran out.
    """

    chunks: int
    chunk_size: int


class Prefilled(NamedTuple):
    """What was read.

    Attributes:
        cache: Holds prefix and kept tokens.
        attention: What the question paid to each passage when the passage last competed, float32, shape [passages].
        steps: Of the first reading.
    """

    cache: CompressedCache
    attention: torch.Tensor
    steps: Steps


@torch.inference_mode()
def prefill(
    model: PreTrainedModel,
    prompt: Prompt,
    plan: PrefillPlan,
    rotation: KeyRotation,
    on_progress: Progress = lambda done, total: None,
) -> Prefilled:
    """Reads all passages into a cache of bounded size.

    Args:
        model: A model that runs Finch's attention.
        prompt: Prefix, passages and question as token ids.
        plan: Budget, chunk size and selection.
        rotation: How the model rotates keys.
        on_progress: Called with the document tokens read so far and in all. On an accelerator the last step may still
            be running.

    Raises:
        DeviceMemoryError: If the device has no memory for the smallest step.
    """
    reader = Reader(model, prompt, plan, rotation)

    def read(chunk: range) -> QuestionObserver:
        tokens, observer = reader.begin(chunk)
        forward(model, tokens, reader.cache, observer)
        return observer

    if not prompt.passages:
        forward(model, reader.prefix, reader.cache)
    document = Document(reader.lengths, plan.chunk_size, reader.device)
    steps = read_in_chunks(read, reader.settle, reader.cache, document, on_progress)
    if (tokens := reader.choose()) is not None:
        for piece in tokens.split(steps.chunk_size):
            forward(model, piece, reader.cache)
    return reader.result(steps)


def read_in_chunks(
    read: Callable[[range], Seen],
    settle: Callable[[range, Seen], None],
    cache: CompressedCache,
    document: Document,
    on_progress: Progress,
) -> Steps:
    """Reads a document chunk by chunk, in halves from where the device's memory runs out.

    Args:
        read: Appends a chunk, given by its document positions.
        settle: Keeps what matters of it, given what ``read`` returned.
        cache: What ``read`` appends to.
        document: What is read.
        on_progress: See `prefill`.
    """
    lengths, chunk_size, device = document
    steps = 0
    chunks = plan_chunks(lengths, chunk_size)
    before: torch.cuda.Event | None = None
    while chunks:
        chunk, filled = chunks[0], cache.length
        try:
            seen = read(chunk)
        except DeviceMemoryError:
            if len(chunk) < 2 * _SMALLEST_CHUNK:
                raise
            cache.crop_to(filled)
            while chunk_size >= len(chunk):
                chunk_size //= 2
            _log.warning(
                "%s has no memory for chunks of %d tokens: going on with chunks of %d", device, len(chunk), chunk_size
            )
            chunks = plan_chunks(lengths, chunk_size, chunk.start)
            continue
        settle(chunk, seen)
        if device.type == "cuda":  # one step ahead is enough, and leaves a cancelled call little to finish
            now = torch.cuda.current_stream(device).record_event()
            if before is not None:
                before.synchronize()
            before = now
        steps += 1
        on_progress(chunks.pop(0).stop, sum(lengths))
    return Steps(steps, chunk_size)


def document_of(passages: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """All passages' tokens and the passage of each, both of shape [tokens].

    Args:
        passages: Token ids of each.
        device: Where to put them.
    """
    document = on_device([token for passage in passages for token in passage], device)
    lengths = on_device([len(passage) for passage in passages], device)
    numbers = torch.arange(len(passages), device=device)
    return document, torch.repeat_interleave(numbers, lengths, output_size=len(document))


class Reader:
    """What one question keeps of the chunks that are read, and reads again.

    Everything that a step needs is on the device, and no step asks the device for a value, so that the host runs ahead
    and the device never waits.

    Args:
        model: A model that runs Finch's attention.
        prompt: Prefix, passages and question as token ids.
        plan: Budget, chunk size and selection.
        rotation: How the model rotates keys.

    Attributes:
        cache: Prefix, kept tokens, and what a step appends.
        lengths: Tokens of each passage.
        last: Last layer of the first reading; -1 where it takes all.
    """

    def __init__(self, model: PreTrainedModel, prompt: Prompt, plan: PrefillPlan, rotation: KeyRotation) -> None:
        self.device = input_embedding(model).device
        self.plan, self.rotation, self.rows = plan, rotation.on(self.device), prompt.question_rows
        self.lengths = [len(passage) for passage in prompt.passages]
        self.prefix, self.question = on_device(prompt.prefix, self.device), on_device(prompt.question, self.device)
        self.document, self.passage_of = document_of(prompt.passages, self.device)
        self.attention = torch.zeros(len(self.lengths), device=self.device)
        self.chooses_only = plan.chooses_only(self.lengths)
        self.layers = model.config.num_hidden_layers
        scanned = plan.layers_to_scan(self.lengths, self.layers)
        self.last = scanned - 1 if scanned < self.layers else -1
        longest = max(map(len, plan_chunks(self.lengths, plan.chunk_size)), default=0)
        kept = min(plan.budget, len(self.document))
        self.cache = CompressedCache(scanned, len(self.prefix) + kept + longest + len(self.question))
        self.cache.prefix, self.cache.kept = len(self.prefix), self.cache.kept.to(self.device)

    def begin(self, chunk: range) -> tuple[torch.Tensor, QuestionObserver]:
        """Tokens to append for a chunk, the prefix before the first one, and who has to look at them.

        Args:
            chunk: Document positions.
        """
        cache = self.cache
        parts = [self.document[chunk.start : chunk.stop], self.question]
        tokens = torch.cat([self.prefix, *parts] if cache.length == 0 else parts)
        evictable = slice(cache.prefix, cache.prefix + cache.kept_tokens + len(chunk))
        return tokens, QuestionObserver(len(self.question), self.rows, evictable, self.plan.heads, self.last)

    def settle(self, chunk: range, observer: QuestionObserver) -> None:
        """Evicts, once the chunk was looked at.

        Args:
            chunk: Document positions.
            observer: Has looked.
        """
        cache, plan = self.cache, self.plan
        cache.crop_to(observer.columns.stop)
        scores = observer.by_layer().to(self.device)  # [layers, kept + chunk]
        competing = self.passage_of[cache.document_positions(chunk)]  # [layers or 1, kept + chunk]
        present = passage_sums(torch.ones_like(scores), competing, len(self.lengths)).sum(0) > 0
        sums = passage_sums(scores, competing, len(self.lengths)).sum(0)
        self.attention = torch.where(present, sums, self.attention)
        index = self._select(scores, competing)
        if self.chooses_only and chunk.stop == len(self.document):  # no key will be looked at any more
            cache.kept = cache.document_positions(chunk).gather(1, index[None])
            return
        with memory_guard(self.device, f"moving the keys of {plan.budget} tokens"):
            cache.evict(index, chunk, self.rotation)

    def choose(self) -> torch.Tensor | None:
        """Tokens to read into the cache, now empty, as if there had never been others; None where it stays as it is."""
        self.attention = self.attention.cpu()
        if not self.plan.reread or self.cache.kept_tokens >= len(self.document):
            return None
        kept, passage_of = self.cache.kept[0].cpu(), self.passage_of.cpu()
        chosen = select_to_reread(kept, passage_of, self.attention, self.plan.budget, self.plan.cutoff)
        if not len(chosen):  # fragments make sense only with the keys and values of their first reading
            return None
        tokens = torch.cat((self.prefix, self.document[chosen.to(self.device)]))
        self.cache = CompressedCache(self.layers, len(tokens))
        self.cache.prefix, self.cache.kept = len(self.prefix), chosen[None]
        return tokens

    def result(self, steps: Steps) -> Prefilled:
        """What was read.

        Args:
            steps: Of the first reading.
        """
        self.cache.kept = self.cache.kept.cpu()
        return Prefilled(self.cache, self.attention, steps)

    def _select(self, scores: torch.Tensor, competing: torch.Tensor) -> torch.Tensor:
        if self.plan.selection == "token":
            return select_tokens(scores, self.plan.budget)
        return select_passages(scores.sum(0), competing[0], self.plan.budget, len(self.lengths))
