"""The KV cache that Finch reads into: append, evict, fork, save and load.

A cache has room for a fixed number of tokens and is written in place, so its memory is known before the first forward.
Its tokens stand at contiguous positions: prefix, kept tokens, then what the current forward pass appends.

Every eviction re-rotates the kept keys. Rotating a rounded key again and again would drift in bfloat16, so each kept
token also keeps its *reference*: the key as the model first computed it, and its position then. Every re-rotation
starts there, in float32, and rounds once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from ..errors import InputError
from .attention import AppendedLength
from .finite import zero_or_nan
from .kept_cache import KeptCache
from .rope import KeyRotation
from .saved_cache import SavedCache, read_saved, write_saved


class CompressedLayer(CacheLayerMixin):
    """One layer's keys and values, in buffers of fixed capacity.

    Attributes:
        keys: Buffer, shape [1, kv_heads, capacity, head_dim]; the first ``length`` tokens are in use.
        values: Buffer of the same shape, up to its head_dim.
        length: Tokens in use.
        reference_keys: Kept tokens' keys as first computed, shape [1, kv_heads, kept, head_dim].
    """

    is_sliding = False

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.length = 0
        self.reference_keys: torch.Tensor | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocates the buffers in the shape, dtype and device of the first states."""
        self.keys = key_states.new_empty(*key_states.shape[:2], self.capacity, key_states.shape[-1])
        self.values = value_states.new_empty(*value_states.shape[:2], self.capacity, value_states.shape[-1])
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends states of shape [1, kv_heads, tokens, head_dim]; returns views of all in use."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self._buffers()
        if keys.device != key_states.device:  # it was loaded elsewhere than its model
            keys, values = keys.to(key_states.device), values.to(value_states.device)
            self.keys, self.values = keys, values
        end = self.length + key_states.shape[2]
        if end > self.capacity:
            raise InputError(f"the cache has room for {self.capacity} tokens, and the model appends up to {end}")
        keys[:, :, self.length : end] = key_states
        values[:, :, self.length : end] = value_states
        self.length = end
        return keys[:, :, :end], values[:, :, :end]

    def keep(self, index: torch.Tensor, prefix: int, re_rotate: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Keeps the prefix and the tokens at ``index``, at the positions right after it.

        Args:
            index: Tokens to keep, counted from the end of the prefix, ascending, shape [kept].
            prefix: Tokens at the start that always stay.
            re_rotate: The kept tokens' reference keys -> the same at their new positions.
        """
        keys, values = self._buffers()
        index = index.to(keys.device)
        if self.reference_keys is None:
            references = keys[:, :, prefix : self.length]
        else:
            fresh = keys[:, :, prefix + self.reference_keys.shape[2] : self.length]
            references = torch.cat((self.reference_keys, fresh), dim=2)
        self.reference_keys = references.index_select(2, index)
        end = prefix + index.shape[0]
        keys[:, :, prefix:end] = re_rotate(self.reference_keys)
        values[:, :, prefix:end] = values.index_select(2, index + prefix)
        self.length = end

    def crop_to(self, length: int) -> None:
        """Drops the tokens from ``length`` on."""
        self.length = min(self.length, length)

    def fork(self, capacity: int) -> CompressedLayer:
        """A copy of the tokens in use, with room for ``capacity`` tokens."""
        copy = CompressedLayer(capacity)
        if self.keys is None:  # nothing was read: no passages, and no prefix either
            return copy
        copy.update(*self.in_use())
        return copy

    def get_mask_sizes(self, query_length: int | torch.Tensor) -> tuple[int, int]:
        """Key tokens and their offset when so many are appended (up to transformers 5.2: tokens at positions)."""
        return AppendedLength.of(self.length, query_length), 0

    def get_seq_length(self) -> int:
        """Tokens in use."""
        return self.length

    def get_max_length(self) -> int:
        """The capacity."""
        return self.capacity

    def get_max_cache_shape(self) -> int:
        """The capacity, by the name that it had at first in transformers 5."""
        return self.get_max_length()

    def in_use(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the tokens in use, views of shape [1, kv_heads, length, head_dim]."""
        keys, values = self._buffers()
        return keys[:, :, : self.length], values[:, :, : self.length]

    def _buffers(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self.keys is None or self.values is None:
            raise InputError("the cache is empty: nothing was read into it yet")
        return self.keys, self.values


class CompressedCache(KeptCache):
    """A transformers cache of fixed capacity that holds a prefix and the kept tokens of a document.

    Args:
        layers: Layers of the model.
        capacity: Tokens that a layer has room for.
    """

    layers: list[CompressedLayer]  # type: ignore[assignment]  # narrower than transformers' own

    def __init__(self, layers: int, capacity: int) -> None:
        super().__init__(layers=[CompressedLayer(capacity) for _ in range(layers)])
        self._keep_nothing()
        self._positions = self.kept  # of the reference keys, of the same shape

    @property
    def length(self) -> int:
        """Tokens in use, the same in every layer."""
        return self.layers[0].length

    @property
    def bytes_per_token(self) -> int:
        """Bytes of keys and values that one token takes over all layers."""
        total = 0
        for layer in self.layers:
            for buffer in (layer.keys, layer.values):
                total += buffer.shape[1] * buffer.shape[3] * buffer.element_size() if buffer is not None else 0
        return total

    @property
    def shapes(self) -> tuple[tuple[int, int, int], ...]:
        """KV heads of each layer, with the head_dim of its keys and that of its values; none where nothing was read."""
        return tuple(
            (layer.keys.shape[1], layer.keys.shape[-1], layer.values.shape[-1])
            for layer in self.layers
            if layer.keys is not None and layer.values is not None
        )

    def zero_or_nan(self, device: torch.device) -> torch.Tensor:
        """See `KeptCache.zero_or_nan`; it reads all keys and values in use."""
        filled = [layer.in_use() for layer in self.layers if layer.length]
        return zero_or_nan((buffer for both in filled for buffer in both), device)

    def document_positions(self, appended: range) -> torch.Tensor:
        """Document positions of all evictable tokens, in the cache's order.

        Args:
            appended: Document positions of the chunk that the last forward pass appended.

        Returns:
            Shape [layers, kept + appended], or [1, ...] where all layers kept the same.
        """
        new = torch.arange(appended.start, appended.stop, device=self.kept.device).expand(self.kept.shape[0], -1)
        return torch.cat((self.kept, new), dim=1)

    def choose(self, index: torch.Tensor, appended: range) -> None:
        """Takes note of what is kept, where keys and values are not needed any more.

        Args:
            index: See `evict`.
            appended: See `evict`.
        """
        self.kept = _chosen(self.document_positions(appended), index if index.dim() == 2 else index[None])

    def evict(self, index: torch.Tensor, appended: range, rotation: KeyRotation) -> None:
        """Keeps the tokens at ``index`` of kept and appended ones, drops the rest and re-rotates what stays.

        Args:
            index: Tokens to keep, counted from the end of the prefix, ascending; shape [layers, n] or, for all
                layers alike, [n].
            appended: Document positions of the chunk that the last forward pass appended.
            rotation: How the model rotates keys.
        """
        fresh = torch.arange(self.prefix + self.kept_tokens, self.length, device=index.device)
        positions = torch.cat((self._positions.to(index.device), fresh.expand(self._positions.shape[0], -1)), dim=1)
        self.choose(index, appended)
        index = index if index.dim() == 2 else index[None]
        self._positions = _chosen(positions, index)
        new = torch.arange(self.prefix, self.prefix + index.shape[1], device=index.device)
        re_rotations = [rotation.between(old, new) for old in self._positions]
        for number, layer in enumerate(self.layers):
            re_rotation = re_rotations[number if len(re_rotations) > 1 else 0]
            re_rotate = partial(rotation.re_rotate, re_rotation=re_rotation, layer=number)
            layer.keep(index[number if index.shape[0] > 1 else 0], self.prefix, re_rotate)

    def crop_to(self, length: int) -> None:
        """Drops every layer's tokens from ``length`` on."""
        for layer in self.layers:
            layer.crop_to(length)

    def fork(self, room: int) -> CompressedCache:
        """A copy to decode on, so that this cache can be asked again.

        Args:
            room: Tokens that will be appended to the copy.
        """
        capacity = self.length + self.unread_tokens + room
        copy = CompressedCache(len(self.layers), capacity)
        copy.layers = [layer.fork(capacity) for layer in self.layers]
        copy._take_record(self)
        copy._refer_to_own_keys()
        return copy

    def _refer_to_own_keys(self) -> None:
        """Kept keys that came without references are their own: evictions go on from where they stand."""
        self._positions = torch.arange(self.prefix, self.prefix + self.kept_tokens)[None]

    def save(self, path: str | Path) -> None:
        """Writes the cache as one safetensors file.

        Args:
            path: File to write; an existing one is replaced, once the new one is complete.

        Raises:
            InputError: If it cannot be written, or other processes have a part of it.
        """
        if not self.whole:
            raise InputError(
                "the cache has the heads of one of several processes, and saving it is not supported under tensor "
                "parallelism: compress with device_map in place of tp_plan"
            )
        keys, values = zip(*(layer.in_use() for layer in self.layers), strict=True)
        write_saved(Path(path), SavedCache(list(keys), list(values), self.kept, self.prefix, self.document))

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> CompressedCache:
        """Reads a cache that ``save`` wrote. All of it is checked, whoever has written it.

        Args:
            path: The safetensors file.
            device: Device to put the cache on.

        Raises:
            InputError: If the file is missing, damaged or not a cache.
        """
        saved = read_saved(Path(path))
        cache = cls(len(saved.keys), saved.keys[0].shape[2])
        for layer, keys, values in zip(cache.layers, saved.keys, saved.values, strict=True):
            layer.update(keys.to(device), values.to(device))
        cache.prefix, cache.kept, cache.document = saved.prefix, saved.kept, saved.document
        cache._refer_to_own_keys()
        return cache


def _chosen(positions: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Positions at an index, each of shape [layers, n], or [1, n] where it is the same in all layers."""
    rows = max(positions.shape[0], index.shape[0])
    return positions.expand(rows, -1).gather(1, index.expand(rows, -1))
