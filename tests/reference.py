"""Finch written a second time, as plainly as possible: eager attention, a cache rebuilt in every round, loops.

Nothing here comes from the package but the prompt, the chunks and the report's idea of a document position.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from finch_rag.prefill.chunking import plan_chunks
from finch_rag.prompts.builder import Prompt

Token = tuple[torch.Tensor, torch.Tensor]  # key before its rotation and value, each [kv_heads, head_dim]


@dataclass
class Read:
    """What one layer keeps: document positions, and keys (rotated) and values, each [kv_heads, prefix + kept, dim]."""

    positions: list[int]
    keys: torch.Tensor
    values: torch.Tensor


def rotate(model: Any, keys: torch.Tensor, positions: range, back: bool = False) -> torch.Tensor:
    """Keys [kv_heads, tokens, head_dim] turned by the model's own rotary module, or turned back."""
    cos, sin = model.model.rotary_emb(keys[None], torch.tensor([list(positions)], dtype=torch.long))
    half = keys.shape[-1] // 2
    turned = torch.cat((-keys[..., half:], keys[..., :half]), dim=-1)
    return keys * cos[0] + turned * (-sin[0] if back else sin[0])


@torch.inference_mode()
def read(
    model: Any,
    prompt: Prompt,
    budget: int,
    chunk_size: int,
    selection: str,
    heads: Mapping[int, Sequence[int]] | None = None,
) -> tuple[list[Read], list[float]]:
    """Reads a prompt's passages with a model that runs eager attention.

    Returns:
        What each layer keeps, and the attention that each passage got when it last competed.
    """
    document = [token for passage in prompt.passages for token in passage]
    passage_of = [number for number, passage in enumerate(prompt.passages) for _ in passage]
    prefix, layers = len(prompt.prefix), model.config.num_hidden_layers
    start = DynamicCache()
    model(torch.tensor([prompt.prefix]), past_key_values=start)
    prefixes = [(layer.keys.clone(), layer.values.clone()) for layer in start.layers]  # type: ignore[union-attr]
    kept: list[dict[int, Token]] = [{} for _ in range(layers)]  # by document position
    attention = [0.0] * len(prompt.passages)

    for chunk in plan_chunks([len(passage) for passage in prompt.passages], chunk_size):
        cache = DynamicCache()
        for layer in range(layers):
            keys, values = _assemble(model, prefixes[layer], kept[layer])
            cache.update(keys[None], values[None], layer)
        past = cache.get_seq_length()
        tokens = [document[position] for position in chunk] + prompt.question
        output = model(torch.tensor([tokens]), past_key_values=cache, output_attentions=True)

        scores: list[dict[int, float]] = []  # by layer, of every document position that competes
        for layer in range(layers):
            its: Any = cache.layers[layer]
            keys = rotate(model, its.keys[0, :, past:], range(past, past + len(tokens)), back=True)
            values = its.values[0, :, past:]
            for number, position in enumerate(chunk):
                kept[layer][position] = (keys[:, number], values[:, number])
            rows = output.attentions[layer][0][:, len(chunk) :][:, prompt.own_tokens]
            scored = range(rows.shape[0]) if heads is None else heads.get(layer, ())
            scores.append(
                {
                    position: sum(float(rows[head, :, prefix + column].sum()) for head in scored)
                    for column, position in enumerate(kept[layer])
                }
            )

        for passage in {passage_of[position] for score in scores for position in score}:
            its_scores = [score[position] for score in scores for position in score if passage_of[position] == passage]
            attention[passage] = sum(its_scores)

        for layer in range(layers):
            if selection == "token":
                best = sorted(kept[layer], key=lambda position: -scores[layer][position])[:budget]
            else:
                total = {position: sum(score[position] for score in scores) for position in kept[layer]}
                best = _passages(total, passage_of, budget)
            kept[layer] = {position: kept[layer][position] for position in sorted(best)}

    read = [Read(list(kept[layer]), *_assemble(model, prefixes[layer], kept[layer])) for layer in range(layers)]
    return read, attention


def _assemble(model: Any, prefix: Token, kept: dict[int, Token]) -> Token:
    if not kept:
        return prefix[0][0], prefix[1][0]
    length = prefix[0].shape[2]
    keys = rotate(model, torch.stack([key for key, _ in kept.values()], dim=1), range(length, length + len(kept)))
    values = torch.stack([value for _, value in kept.values()], dim=1)
    return torch.cat((prefix[0][0], keys), dim=1), torch.cat((prefix[1][0], values), dim=1)


def _passages(scores: dict[int, float], passage_of: list[int], budget: int) -> list[int]:
    members: dict[int, list[int]] = {}
    for position in scores:
        members.setdefault(passage_of[position], []).append(position)
    best: list[int] = []
    for name in sorted(members, key=lambda name: -sum(scores[position] for position in members[name])):
        room = budget - len(best)
        best += sorted(members[name], key=lambda position: -scores[position])[:room]
        if len(members[name]) >= room:
            break
    return best
