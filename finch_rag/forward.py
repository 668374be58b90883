"""Forward passes: a sequence onto a cache, or several sequences side by side.

Side by side, the sequences are laid one behind the other. Whatever works on one token at a time (products with the
weights, norms) takes them as one; attention takes each by itself, see `Pack`. So there is no padding and no mask, and
the answers are those of one pass each, up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from .attention import AppendedLength, SeenEnough, causal_attention, input_embedding
from .errors import DeviceMemoryError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .attention import Observer
    from .cache import CompressedCache

# A layer's index and a sequence's keys and values there, each [1, kv_heads, tokens, head_dim] -> all that the sequence
# sees there, itself last.
Extend = Callable[[int, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class Segment:
    """One of several sequences in a forward pass.

    Attributes:
        token_ids: Shape [tokens].
        positions: Shape [tokens].
        extend: What it sees in a layer.
        observer: Is shown its queries and all keys that it sees.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    extend: Extend
    observer: Observer | None = None

    @classmethod
    def onto(cls, cache: CompressedCache, token_ids: torch.Tensor, observer: Observer | None = None) -> Segment:
        """A sequence that is appended to a cache of its own.

        Args:
            cache: The cache.
            token_ids: Shape [tokens].
            observer: See `Segment`.
        """
        start = cache.length
        positions = torch.arange(start, start + len(token_ids), device=token_ids.device)
        return cls(token_ids, positions, lambda layer, key, value: cache.layers[layer].update(key, value), observer)


class Pack:
    """Attention of sequences that share a forward pass, each by itself.

    Args:
        segments: The sequences.
    """

    def __init__(self, segments: Sequence[Segment]) -> None:
        self._segments = segments

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """The attention of one layer.

        Args:
            layer: Its index.
            query: Of all segments one behind the other, shape [1, heads, tokens, head_dim].
            key: Likewise, shape [1, kv_heads, tokens, head_dim].
            value: Likewise.
            scaling: Factor on the products.

        Returns:
            Shape [1, tokens, heads, head_dim].

        Raises:
            SeenEnough: If an observer does; every segment's keys and values have been taken by then.
        """
        lengths = [len(segment.token_ids) for segment in self._segments]
        queries, new_keys, new_values = (states.split(lengths, dim=2) for states in (query, key, value))
        outputs = []
        enough = False
        for number, segment in enumerate(self._segments):
            rows = queries[number]
            keys, values = segment.extend(layer, new_keys[number], new_values[number])
            try:
                if segment.observer is not None:
                    segment.observer(layer, rows, keys, scaling)
            except SeenEnough:
                enough = True
            else:
                outputs.append(causal_attention(rows, keys, values, scaling))
        if enough:
            raise SeenEnough
        return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()


class _PassingLayer(CacheLayerMixin):
    """Stands in a cache's place and hands keys and values on, to `Pack`."""

    is_sliding = False

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """There is nothing to make."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The states as they are."""
        return key_states, value_states

    def get_mask_sizes(self, query_length: int | torch.Tensor) -> tuple[int, int]:
        """No column beside those of the pass (up to transformers 5.2 it is told by the tokens' places)."""
        return AppendedLength.of(0, query_length), 0

    def get_seq_length(self) -> int:
        """Nothing is kept."""
        return 0

    def get_max_length(self) -> int:
        """No limit, as transformers writes it."""
        return -1

    def get_max_cache_shape(self) -> int:
        """The same by the name that it had at first in transformers 5."""
        return self.get_max_length()


def forward_packed(model: PreTrainedModel, segments: Sequence[Segment]) -> None:
    """One forward pass of several sequences, without computing logits.

    Args:
        model: A model that runs Finch's attention.
        segments: The sequences, in the order in which they are taken in each layer.

    Raises:
        DeviceMemoryError: If the device has no memory for it.
    """
    with _guard(model, segments), suppress(SeenEnough):
        model.base_model(**_inputs(model, segments))


def packed_logits(model: PreTrainedModel, segments: Sequence[Segment]) -> torch.Tensor:
    """Logits after the last token of each of several sequences, by one forward pass.

    Args:
        model: A model that runs Finch's attention.
        segments: The sequences.

    Returns:
        Float32, shape [segments, vocabulary].

    Raises:
        DeviceMemoryError: If the device has no memory for it.
    """
    lengths = on_device([len(segment.token_ids) for segment in segments], input_embedding(model).device)
    with _guard(model, segments):
        output = model(**_inputs(model, segments), logits_to_keep=lengths.cumsum(0) - 1)
    logits: torch.Tensor = output.logits[0].float()
    return logits


def _inputs(model: PreTrainedModel, segments: Sequence[Segment]) -> dict[str, Any]:
    device = input_embedding(model).device
    return {
        "input_ids": torch.cat([segment.token_ids for segment in segments])[None].to(device),
        "position_ids": torch.cat([segment.positions for segment in segments])[None].to(device),
        "past_key_values": Cache(layers=[_PassingLayer() for _ in range(model.config.num_hidden_layers)]),
        "use_cache": True,
        "finch_pack": Pack(segments),
    }


@contextmanager
def _guard(model: PreTrainedModel, segments: Sequence[Segment]) -> Iterator[None]:
    tokens = sum(len(segment.token_ids) for segment in segments)
    with memory_guard(input_embedding(model).device, f"{tokens} tokens in {len(segments)} sequences"):
        yield


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


def on_device(numbers: Sequence[int], device: torch.device) -> torch.Tensor:
    """Numbers on a device, without waiting for what it is busy with: a copy from pageable memory would.

    Args:
        numbers: Token ids or lengths.
        device: Where to put them.

    Returns:
        Int64, shape [numbers].
    """
    tensor = torch.tensor(numbers, dtype=torch.long)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


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
