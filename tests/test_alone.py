"""Passages read alone: their head keys, and what a question pays to them, against a plain forward pass."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from finch_rag.models import packed
from finch_rag.models.attention import causal_attention, use_finch_attention
from finch_rag.models.cache import CompressedCache
from finch_rag.models.forward import forward
from finch_rag.prefill.alone import NEUTRAL, AloneReader, Asked, token_groups
from finch_rag.prefill.head_keys import KeyBlock, Look, attention_by_head, attention_on, quantised
from finch_rag.prompts.builder import Prompt

from .small import ARCHITECTURES, small_model, small_prompt, texts

HEADS = {0: [1], 1: [0, 2, 3]}
NEUTRAL_PROMPT = small_prompt(["x"], NEUTRAL)


def ready(kind: str = "llama") -> tuple[Any, Prompt]:
    model = small_model(kind, max_position_embeddings=4096)
    use_finch_attention(model)
    return model, small_prompt(texts(7), "who built the bridge?")


def looked(model: Any, prompt: Prompt) -> tuple[AloneReader, list[torch.Tensor], Look]:
    reader = AloneReader(model, prompt.prefix, HEADS)
    keys = list(reader.encode(prompt.passages).split([len(passage) for passage in prompt.passages], dim=1))
    neutral = Asked(NEUTRAL_PROMPT.question, NEUTRAL_PROMPT.own_tokens)
    asked = Asked(prompt.question, prompt.own_tokens)
    return reader, keys, reader.look(asked, neutral, max(map(len, prompt.passages)))


def by_hand(model: Any, prompt: Prompt) -> torch.Tensor:
    """The same from keys and queries of plain passes."""
    asked, neutral = paid(model, prompt), paid(model, replace(NEUTRAL_PROMPT, passages=prompt.passages))
    return asked.shape[1] * ((asked.mean(1) - neutral.mean(1)).relu() + 1e-3 * asked.mean(1)).sum(0)


def paid(model: Any, prompt: Prompt) -> torch.Tensor:
    """What each head and token pays to each passage: one softmax over prefix, all passages and the question."""
    longest, seen = max(map(len, prompt.passages)), {}

    def keys_of(tokens: list[int]) -> list[torch.Tensor]:
        cache = CompressedCache(2, len(prompt.prefix) + len(tokens))
        forward(model, torch.tensor([*prompt.prefix, *tokens]), cache)
        return [layer.in_use()[0][0] for layer in cache.layers]

    # The question behind the prefix and a gap: positions are given to the model itself.
    start = len(prompt.prefix) + longest
    ids = torch.tensor([[*prompt.prefix, *prompt.question]])
    positions = torch.tensor([[*range(len(prompt.prefix)), *range(start, start + len(prompt.question))]])
    model.base_model(
        input_ids=ids,
        position_ids=positions,
        past_key_values=CompressedCache(2, ids.shape[1]),
        use_cache=True,
        finch_observer=lambda layer, query, key, scaling: seen.update({layer: (query[0], key[0], scaling)}),
    )
    alone = [keys_of(list(passage)) for passage in prompt.passages]
    own = range(*prompt.own_tokens.indices(len(prompt.question)))
    found = torch.zeros(sum(map(len, HEADS.values())), len(own), len(prompt.passages))
    pairs = [(layer, head) for layer, heads in HEADS.items() for head in heads]
    for number, (layer, head) in enumerate(pairs):
        query, key, scaling = seen[layer]
        group = head // (query.shape[0] // key.shape[0])
        for place, token in enumerate(own):
            at = len(prompt.prefix) + token
            passages = [keys[layer][group, len(prompt.prefix) :] for keys in alone]
            everything = torch.cat([*passages, key[group, : at + 1]])
            weights = ((everything @ query[head, at]) * scaling).softmax(0)
            parts = weights.split([*(len(p) for p in passages), at + 1])[:-1]
            found[number, place] = torch.stack([part.sum() for part in parts])
    return found


def blocks(keys: list[torch.Tensor], sizes: list[int]) -> list[KeyBlock]:
    found, start = [], 0
    for size in sizes:
        part = keys[start : start + size]
        found.append(KeyBlock(torch.cat(part, 1), None, [each.shape[1] for each in part]))
        start += size
    return found


@pytest.mark.parametrize("kind", ARCHITECTURES)
@torch.inference_mode()
def test_a_question_pays_what_one_softmax_over_all_passages_says(kind: str) -> None:
    model, prompt = ready(kind)
    _, keys, look = looked(model, prompt)
    expected = by_hand(model, prompt)
    for sizes in ([7], [3, 1, 3], [1] * 7):
        torch.testing.assert_close(attention_on(look, blocks(keys, sizes)), expected, atol=1e-5, rtol=1e-4)


def test_keys_depend_on_a_passage_alone() -> None:
    model, prompt = ready()
    reader, keys, _ = looked(model, prompt)
    for passage, key in zip(prompt.passages, keys, strict=True):
        torch.testing.assert_close(reader.encode([passage]), key, atol=1e-5, rtol=1e-4)
    assert [key.shape for key in keys] == [(len(reader.groups), len(p), reader.head_dim) for p in prompt.passages]
    assert reader.groups == ((0, 0), (1, 0), (1, 1))


def test_one_kernel_takes_all_passages_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompt = ready()
    reader, keys, _ = looked(model, prompt)
    lengths = [len(passage) for passage in prompt.passages]
    lengths.append(-sum(lengths) % 64)  # a filler on a CPU
    calls: list[tuple[int, int]] = []

    def by_hand(q: Any, k: Any, v: Any, ends: Any, longest: tuple[int, int], scaling: float) -> torch.Tensor:
        calls.append(longest)
        outputs = []
        for (start, stop), (first, last) in zip(*(pairwise(each.tolist()) for each in ends), strict=True):
            query, key, value = (each.transpose(0, 1)[None] for each in (q[start:stop], k[first:last], v[first:last]))
            outputs.append(causal_attention(query, key, value, scaling)[0])
        return torch.cat([output.transpose(0, 1) for output in outputs])

    monkeypatch.setattr(packed, "has_packed_kernel", lambda *what: True)
    monkeypatch.setattr(packed, "packed_attention", by_hand)
    together = reader.encode(prompt.passages)
    assert calls == [(max(lengths), len(prompt.prefix) + max(lengths))]  # the last layer's is not needed
    torch.testing.assert_close(together, torch.cat(keys, 1), atol=1e-5, rtol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(32, 8, 128), (14, 2, 64), (4, 4, 96)])
def test_the_gpu_has_such_a_kernel(heads: int, kv_heads: int, head_dim: int) -> None:
    assert packed.has_packed_kernel(torch.device("cuda"), torch.bfloat16, heads, kv_heads, head_dim)


def test_heads_by_themselves_sum_to_the_whole() -> None:
    model, prompt = ready()
    _, keys, look = looked(model, prompt)
    by_head = attention_by_head(look, blocks(keys, [2, 5]))
    assert by_head.shape == (3, 2, 7)
    torch.testing.assert_close(by_head.sum((0, 1)), attention_on(look, blocks(keys, [7])))
    assert not by_head[0, 1].any()  # the first group has one head


@torch.inference_mode()
def test_what_a_passage_gets_whatever_is_asked_does_not_count() -> None:
    model, prompt = ready()
    reader, keys, look = looked(model, prompt)
    same = Asked(prompt.question, prompt.own_tokens)
    alike = reader.look(same, same, max(map(len, prompt.passages)))
    raw = attention_on(alike, blocks(keys, [7]))
    torch.testing.assert_close(raw, 1e-3 * paid(model, prompt).sum((0, 1)), atol=1e-6, rtol=1e-3)
    assert (attention_on(look, blocks(keys, [7])) >= raw - 1e-6).all()
    assert raw.min() > 0  # and all are ranked still


def test_eight_bits_rank_alike_and_are_close() -> None:
    model, prompt = ready()
    _, keys, look = looked(model, prompt)
    exact = attention_on(look, blocks(keys, [7]))
    eighths = [KeyBlock(*quantised(block.keys), block.lengths) for block in blocks(keys, [4, 3])]
    assert all(block.keys.dtype == torch.int8 for block in eighths)
    torch.testing.assert_close(attention_on(look, eighths), exact, atol=0.01, rtol=0.05)


def test_without_passages_there_is_no_attention() -> None:
    model, prompt = ready()
    _, _, look = looked(model, prompt)
    assert attention_on(look, []).shape == (0,)


def test_passages_are_grouped_by_their_tokens() -> None:
    assert list(token_groups([3, 4, 9, 1, 1], 7)) == [range(2), range(2, 3), range(3, 5)]
    assert list(token_groups([], 7)) == []
