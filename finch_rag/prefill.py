"""The loop of Finch (arXiv 2408.00167): read a chunk, look at it with the question, keep what matters, go on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, NamedTuple

import torch

from .attention import SeenEnough, input_embedding
from .cache import CompressedCache
from .chunking import plan_chunks
from .errors import DeviceMemoryError
from .scoring import QuestionObserver, Until, passage_sums
from .selection import select_passages, select_to_reread, select_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .attention import Observer
    from .planning import PrefillPlan
    from .prompt import Prompt
    from .rope import KeyRotation

_SMALLEST_CHUNK = 64  # below, a step takes hardly less memory than the question alone

_log = logging.getLogger(__name__)


class Prefilled(NamedTuple):
    """What was read.

    Attributes:
        cache: Holds prefix and kept tokens.
        attention: What the question paid to each passage when the passage last competed, float32, shape [passages].
        chunks: Steps of the first reading.
        chunk_size: Document tokens of a step at its end: the plan's, or less where the device's memory ran out.
    """

    cache: CompressedCache
    attention: torch.Tensor
    chunks: int
    chunk_size: int


@torch.inference_mode()
def prefill(
    model: PreTrainedModel,
    prompt: Prompt,
    plan: PrefillPlan,
    rotation: KeyRotation,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
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
    reader = _Reader(model, prompt, plan, rotation)
    reader.scan(on_progress)
    attention = reader.attention.cpu()
    if plan.reread and reader.cache.kept_tokens < len(reader.document):
        kept, passage_of = reader.cache.kept[0].cpu(), reader.passage_of.cpu()
        chosen = select_to_reread(kept, passage_of, attention, plan.budget, plan.cutoff)
        if len(chosen):  # fragments make sense only with the keys and values of their first reading
            reader.read_again(chosen)
    reader.cache.kept = reader.cache.kept.cpu()
    return Prefilled(reader.cache, attention, reader.chunks, reader.chunk_size)


class _Reader:
    """Reads chunk by chunk, keeping what the question attends to; then, maybe, the best passages again.

    Everything that a step needs is on the device, and no step asks the device for a value, so that the host runs ahead
    and the device never waits.
    """

    def __init__(self, model: PreTrainedModel, prompt: Prompt, plan: PrefillPlan, rotation: KeyRotation) -> None:
        self.model, self.prompt, self.plan, self.rotation = model, prompt, plan, rotation
        self.device = input_embedding(model).device
        self.lengths = [len(passage) for passage in prompt.passages]
        self.document = self._tensor([token for passage in prompt.passages for token in passage])
        self.passage_of = torch.repeat_interleave(
            torch.arange(len(self.lengths), device=self.device),
            self._tensor(self.lengths),
            output_size=len(self.document),
        )
        self.question = self._tensor(prompt.question)
        self.attention = torch.zeros(len(self.lengths), device=self.device)
        self.chunks, self.chunk_size = 0, plan.chunk_size
        self.chooses_only = plan.chooses_only(self.lengths)
        layers = plan.layers_to_scan(self.lengths, model.config.num_hidden_layers)
        self.last = layers - 1 if layers < model.config.num_hidden_layers else -1
        longest = max(map(len, plan_chunks(self.lengths, plan.chunk_size)), default=0)
        kept = min(plan.budget, len(self.document))
        self.cache = CompressedCache(layers, len(prompt.prefix) + kept + longest + len(prompt.question))
        self.cache.kept = self.cache.kept.to(self.device)

    def scan(self, on_progress: Callable[[int, int], None]) -> None:
        """The first reading, of prefix and passages."""
        forward(self.model, self._tensor(self.prompt.prefix), self.cache, Until(self.last))
        self.cache.close_prefix()
        chunks = plan_chunks(self.lengths, self.chunk_size)
        before: torch.cuda.Event | None = None
        while chunks:
            if not self._read(chunks[0]):
                while self.chunk_size >= len(chunks[0]):
                    self.chunk_size //= 2
                _log.warning(
                    "%s has no memory for chunks of %d tokens: going on with chunks of %d",
                    *(self.device, len(chunks[0]), self.chunk_size),
                )
                chunks = plan_chunks(self.lengths, self.chunk_size, chunks[0].start)
                continue
            if self.device.type == "cuda":  # one step ahead is enough, and leaves a cancelled call little to finish
                now = torch.cuda.current_stream(self.device).record_event()
                if before is not None:
                    before.synchronize()
                before = now
            self.chunks += 1
            on_progress(chunks.pop(0).stop, len(self.document))

    def read_again(self, chosen: torch.Tensor) -> None:
        """Reads the chosen document positions as if there had never been others."""
        tokens = torch.cat((self._tensor(self.prompt.prefix), self.document[chosen.to(self.device)]))
        self.cache = CompressedCache(self.model.config.num_hidden_layers, len(tokens))
        for piece in tokens.split(self.chunk_size):
            forward(self.model, piece, self.cache)
        self.cache.prefix, self.cache.kept = len(self.prompt.prefix), chosen[None]

    def _read(self, chunk: range) -> bool:
        """Reads a chunk and evicts; no, with nothing changed, where the device has no memory but a part would do."""
        cache, plan = self.cache, self.plan
        start = cache.length
        evictable = slice(cache.prefix, start + len(chunk))
        observer = QuestionObserver(len(self.question), self.prompt.question_rows, evictable, plan.heads, self.last)
        try:
            forward(self.model, torch.cat((self.document[chunk.start : chunk.stop], self.question)), cache, observer)
        except DeviceMemoryError:
            if len(chunk) < 2 * _SMALLEST_CHUNK:
                raise
            cache.crop_to(start)
            return False
        cache.crop_to(start + len(chunk))

        scores = observer.by_layer().to(self.device)  # [layers, kept + chunk]
        competing = self.passage_of[cache.document_positions(chunk)]  # [layers or 1, kept + chunk]
        present = passage_sums(torch.ones_like(scores), competing, len(self.lengths)).sum(0) > 0
        sums = passage_sums(scores, competing, len(self.lengths)).sum(0)
        self.attention = torch.where(present, sums, self.attention)
        index = self._select(scores, competing)
        if self.chooses_only and chunk.stop == len(self.document):  # no key will be looked at any more
            cache.kept = cache.document_positions(chunk).gather(1, index[None])
            return True
        with memory_guard(self.device, f"moving the keys of {plan.budget} tokens"):
            cache.evict(index, chunk, self.rotation)
        return True

    def _select(self, scores: torch.Tensor, competing: torch.Tensor) -> torch.Tensor:
        if self.plan.selection == "token":
            return select_tokens(scores, self.plan.budget)
        return select_passages(scores.sum(0), competing[0], self.plan.budget, len(self.lengths))

    def _tensor(self, numbers: list[int]) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.long, device=self.device)


def forward(
    model: PreTrainedModel, token_ids: torch.Tensor, cache: CompressedCache, observer: Observer | None = None
) -> None:
    """Appends tokens to the cache, without computing logits.

    Args:
        model: A model that runs Finch's attention.
        token_ids: Shape [tokens]; nothing happens when there are none.
        cache: The cache to append to.
        observer: Is shown each layer's queries and keys, and may end the pass by raising `SeenEnough`.
    """
    if token_ids.numel() == 0:
        return
    device = input_embedding(model).device
    with memory_guard(device, f"{len(token_ids)} tokens on a cache of {cache.length}"), suppress(SeenEnough):
        model.base_model(
            input_ids=token_ids[None].to(device), past_key_values=cache, use_cache=True, finch_observer=observer
        )


@contextmanager
def memory_guard(device: torch.device, work: str) -> Iterator[None]:
    """Turns the device's out-of-memory error into one that says what to do.

    Args:
        device: Where the work runs.
        work: What was tried.
    """
    try:
        yield
    except RuntimeError as error:  # the CPU's allocator has no error class of its own
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        raise DeviceMemoryError(
            f"{device} has no memory left for {work}; use a smaller chunk_size, or a smaller budget"
        ) from error
