"""What a question pays to passages, from the keys of a few heads that were kept of them: exact, in blocks.

`finch_rag.prefill.alone` reads passages and questions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch

from ..models.finite import nan_where_hidden
from ..models.forward import on_device

# Of the attention itself, so that passages are ranked too which get no more than from the neutral question.
_RAW_PART = 1e-3


@dataclass(frozen=True, slots=True)
class Look:
    """What a question looks for, and a neutral one beside it.

    A row stands for a head and a token: for each head the question's own tokens, then those of the neutral question.

    Attributes:
        queries: Rotated queries, for each (layer, KV head) the heads that share it; zeros where a KV head has fewer
            heads. Shape [groups, rows, head_dim].
        present: Which heads are there, shape [groups, heads].
        elsewhere: Log of what a row's attention outside of all passages sums to, before it is normalised, shape
            [groups, rows], float32.
        own_tokens: Rows of a head that are of the question; the rest are of the neutral one.
        scaling: Factor on the products.
        softcap: What they are capped to, smoothly; None for no cap.
    """

    queries: torch.Tensor
    present: torch.Tensor
    elsewhere: torch.Tensor
    own_tokens: int
    scaling: float
    softcap: float | None = None


@dataclass(frozen=True, slots=True)
class KeyBlock:
    """Head keys of some passages.

    Attributes:
        keys: Shape [groups, tokens, head_dim]; int8 where they are quantised.
        scales: What int8 keys are multiplied by, shape [groups, tokens]; None for other dtypes.
        lengths: Tokens of each passage, in their order, each at least 1.
    """

    keys: torch.Tensor
    scales: torch.Tensor | None
    lengths: Sequence[int]

    def of(self, places: Sequence[int]) -> KeyBlock:
        """Those of some passages, without copying where they stand side by side.

        Args:
            places: Of the passages in the block, ascending, at least one.
        """
        ends = list(accumulate(self.lengths))
        runs: list[list[int]] = []
        for place in places:
            start = ends[place] - self.lengths[place]
            if runs and runs[-1][1] == start:
                runs[-1][1] = ends[place]
            else:
                runs.append([start, ends[place]])

        def cut(numbers: torch.Tensor) -> torch.Tensor:
            pieces = [numbers[:, start:stop] for start, stop in runs]
            return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)

        scales = None if self.scales is None else cut(self.scales)
        return KeyBlock(cut(self.keys), scales, [self.lengths[place] for place in places])


class PassageRows(NamedTuple):
    """What each row pays to the passages of a block, before all blocks are joined.

    Attributes:
        greatest: The greatest product of each row, shape [groups, rows], float32.
        sums: Of each passage, relative to it, shape [groups, rows, passages], float32.
    """

    greatest: torch.Tensor
    sums: torch.Tensor


@torch.inference_mode()
def attention_on(look: Look, blocks: Iterable[KeyBlock]) -> torch.Tensor:
    """What a question pays to each passage beyond a neutral one, summed over heads and its own tokens; exact.

    Each block's products are normalised by their own greatest one; a running log-sum-exp joins the blocks. Of a block
    only the sums of its passages stay, so memory is that of one block, and a number a row and passage.

    Args:
        look: What the question looks for.
        blocks: Head keys, in the order of the passages.

    Returns:
        On the CPU, float32, shape [passages].
    """
    return summed(look, [rows_on(look, block) for block in blocks])


@torch.inference_mode()
def attention_by_head(look: Look, blocks: Iterable[KeyBlock]) -> torch.Tensor:
    """What each head pays to each passage for a question beyond a neutral one, summed over the question's own tokens.

    Args:
        look: What the question looks for.
        blocks: See `attention_on`.

    Returns:
        On the CPU, float32, shape [groups, heads of a group, passages]; zeros for heads that are not there.
    """
    return torch.cat(list(_by_head(look, [rows_on(look, block) for block in blocks])), dim=-1).float().cpu()


@torch.inference_mode()
def summed(look: Look, by_block: Sequence[PassageRows]) -> torch.Tensor:
    """What `attention_on` returns, from what `rows_on` found in each block.

    Args:
        look: What the question looks for.
        by_block: Of each block, in the order of the passages.
    """
    return torch.cat([by_head.sum((0, 1)) for by_head in _by_head(look, by_block)] or [torch.zeros(0)]).float().cpu()


def _by_head(look: Look, by_block: Sequence[PassageRows]) -> Iterator[torch.Tensor]:
    """For each block, shape [groups, heads of a group, passages]."""
    total = look.elsewhere
    for greatest, sums in by_block:
        total = torch.logaddexp(total, greatest + sums.sum(-1).log())
    own = look.own_tokens
    for greatest, sums in by_block:
        rows = (greatest - total).exp()[..., None].mul(sums).unflatten(1, (look.present.shape[1], -1))
        asked, neutral = rows[:, :, :own].mean(2), rows[:, :, own:].mean(2)
        beyond = (asked - neutral).relu() + _RAW_PART * asked
        yield torch.where(look.present[..., None], own * beyond, 0)


@torch.inference_mode()
def rows_on(look: Look, block: KeyBlock) -> PassageRows:
    """What each row pays to the passages of a block.

    Args:
        look: What the question looks for.
        block: Head keys.
    """
    device = look.queries.device
    keys = block.keys.to(device, non_blocking=True)
    exact = device.type == "cpu" or not keys.is_floating_point()
    queries = look.queries.float() if exact and device.type == "cpu" else look.queries
    keys = keys.to(queries.dtype)
    products = torch.bmm(queries, keys.transpose(1, 2)).float().mul_(look.scaling)  # [groups, rows, tokens]
    if block.scales is not None:
        products.mul_(block.scales.to(device).float()[:, None])
    # NaN where a number is not finite: the softmax would hide minus infinity. Products with zeros tell it for less
    # than a second look at all products takes; those of half precision may overflow by themselves.
    hidden = torch.bmm(queries.sum(1, keepdim=True) * 0, keys.transpose(1, 2)).float().amax(-1)  # [groups, 1]
    if queries.dtype == torch.float16:
        products = nan_where_hidden(products)
    products = capped(products, look.softcap)
    greatest = products.amax(-1) + hidden
    products.sub_(greatest[..., None]).exp_()
    return PassageRows(greatest, _sums(products, block.lengths))


def capped(products: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """Scaled products as a model caps them (Gemma 2).

    Args:
        products: Of queries and keys, any shape.
        softcap: See `Look`.
    """
    return products if softcap is None else softcap * torch.tanh(products / softcap)


def _sums(weights: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Sums over the tokens of each passage, shape [groups, rows, passages]."""
    if weights.device.type == "cpu":
        import numpy as np

        starts = np.cumsum([0, *lengths[:-1]])
        return torch.from_numpy(np.add.reduceat(weights.numpy(), starts, axis=-1))
    # One thread adds up a row's tokens of one passage, in their order: with atomic sums they wait for each other.
    by_token = weights.transpose(1, 2).contiguous()  # so that threads side by side read rows side by side
    of_groups = on_device(lengths, weights.device).expand(len(weights), -1).contiguous()
    sums = torch.segment_reduce(by_token, "sum", lengths=of_groups, axis=1, unsafe=True)  # [groups, passages, rows]
    return sums.transpose(1, 2).contiguous()


def quantised(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Head keys as int8, with a scale for each token.

    Args:
        keys: Shape [groups, tokens, head_dim].

    Returns:
        Int8 of the same shape, and float32 scales of shape [groups, tokens].
    """
    scales = keys.float().abs().amax(-1).clamp_min(1e-12) / 127
    return (keys.float() / scales[..., None]).round().to(torch.int8), scales
