"""Numbers that are NaN or infinite: found without waiting for the device, told in one line.

A softmax hides minus infinity, a soft cap any infinity, and sorting hides NaN: they are looked for where they arise.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ..errors import NumericsError

CURE = "load it with dtype float32 or bfloat16, and check its weights"


def not_finite(numbers: torch.Tensor, dim: int | None = None) -> torch.Tensor:
    """Whether some of the numbers are NaN or infinite; on their device, by two kernels.

    Args:
        numbers: Floating point, any shape.
        dim: Looked at by itself; all of them together when None.

    Returns:
        Bool, of the shape without ``dim``.
    """
    zeros = numbers - numbers  # NaN where a number is not finite
    return zeros.any() if dim is None else zeros.any(dim)


def nan_where_hidden(products: torch.Tensor) -> torch.Tensor:
    """Products whose rows are NaN where one of them is not finite; they are changed in place, else they stay.

    Args:
        products: Of queries and keys, before the future is masked, shape [..., keys].
    """
    # Not by `aminmax`, which a CPU takes five times as long for as for both.
    return products.add_((products.amin(-1, keepdim=True) + products.amax(-1, keepdim=True)) * 0)


def zero_or_nan(buffers: Iterable[torch.Tensor], device: torch.device) -> torch.Tensor:
    """0, or NaN where a number in one of the buffers is not finite.

    Args:
        buffers: Floating point, each of at least one number.
        device: Where to put it.

    Returns:
        Float32, shape [].
    """
    sums = [buffer.sum(dtype=torch.float32).to(device, non_blocking=True) for buffer in buffers]
    return (torch.stack(sums) * 0).sum() if sums else torch.zeros((), device=device)


def check_finite(numbers: torch.Tensor, what: str) -> None:
    """Checks numbers; waits for their device.

    Args:
        numbers: Floating point, any shape.
        what: They are, in words, with a verb: "the model's attention is".

    Raises:
        NumericsError: If one of them is NaN or infinite.
    """
    if not_finite(numbers):
        raise NumericsError(f"{what} NaN or infinite: {CURE}")
