"""Budget and chunk size that fit a model's window. Integers only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import WindowError
from .selection import Selection

RetrievalHeads = Mapping[int, Sequence[int]]  # layer -> its heads

_CPU_CHUNK_SIZE = 1024  # longer chunks cost more attention than their larger matrix products save
_ACCELERATOR_CHUNK_SIZE = 4096  # shorter chunks starve the matrix units
# Heads of a narrower model than this lose sight of the right passage in long chunks: at a hidden size of 576 they find
# it first for .90 of the questions in chunks of 1,024, for .78 in chunks of 4,096 (see docs/benchmarks.md).
_SMALL_MODEL = 1024
_SMALLEST_DEFAULT_CHUNK = 256
_COPIES_OF_HIDDEN = 6
_LARGEST_DEFAULT_BUDGET = 2048
_SMALLEST_DEFAULT_BUDGET = 256

# A passage with less than this part of the best one's attention is not prefilled again: a question with one clear
# source is answered from that source alone, one that needs several gets them. Measured in docs/benchmarks.md.
CUTOFF = 0.25

ChunkSize = int | Literal["auto"] | None  # None says the same as "auto"


# "loop": every chunk is read behind what was kept of those before it, under the question. "independent": each passage
# is read alone. "auto": the one that answers better, see docs/benchmarks.md.
Strategy = Literal["auto", "loop", "independent"]

# "auto": the retriever's order counts beside the attention, as far as the two agree. "none": it counts for nothing.
Prior = Literal["auto", "none"]


@dataclass(frozen=True, slots=True)
class ReadingSettings:
    """How passages are read, as it was asked for.

    Attributes:
        budget: Document tokens kept per layer; None derives it from the window and the longest passage.
        chunk_size: Document tokens scanned per step; "auto" or None derives it from device, memory, model and window.
        strategy: How the passages are ranked, see `Strategy`.
        selection: What is kept: whole passages, or tokens layer by layer.
        reread: Whether the best passages are prefilled again at the end, and answered from alone.
        max_context_tokens: Refuse passages that have more tokens than this; None for no limit.
        cutoff: What got less than this part of the best passage's attention is not prefilled again; None for `CUTOFF`,
            or 0 where a text matters as a whole.
        prior: What the retriever's order counts beside the attention, see `Prior`.
        rounds: 2 has the best passages scanned once more, by the loop; 1 does not. None leaves it to the device.
        whole_text: The passages are one text that matters as a whole, as for a summary: keep as much of it as fits into
            the window, also what is far below the best passage, in its order.
    """

    budget: int | None = None
    chunk_size: ChunkSize = "auto"
    strategy: Strategy = "auto"
    selection: Selection = "passage"
    reread: bool = True
    max_context_tokens: int | None = None
    cutoff: float | None = None
    prior: Prior = "auto"
    rounds: int | None = None
    whole_text: bool = False

    @property
    def cutoff_part(self) -> float:
        """The part of the best passage's attention below which a passage is left out."""
        usual = 0.0 if self.whole_text else CUTOFF
        return usual if self.cutoff is None else self.cutoff

    @property
    def chunk_tokens(self) -> int | None:
        """Tokens of a chunk that were asked for; None where Finch chooses."""
        return None if self.chunk_size == "auto" else self.chunk_size


@dataclass(frozen=True, slots=True)
class PrefillPlan:
    """How one call reads its passages.

    Attributes:
        budget: Document tokens kept per layer.
        chunk_size: Document tokens scanned per step.
        selection: What is kept: whole passages, or tokens layer by layer.
        heads: Retrieval heads that rank passages; None takes all heads of all layers.
        reread: Prefill the best passages that fit whole into the budget again at the end, and them alone; needs layers
            that keep the same.
        ranks_only: Nothing is answered from the cache, so nothing is prefilled again.
        cutoff: Leave out of the re-prefill what got less than this part of the best passage's attention.
        finds_sources: Take another ``cutoff`` where several passages stand out together, see
            `finch_rag.prefill.sources`.
        in_order: Passages of the re-prefill stay in their order; else the best one comes last.
        strategy: How the passages are ranked, see `Strategy`; a store has read them independently.
        rounds: See `ReadingSettings`.
    """

    budget: int
    chunk_size: int
    selection: Selection
    heads: RetrievalHeads | None = None
    reread: bool = False
    ranks_only: bool = False
    cutoff: float = CUTOFF
    finds_sources: bool = False
    in_order: bool = False
    strategy: Literal["loop", "independent"] = "loop"
    rounds: int | None = None

    def chooses_only(self, passage_tokens: Sequence[int]) -> bool:
        """Whether the scan only chooses passages, so that nothing of its cache is answered from.

        That is so where nothing is answered at all; and where a re-prefill is certain to follow: something will be
        evicted, and every passage fits, so that the best one can be prefilled again.

        Args:
            passage_tokens: Tokens of each passage.
        """
        if self.ranks_only:
            return True
        return self.reread and max(passage_tokens, default=0) <= self.budget < sum(passage_tokens)

    def layers_to_scan(self, passage_tokens: Sequence[int], layers: int) -> int:
        """Layers that the scan needs.

        Where the scan only chooses, it ends at the last retrieval head.

        Args:
            passage_tokens: Tokens of each passage.
            layers: Layers of the model.
        """
        return max(self.heads) + 1 if self.heads and self.chooses_only(passage_tokens) else layers


