"""Attention of one new token of each of some answers to its cache."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .products import Norm

# Columns of the cache that a program reads at a time, its warps, and the programs, about one a multiprocessor of a
# large GPU. Of 48 cuts this one took the least time over four cases (an 8B and a 1.5B shape, 400 to 2,100 tokens, one
# H100): 7.1 to 10.9 us a layer, within 13% of the best for each.
_COLUMNS, _WARPS, _PROGRAMS = 64, 8, 128
# Of several answers together: their caches are of unequal length, so that some programs end early. A step of 16 answers
# of 2,200 tokens (8B shape, one H200) takes 7.2 ms with 128, 6.9 with 256, 7.0 with 512, 7.1 with 1,024.
_PROGRAMS_OF_SEVERAL = 512
_LEAST_HEADS = 16  # the fewest rows that a matrix unit takes


@dataclass(frozen=True, slots=True)
class Partial:
    """What the programs of `attend` leave for those that join them; the cache is split among them.

    Attributes:
        sums: Weighted values, shape [answers, kv_heads, splits, group, head_dim], float32.
        peaks: Largest products, shape [answers, kv_heads, splits, group], float32.
        totals: Sums of the weights, of the same shape.
    """

    sums: torch.Tensor
    peaks: torch.Tensor
    totals: torch.Tensor

    @classmethod
    def empty(cls, answers: int, heads: int, kv_heads: int, head_dim: int, device: torch.device) -> Partial:
        """Room for a layer of so many heads."""
        programs = _PROGRAMS if answers == 1 else _PROGRAMS_OF_SEVERAL
        splits = triton.next_power_of_2(triton.cdiv(programs, answers * kv_heads))
        shape = answers, kv_heads, splits, heads // kv_heads
        sums = torch.empty(*shape, head_dim, device=device)
        return cls(sums, torch.empty(shape, device=device), torch.empty(shape, device=device))


def attend(
    qkv: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor],
    keys: torch.Tensor,
    values: torch.Tensor,
    position: torch.Tensor,
    partial: Partial,
    out: torch.Tensor,
    scaling: float,
    norms: tuple[Norm, Norm] | None = None,
) -> None:
    """Rotates a token's query and key, writes key and value into the cache, and attends to it up to the token.

    The cache's tokens are split among programs whose results are joined, as in Flash-Decoding (Dao et al., 2023).

    Args:
        qkv: Of each answer queries of all heads, keys of all KV heads and their values, joined; contiguous.
        rotary: Cosine and sine at each token's position, each of ``answers * head_dim`` elements.
        keys: The layer's buffer, shape [answers, kv_heads, capacity, head_dim].
        values: Buffer of the same shape.
        position: Each token's place in its cache, shape [answers].
        partial: Room for what is joined.
        out: Of each answer ``heads * head_dim`` elements; contiguous.
        scaling: Factor on the products.
        norms: Of a query and of a key, before they are rotated; None without.
    """
    answers, kv_heads, splits, group, head_dim = partial.sums.shape
    query_norm, key_norm = norms or (None, None)
    _attend[(kv_heads, splits, answers)](
        qkv,
        None if query_norm is None else query_norm.weight,
        None if key_norm is None else key_norm.weight,
        *rotary,
        keys,
        values,
        position,
        partial.sums,
        partial.peaks,
        partial.totals,
        keys.shape[2],
        scaling * math.log2(math.e),
        0.0 if query_norm is None else query_norm.eps,
        HAS_NORM=norms is not None,
        KV_HEADS=kv_heads,
        SPLITS=splits,
        GROUP=group,
        HEADS=max(_LEAST_HEADS, triton.next_power_of_2(group)),
        DIM=head_dim,
        COLUMNS=_COLUMNS,
        PRECISION="ieee" if keys.dtype == torch.float32 else "tf32",  # of float32 alone
        num_warps=_WARPS,
    )
    _join[(kv_heads * group, answers)](
        partial.sums, partial.peaks, partial.totals, out, KV_HEADS=kv_heads, SPLITS=splits, GROUP=group, DIM=head_dim
    )


@triton.jit
def _attend(
    qkv,
    query_norm,
    key_norm,
    cosine,
    sine,
    keys,
    values,
    position,
    sums,
    peaks,
    totals,
    capacity,
    scaling,
    eps,
    HAS_NORM: tl.constexpr,
    KV_HEADS: tl.constexpr,
    SPLITS: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A program attends from the GROUP heads of an answer that share a KV head to one split of its cache's tokens."""
    kv_head = tl.program_id(0)
    split = tl.program_id(1)
    answer = tl.program_id(2)
    last = tl.load(position + answer).to(tl.int32)
    qkv += answer * (GROUP + 2) * KV_HEADS * DIM
    cosine += answer * DIM
    sine += answer * DIM
    dtype = keys.dtype.element_ty
    dim = tl.arange(0, DIM)
    head = tl.arange(0, HEADS)
    is_head = head < GROUP
    query = _rotated(
        qkv + (kv_head * GROUP + head[:, None]) * DIM, query_norm, cosine, sine, eps, is_head[:, None], HAS_NORM, DIM
    ).to(dtype)
    # Every program makes the new key, as a row of its own, and takes it from here: the cache has it only afterwards.
    row = tl.arange(0, 1)[:, None]
    key_start = qkv + (KV_HEADS * GROUP + kv_head) * DIM + row
    new_key = _rotated(key_start, key_norm, cosine, sine, eps, row == 0, HAS_NORM, DIM).to(dtype)
    new_value = tl.load(key_start + KV_HEADS * DIM + dim[None, :]).to(dtype)

    share = tl.cdiv(tl.cdiv(last + 1, SPLITS), COLUMNS) * COLUMNS
    start = split * share
    stop = tl.minimum(start + share, last + 1)
    buffer = (answer * KV_HEADS + kv_head).to(tl.int64) * capacity * DIM
    if (start <= last) & (last < stop):
        tl.store(keys + buffer + last * DIM + row + dim[None, :], new_key)
        tl.store(values + buffer + last * DIM + row + dim[None, :], new_value)

    peak = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    result = tl.zeros([HEADS, DIM], tl.float32)
    for begin in range(start, stop, COLUMNS):
        column = begin + tl.arange(0, COLUMNS)
        places = buffer + column[:, None] * DIM + dim[None, :]
        is_old = column[:, None] < last
        is_new = column[:, None] == last
        key = tl.where(is_new, new_key, tl.load(keys + places, mask=is_old, other=0.0))
        value = tl.where(is_new, new_value, tl.load(values + places, mask=is_old, other=0.0))
        products = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scaling
        products = tl.where(column[None, :] <= last, products, float("-inf"))
        higher = tl.maximum(peak, tl.max(products, axis=1))
        weights = tl.exp2(products - higher[:, None])
        fade = tl.exp2(peak - higher)
        total = total * fade + tl.sum(weights, axis=1)
        result = result * fade[:, None] + tl.dot(weights.to(dtype), value, input_precision=PRECISION)
        peak = higher
    place = ((answer * KV_HEADS + kv_head) * SPLITS + split) * GROUP + head
    tl.store(peaks + place, peak, mask=is_head)
    tl.store(totals + place, total, mask=is_head)
    tl.store(sums + place[:, None] * DIM + dim[None, :], result, mask=is_head[:, None])


