"""Products of matrices with the rows of several answers, as `finch_rag.decode.kernels.products` has them with one row.

Several rows are what matrix units are made for, so the products are the library's own; norms, activation, bias and
residual stand beside them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import rms_norm, silu

if TYPE_CHECKING:
    from .kernels.products import Linear, Norm


def linear(
    x: torch.Tensor, parts: Sequence[Linear], out: torch.Tensor, norm: Norm | None = None, add: bool = False
) -> None:
    """Multiplies matrices of as many columns with some rows.

    Args:
        x: Shape [answers, columns].
        parts: Their products are joined in ``out``.
        out: Shape [answers, rows of all parts]; float32 where the model's dtype would round too coarsely.
        norm: Applied to ``x`` first.
        add: Whether to add to what ``out`` holds.
    """
    x = x if norm is None else _normed(x, norm)
    start = 0
    for part in parts:
        stop = start + part.weight.shape[0]
        own = out[:, start:stop]
        if add:
            own.addmm_(x, part.weight.T)
            if part.bias is not None:
                own.add_(part.bias)
        elif out.dtype != x.dtype:
            own.copy_(_widened(x, part))
        elif part.bias is None:
            torch.mm(x, part.weight.T, out=own)
        else:
            torch.addmm(part.bias, x, part.weight.T, out=own)
        start = stop


def gated_linear(x: torch.Tensor, gate: Linear, up: Linear, out: torch.Tensor, norm: Norm) -> None:
    """SiLU(gate x) * (up x), where x is normed first.

    Args:
        x: Shape [answers, columns].
        gate: Its product goes through SiLU.
        up: Of the same shape.
        out: Shape [answers, rows].
        norm: Applied to ``x``.
    """
    x = _normed(x, norm)
    linear(x, [gate], out)
    silu(out, inplace=True)
    out.mul_(torch.nn.functional.linear(x, up.weight, up.bias))


def _widened(x: torch.Tensor, part: Linear) -> torch.Tensor:
    """A product that is not rounded to the dtype of its factors, where torch has one: from 2.8 on, on CUDA."""
    if not x.is_cuda or part.bias is not None or tuple(map(int, torch.__version__.split(".")[:2])) < (2, 8):
        return torch.nn.functional.linear(x, part.weight, part.bias)
    return torch.mm(x, part.weight.T, out_dtype=torch.float32)


def _normed(x: torch.Tensor, norm: Norm) -> torch.Tensor:
    return rms_norm(x, x.shape[-1:], norm.weight, norm.eps)
