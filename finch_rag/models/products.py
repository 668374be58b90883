"""A window for attention that a model file writes out, rather than asking transformers for it: GPT-J, Falcon, XGLM.

Whatever it looks like, queries are multiplied with keys, and the products go through a softmax. torch hands every
function that a thread calls to a mode of this thread, so no model is patched and threads do not meet.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_PRODUCTS = frozenset(getattr(owner, name) for owner in (torch, torch.Tensor) for name in ("matmul", "bmm", "baddbmm"))
_SOFTMAX = frozenset({torch.softmax, torch.Tensor.softmax, functional.softmax})
_EXACT = 1e-4  # how far float32 products may be off, of the largest


class SeesProducts(Protocol):
    """Sees what an attention layer computes with."""

    def __call__(self, layer: int, query: torch.Tensor, key: torch.Tensor, scores: torch.Tensor) -> None:
        """Called once a layer.

        Args:
            layer: How many attention layers were before.
            query: Shape [sequences, heads, queries, head_dim].
            key: Shape [sequences, kv_heads, keys, head_dim].
            scores: What goes into the softmax, shape [sequences, heads, queries, keys].
        """


class ProductWindow(TorchFunctionMode):
    """While it is entered, shows the products that this thread puts through a softmax.

    Args:
        sequences: How many a forward pass reads; their heads may stand in one dimension.
        see: Is shown them.
    """

    def __init__(self, sequences: int, see: SeesProducts) -> None:
        super().__init__()
        self._sequences, self._see, self._layers = sequences, see, 0
        self._factors: list[torch.Tensor] = []  # of the last product

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Called by torch in place of each of its functions."""
        options = kwargs or {}
        if func in _SOFTMAX and self._factors:
            self._show(args[0] if args else options["input"])
        result = func(*args, **options)
        if func in _PRODUCTS:  # what the product is added to stands before the factors
            self._factors = [each for each in (*args, *options.values()) if isinstance(each, torch.Tensor)][-2:]
        return result

    def _show(self, scores: torch.Tensor) -> None:
        left, right = self._factors
        self._factors = []
        products = scores.shape[-2:] == (left.shape[-2], right.shape[-1])
        if not products or min(left.dim(), right.dim(), scores.dim()) < 3:
            return  # the choice of experts: of other numbers, or of a product with weights
        query, key = self._by_sequence(left), self._by_sequence(right.transpose(-1, -2))
        self._layers += 1
        self._see(self._layers - 1, query, key, self._by_sequence(scores))

    def _by_sequence(self, states: torch.Tensor) -> torch.Tensor:
        return states.reshape(self._sequences, -1, *states.shape[-2:])


def scaling_of(query: torch.Tensor, key: torch.Tensor, scores: torch.Tensor) -> float:
    """The factor on products that scores have; a model file may have put it anywhere.

    It is measured where nothing is masked: the last token of each sequence sees all of it.

    Args:
        query: See `SeesProducts`.
        key: Likewise.
        scores: Likewise.
    """
    products, given = _last(query, key, scores)
    return float((given * products).sum() / products.square().sum())


def is_plain(query: torch.Tensor, key: torch.Tensor, scores: torch.Tensor) -> bool:
    """Whether scores are products and nothing else: no bias that tells distances (ALiBi), no cap.

    Args:
        query: See `SeesProducts`.
        key: Likewise.
        scores: Likewise.
    """
    products, given = _last(query, key, scores)
    off = (given - products * scaling_of(query, key, scores)).abs().max() / given.abs().max()
    return bool(off <= max(_EXACT, 4 * torch.finfo(query.dtype).eps))


def _last(query: torch.Tensor, key: torch.Tensor, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Products of the last token, and its scores; float32, shape [sequences, heads, keys]."""
    queries, keys = query[:, :, -1:].float(), key.float()
    heads = keys.repeat_interleave(queries.shape[1] // keys.shape[1], 1)
    return (queries @ heads.transpose(-1, -2))[:, :, 0], scores[:, :, -1].float()
