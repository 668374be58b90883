"""Products of matrices with one row.

Such a product is bound by reading the matrix, so a kernel reads its weights once, at the rate of the memory, and does
on the way what lies beside the product: the norm before it, the activation, bias and residual after it. Sums are in
float32; transformers' own forward rounds each intermediate result to the model's dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

# Rows and columns of a matrix that a program multiplies at a time. Of 60 cuts of the products of an 8B Llama the best
# reach 2.4 to 3.1 of an H100's 3.35 TB/s; a step takes 3% longer with this one than with the best for each product.
_ROWS, _COLUMNS = 4, 1024
_STAGES = 3  # loads that are under way at once


@dataclass(frozen=True, slots=True)
class Norm:
    """An RMS norm.

    Attributes:
        weight: Shape [columns].
        eps: Added to the mean square.
    """

    weight: torch.Tensor
    eps: float


@dataclass(frozen=True, slots=True)
class Linear:
    """A matrix and its bias.

    Attributes:
        weight: Shape [rows, columns], contiguous.
        bias: Shape [rows]; None without.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None


def linear(
    x: torch.Tensor, parts: Sequence[Linear], out: torch.Tensor, norm: Norm | None = None, add: bool = False
) -> None:
    """Multiplies up to three matrices of as many columns with one row.

    Args:
        x: Shape [columns].
        parts: All with a bias or none; their products are joined in ``out``.
        out: Shape [rows of all parts], of any dtype.
        norm: Applied to ``x`` first.
        add: Whether to add to what ``out`` holds.
    """
    three = [*parts, *[Linear(parts[0].weight[:0])] * (3 - len(parts))]
    rows = [part.weight.shape[0] for part in three]
    columns = x.shape[0]
    _linear[(sum(triton.cdiv(count, _ROWS) for count in rows),)](
        x,
        x if norm is None else norm.weight,
        *[part.weight for part in three],
        *[x if part.bias is None else part.bias for part in three],
        out,
        *rows,
        columns,
        0.0 if norm is None else norm.eps,
        HAS_NORM=norm is not None,
        HAS_BIAS=parts[0].bias is not None,
        ADD=add,
        ROWS=_ROWS,
        COLUMNS=min(_COLUMNS, triton.next_power_of_2(columns)),
        STAGES=_STAGES,
    )


@triton.jit
def _linear(
    x,
    norm,
    weight_1,
    weight_2,
    weight_3,
    bias_1,
    bias_2,
    bias_3,
    out,
    rows_1,
    rows_2,
    rows_3,
    columns,
    eps,
    HAS_NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A program multiplies ROWS rows of one of the matrices."""
    block = tl.program_id(0)
    blocks_1 = tl.cdiv(rows_1, ROWS)
    blocks_2 = tl.cdiv(rows_2, ROWS)
    weight, bias, rows, before = weight_1, bias_1, rows_1, 0
    if block >= blocks_1 + blocks_2:
        weight, bias, rows, before = weight_3, bias_3, rows_3, rows_1 + rows_2
        block -= blocks_1 + blocks_2
    elif block >= blocks_1:
        weight, bias, rows, before = weight_2, bias_2, rows_2, rows_1
        block -= blocks_1
    row = block * ROWS + tl.arange(0, ROWS)
    is_row = row < rows
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    squares = tl.zeros([COLUMNS], tl.float32)
    for start in tl.range(0, columns, COLUMNS, num_stages=STAGES):
        column = start + tl.arange(0, COLUMNS)
        is_column = column < columns
        weights = _tile(weight, row, column, columns, is_row, is_column)
        value = tl.load(x + column, mask=is_column, other=0.0).to(tl.float32)
        if HAS_NORM:  # its factor is known at the end, and common to all columns
            squares += value * value
            value *= tl.load(norm + column, mask=is_column, other=0.0).to(tl.float32)
        sums += weights * value[None, :]
    result = tl.sum(sums, axis=1)
    if HAS_NORM:
        result *= tl.rsqrt(tl.sum(squares, axis=0) / columns + eps)
    if HAS_BIAS:
        result += tl.load(bias + row, mask=is_row, other=0.0).to(tl.float32)
    place = out + before + row
    if ADD:
        result += tl.load(place, mask=is_row, other=0.0).to(tl.float32)
    tl.store(place, result.to(out.dtype.element_ty), mask=is_row)


def gated_linear(x: torch.Tensor, gate: Linear, up: Linear, out: torch.Tensor, norm: Norm) -> None:
    """SiLU(gate x) * (up x), where x is normed first.

    Args:
        x: Shape [columns].
        gate: Its product goes through SiLU.
        up: Of the same shape, with a bias where ``gate`` has one.
        out: Shape [rows].
        norm: Applied to ``x``.
    """
    rows, columns = gate.weight.shape
    _gated_linear[(triton.cdiv(rows, _ROWS),)](
        x,
        norm.weight,
        gate.weight,
        up.weight,
        gate.bias,
        up.bias,
        out,
        rows,
        columns,
        norm.eps,
        HAS_BIAS=gate.bias is not None,
        ROWS=_ROWS,
        COLUMNS=min(_COLUMNS, triton.next_power_of_2(columns)),
        STAGES=_STAGES,
    )


@triton.jit
def _gated_linear(
    x,
    norm,
    gate,
    up,
    gate_bias,
    up_bias,
    out,
    rows,
    columns,
    eps,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A program multiplies ROWS rows of both matrices."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = row < rows
    gates = tl.zeros([ROWS, COLUMNS], tl.float32)
    ups = tl.zeros([ROWS, COLUMNS], tl.float32)
    squares = tl.zeros([COLUMNS], tl.float32)
    for start in tl.range(0, columns, COLUMNS, num_stages=STAGES):
        column = start + tl.arange(0, COLUMNS)
        is_column = column < columns
        gate_weights = _tile(gate, row, column, columns, is_row, is_column)
        up_weights = _tile(up, row, column, columns, is_row, is_column)
        value = tl.load(x + column, mask=is_column, other=0.0).to(tl.float32)
        squares += value * value
        value *= tl.load(norm + column, mask=is_column, other=0.0).to(tl.float32)
        gates += gate_weights * value[None, :]
        ups += up_weights * value[None, :]
    factor = tl.rsqrt(tl.sum(squares, axis=0) / columns + eps)
    gated = tl.sum(gates, axis=1) * factor
    result = tl.sum(ups, axis=1) * factor
    if HAS_BIAS:
        gated += tl.load(gate_bias + row, mask=is_row, other=0.0).to(tl.float32)
        result += tl.load(up_bias + row, mask=is_row, other=0.0).to(tl.float32)
    result *= gated * tl.sigmoid(gated)
    tl.store(out + row, result.to(out.dtype.element_ty), mask=is_row)


@triton.jit
def _tile(matrix, row, column, columns, is_row, is_column):
    """Some rows and columns of a matrix, in float32; 0 beyond its end."""
    places = row[:, None].to(tl.int64) * columns + column[None, :]
    inside = is_row[:, None] & is_column[None, :]
    return tl.load(matrix + places, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
