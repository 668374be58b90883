"""Many short sequences behind one prefix, in one forward pass and by one attention kernel.

A varlen batch (see `finch_rag.models.varlen`) takes the attention of each sequence by itself. Of passages of a hundred
tokens that is thousands of small kernels a pass: on a GPU a third of its time. Where there is a kernel that takes
sequences of any lengths at once, it is called once a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch

from .attention import causal_attention
from .cache import CompressedLayer
from .forward import on_device

# A layer's index and the keys of all sequences there, shape [kv_heads, tokens, head_dim]; may raise `SeenEnough`.
TakeKeys = Callable[[int, torch.Tensor], None]


class PackedBatch:
    """Attention of sequences that share a forward pass, each behind the same prefix.

    Args:
        lengths: Tokens of each sequence, in their order.
        prefix: Keys and values of the prefix by layer; empty where there is none.
        prefix_tokens: How many tokens it has.
        take_keys: Is shown the new keys of each layer before its attention is computed.
        device: Of the model.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        prefix: Sequence[CompressedLayer],
        prefix_tokens: int,
        take_keys: TakeKeys,
        device: torch.device,
    ) -> None:
        self._lengths, self._prefix, self._take_keys = list(lengths), prefix, take_keys
        self._key_lengths = [prefix_tokens + length for length in lengths]
        own = torch.arange(prefix_tokens, prefix_tokens + sum(lengths)).split(self._lengths)
        before = torch.arange(prefix_tokens)
        self._places = on_device(torch.cat([torch.cat((before, places)) for places in own]), device)
        self._query_ends = on_device([0, *self._lengths], device).cumsum(0, dtype=torch.int32)
        self._key_ends = on_device([0, *self._key_lengths], device).cumsum(0, dtype=torch.int32)

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """See `finch_rag.models.attention.VarlenAttention`.

        Raises:
            SeenEnough: If ``take_keys`` does.
        """
        self._take_keys(layer, key[0])
        if self._prefix:
            keys, values = self._prefix[layer].in_use()
            key = torch.cat((keys, key), dim=2).index_select(2, self._places)
            value = torch.cat((values, value), dim=2).index_select(2, self._places)
        if has_packed_kernel(query.device, query.dtype, query.shape[1], key.shape[1], query.shape[3]):
            q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))  # [tokens, heads, head_dim]
            longest = max(self._lengths), max(self._key_lengths)
            return packed_attention(q, k, v, (self._query_ends, self._key_ends), longest, scaling)[None]
        parts = zip(
            query.split(self._lengths, dim=2),
            key.split(self._key_lengths, dim=2),
            value.split(self._key_lengths, dim=2),
            strict=True,
        )
        outputs = [causal_attention(q, k, v, scaling) for q, k, v in parts]
        return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()


def packed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ends: tuple[torch.Tensor, torch.Tensor],
    longest: tuple[int, int],
    scaling: float,
) -> torch.Tensor:
    """Causal attention of several sequences, each of its last tokens on all of it, by one kernel.

    PyTorch's own flash attention for sequences of any lengths, by the operator that all its releases since 2.6 have;
    ``torch.nn.attention.varlen`` has it from 2.10 on, with other arguments in each release.

    Args:
        query: Shape [query tokens of all sequences, heads, head_dim].
        key: Shape [key tokens of all sequences, kv_heads, head_dim].
        value: Likewise.
        ends: Where the sequences end, of queries and keys, with 0 before them; int32, shape [sequences + 1] each.
        longest: The longest sequence's query and key tokens.
        scaling: Factor on the products.

    Returns:
        Shape [query tokens, heads, head_dim].
    """
    output: torch.Tensor = torch.ops.aten._flash_attention_forward(
        query, key, value, *ends, *longest, 0.0, True, False, scale=scaling
    )[0]
    return output


@cache
def has_packed_kernel(device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int) -> bool:
    """Whether `packed_attention` computes here what `causal_attention` does; tried once on small sequences.

    Args:
        device: Where it is to run.
        dtype: Of queries and keys.
        heads: Query heads.
        kv_heads: Key heads.
        head_dim: Of both.
    """
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return False
    generator = torch.Generator(device).manual_seed(0)
    lengths, before = (5, 1, 17), 3

    def states(count: int, tokens: int) -> torch.Tensor:
        return torch.randn(tokens, count, head_dim, device=device, generator=generator).to(dtype)

    key_lengths = [before + length for length in lengths]
    query = states(heads, sum(lengths))
    key, value = states(kv_heads, sum(key_lengths)), states(kv_heads, sum(key_lengths))
    ends = [
        torch.tensor([0, *each], device=device).cumsum(0, dtype=torch.int32) for each in (list(lengths), key_lengths)
    ]
    try:
        found = packed_attention(query, key, value, (ends[0], ends[1]), (max(lengths), max(key_lengths)), 0.1)
    except (RuntimeError, TypeError, AttributeError, NotImplementedError):
        return False
    parts = zip(query.split(list(lengths)), key.split(key_lengths), value.split(key_lengths), strict=True)
    expected = []
    for part in parts:
        q, k, v = (each.transpose(0, 1)[None] for each in part)
        expected.append(causal_attention(q, k, v, 0.1)[0].transpose(0, 1))
    return torch.allclose(found.float(), torch.cat(expected).float(), atol=0.05, rtol=0.05)
