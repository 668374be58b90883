"""Heads as (layer, head) pairs: checked, and by layer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

from ..errors import FinchError, InputError

Heads = Literal["auto", "all"] | Sequence[tuple[int, int]]
HeadUse = Literal["loop", "alone"]
AloneHeads = Literal["auto"] | Sequence[tuple[int, int]]  # of passages that are read alone


def check_alone_heads(heads: Any, config: Any, error: type[FinchError] = InputError) -> None:
    """Raises ``error`` if ``heads`` is not "auto" or pairs of (layer, head) that the model has.

    Args:
        heads: What a user passed.
        config: The model's configuration.
        error: What to raise.
    """
    if heads != "auto" and (isinstance(heads, str) or not isinstance(heads, Iterable) or not list(heads)):
        raise error(f'the heads for passages read alone are {heads!r}: use "auto" or a list of (layer, head) pairs')
    check_heads(heads, config, error)


def check_heads(heads: Any, config: Any, error: type[FinchError] = InputError) -> None:
    """Raises ``error`` if ``heads`` is not "auto", "all" or pairs of (layer, head) that the model has.

    Args:
        heads: What a user passed.
        config: The model's configuration.
        error: What to raise.
    """
    if heads in ("auto", "all"):
        return
    if isinstance(heads, str) or not isinstance(heads, Iterable):
        raise error(f'heads is {heads!r}: use "auto", "all" or a list of (layer, head) pairs')
    pairs = list(heads)
    if not pairs:
        raise error('heads is empty: name at least one (layer, head) pair, or use "all"')
    layers, per_layer = config.num_hidden_layers, config.num_attention_heads
    for pair in pairs:
        whole = isinstance(pair, Sequence) and len(pair) == 2 and all(_is_whole(number) for number in pair)
        if not whole or not (0 <= pair[0] < layers and 0 <= pair[1] < per_layer):
            raise error(f"head {pair!r} does not exist: the model has layers 0 to {layers - 1} of {per_layer} heads")


def _is_whole(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool)


def layers_to_search(config: Any) -> int:
    """Layers that heads are looked for in, from the lowest: two thirds of all, rounded up.

    Args:
        config: The model's configuration.
    """
    return -(-2 * int(config.num_hidden_layers) // 3)


def heads_by_layer(pairs: Iterable[tuple[int, int]]) -> dict[int, list[int]]:
    """(layer, head) pairs as heads by layer, each once."""
    by_layer: dict[int, list[int]] = {}
    for layer, head in sorted({(int(layer), int(head)) for layer, head in pairs}):
        by_layer.setdefault(layer, []).append(head)
    return by_layer