@dataclass(frozen=True, slots=True)
class FixedTokens:
    """Tokens of a call that are never compressed.

    Attributes:
        prefix: Before the passages.
        question: Forwarded after each chunk.
        tail: Between question and answer.
        new: The most that will be generated; 0 where no answer follows.
    """

    prefix: int
    question: int
    tail: int
    new: int

    @property
    def total(self) -> int:
        """Positions that they take while the answer is generated."""
        return self.prefix + self.question + self.tail + self.new


def default_chunk_size(device_type: str, config: Any) -> int:
    """Tokens that a kind of device reads well in one step, and in which a model still finds what is asked for.

    Args:
        device_type: torch's name for it, such as "cpu" or "cuda".
        config: The model's configuration.
    """
    small = int(getattr(config, "hidden_size", _SMALL_MODEL)) < _SMALL_MODEL
    return _CPU_CHUNK_SIZE if device_type == "cpu" or small else _ACCELERATOR_CHUNK_SIZE


def chunk_within(memory: int, chunk_size: int, config: Any, element_bytes: int) -> int:
    """A chunk size whose step takes at most half of a device's free memory, by halving.

    A step holds some copies of its hidden states (queries, keys, values and sums among them), the two inner states of
    the MLP with their product, and its keys and values in every layer. The estimate is rough; where it is too low, a
    scan halves its chunks itself.

    Args:
        memory: Free bytes.
        chunk_size: To start from.
        config: The model's configuration.
        element_bytes: Of one number.
    """
    heads = int(config.num_attention_heads)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    inner = int(getattr(config, "intermediate_size", None) or 4 * config.hidden_size)
    states = _COPIES_OF_HIDDEN * int(config.hidden_size) + 3 * inner
    per_token = element_bytes * (states + 2 * int(config.num_hidden_layers) * kv_heads * head_dim)
    while chunk_size > _SMALLEST_DEFAULT_CHUNK and 2 * chunk_size * per_token > memory:
        chunk_size //= 2
    return chunk_size


def default_budget(window: int) -> int:
    """A thirty-second of the window, between 256 and 2,048 tokens: small caches answer better (docs/benchmarks.md).

    Args:
        window: Positions that the model has.
    """
    return min(_LARGEST_DEFAULT_BUDGET, max(_SMALLEST_DEFAULT_BUDGET, window // 32))


def check_fixed(fixed: FixedTokens, window: int, passages: int) -> None:
    """Raises a WindowError if what is never compressed does not fit, with both numbers and the cure.

    Args:
        fixed: Tokens that are never compressed.
        window: Positions that the model has.
        passages: The least room to leave for passages.
    """
    if window - fixed.total >= passages:
        return
    answer = f", the answer up to {fixed.new}" if fixed.new else ""
    cure = "shorten them or lower max_new_tokens" if fixed.new else "shorten them"
    left = "leaves no room in" if passages else "does not fit into"
    raise WindowError(
        f"the question takes {fixed.question + fixed.tail} tokens, the instructions {fixed.prefix}{answer}, which "
        f"{left} the model's window of {window}: {cure}"
    )


def fit(
    fixed: FixedTokens,
    *,
    window: int,
    budget: int | None,
    chunk_size: int | None,
    usual_chunk_size: int,
    longest_passage: int = 0,
    document: int = 0,
) -> tuple[int, int]:
    """Budget and chunk size of a call, checked before any forward pass.

    Args:
        fixed: Tokens that are never compressed.
        window: Positions that the model has.
        budget: Asked for; None derives it from the window, see `default_budget`, but any passage up to 2,048 tokens
            gets room.
        chunk_size: Asked for; None takes about ``usual_chunk_size``, so that chunks of whole passages come out even:
            a last chunk of a few tokens would take nearly as long as a full one.
        usual_chunk_size: What the device reads well in one step.
        longest_passage: Tokens of the longest passage, where whole ones are kept.
        document: Tokens of all passages; 0 where that is not known.

    Returns:
        The budget and the chunk size.

    Raises:
        WindowError: If something does not fit, with both numbers and the cure.
    """
    room = window - fixed.total
    check_fixed(fixed, window, passages=2)
    if budget is None:
        wanted = default_budget(window)
        if longest_passage <= _LARGEST_DEFAULT_BUDGET:
            wanted = max(wanted, longest_passage)
        budget = min(wanted, room // 2)
    if budget < 1:
        raise WindowError(f"budget is {budget}: the least is 1 token")
    if budget > room - 1:
        raise WindowError(
            f"budget {budget} is too large: beside instructions, question and answer ({fixed.total} tokens) the "
            f"model's window of {window} has room for {room - 1}: use budget={room - 1} or less"
        )
    largest_chunk = window - fixed.prefix - budget - fixed.question
    if chunk_size is None:
        steps = round(document / usual_chunk_size)
        even = -(-document // steps) + min(longest_passage, usual_chunk_size // 4) if steps else usual_chunk_size
        chunk_size = min(even, largest_chunk)
    if chunk_size < 1:
        raise WindowError(f"chunk_size is {chunk_size}: the least is 1 token")
    if chunk_size > largest_chunk:
        raise WindowError(
            f"chunk_size {chunk_size} is too large: beside a budget of {budget}, instructions and question the "
            f"model's window of {window} has room for {largest_chunk}: use chunk_size={largest_chunk} or less"
        )
    return budget, chunk_size