@triton.jit
def _rotated(start, norm, cosine, sine, eps, mask, HAS_NORM: tl.constexpr, DIM: tl.constexpr):
    """Queries or keys, normed and rotated, [rows, DIM] in float32, from pointers to their starts, [rows, 1]."""
    dim = tl.arange(0, DIM)
    partner = (dim + DIM // 2) % DIM
    here = tl.load(start + dim[None, :], mask=mask, other=0.0).to(tl.float32)
    there = tl.load(start + partner[None, :], mask=mask, other=0.0).to(tl.float32)
    if HAS_NORM:
        factor = tl.rsqrt(tl.sum(here * here, axis=1) / DIM + eps)[:, None]
        here *= factor * tl.load(norm + dim).to(tl.float32)[None, :]
        there *= factor * tl.load(norm + partner).to(tl.float32)[None, :]
    there = tl.where(dim[None, :] < DIM // 2, -there, there)
    return here * tl.load(cosine + dim).to(tl.float32)[None, :] + there * tl.load(sine + dim).to(tl.float32)[None, :]


@triton.jit
def _join(
    sums,
    peaks,
    totals,
    out,
    KV_HEADS: tl.constexpr,
    SPLITS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
):
    """A program joins the splits of one head of an answer."""
    head = tl.program_id(0)
    answer = tl.program_id(1)
    dim = tl.arange(0, DIM)
    place = ((answer * KV_HEADS + head // GROUP) * SPLITS + tl.arange(0, SPLITS)) * GROUP + head % GROUP
    peak = tl.load(peaks + place)
    factor = tl.exp2(peak - tl.max(peak, axis=0))  # 0 where a split had no token
    total = tl.sum(factor * tl.load(totals + place), axis=0)
    result = tl.sum(factor[:, None] * tl.load(sums + place[:, None] * DIM + dim[None, :]), axis=0) / total
    tl.store(out + (answer * KV_HEADS * GROUP + head) * DIM + dim, result.to(out.dtype.element_ty))
