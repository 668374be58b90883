"""Retrieval heads for passages that are read alone (see `finch_rag.prefill.alone`).

They are others than those of the loop, and lie lower: no passage has seen another, and all begin at the same position,
so a head finds the right one by what it says alone. The more wrong passages compete, the better heads are told apart:
the passages of all examples are pooled to one corpus, and each question looks at all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from ..errors import InputError
from ..models.attention import use_finch_attention
from ..models.finite import check_finite
from ..models.own_attention import runs_own_attention
from ..prefill.alone import NEUTRAL, Asked, token_groups
from ..prefill.head_keys import KeyBlock, attention_by_head
from ..prefill.own_reader import layers_that_look, reader_of
from ..prompts.builder import PromptBuilder
from ..prompts.passages import Passage
from .examples import HeadExample, make_examples
from .search import EXAMPLES, PASSAGES, HeadScore

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# More than for the loop: with twelve, recall among 2,600 passages is .025 higher at 4 and 8 than with eight.
ALONE_HEADS = 12
_TOKENS_PER_PASS = 4096


def usual_alone_heads(model: PreTrainedModel) -> int:
    """How many heads search a store where nobody says: `ALONE_HEADS`, or all that are looked at in a small model.

    Args:
        model: The model.
    """
    return min(ALONE_HEADS, sum(searched_alone(model).values()))


def searched_alone(model: PreTrainedModel) -> dict[int, int]:
    """Query heads of each layer in which heads are looked for: of those that see all passages, the lower two thirds.

    Args:
        model: The model.
    """
    looking = layers_that_look(model)
    searched = -(-2 * len(looking) // 3)
    return {layer: looking[layer] for layer in sorted(looking)[:searched]}


def find_alone_heads(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    n: int = ALONE_HEADS,
    examples: int | Sequence[HeadExample] = EXAMPLES,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[HeadScore]:
    """The ``n`` heads that find the passage that answers when each passage was read alone.

    A head's score is the mean reciprocal rank that its attention gives to the passage that answers, among the
    passages of all examples.

    Args:
        model: A model with rotary positions. It is switched to Finch's attention, which computes the same as SDPA.
        tokenizer: Its tokenizer.
        n: Heads to return, at least 1, of those in the lower two thirds of the layers.
        examples: Examples to average over: one's own, or how many to make.
        on_progress: Called with the examples done and in all.

    Returns:
        Heads by falling score.

    Raises:
        InputError: If ``n`` is not between 1 and the number of heads in those layers, or there is no example.
    """
    if not runs_own_attention(model):
        use_finch_attention(model)
    per_layer = searched_alone(model)
    there = sum(per_layer.values())
    if not 1 <= n <= there:
        raise InputError(
            f"n is {n}: the model has {there} heads in the lower two thirds of its layers, ask for 1 to {there}"
        )
    builder = PromptBuilder(tokenizer)
    chosen = make_examples(examples, PASSAGES) if isinstance(examples, int) else list(examples)
    if not chosen:
        raise InputError("there are no examples: pass at least one")
    pooled = [Passage(text) for example in chosen for text in example.passages]
    prompt = builder.build("x", pooled)
    reader = reader_of(model, prompt.prefix, {layer: range(heads) for layer, heads in per_layer.items()})
    lengths = [len(tokens) for tokens in prompt.passages]
    blocks = [
        KeyBlock(reader.encode(prompt.passages[group.start : group.stop]), None, lengths[group.start : group.stop])
        for group in token_groups(lengths, _TOKENS_PER_PASS)
    ]
    neutral, longest = Asked.by(builder, NEUTRAL), max(lengths)
    scores = torch.zeros(len(reader.groups), reader.per_group)
    first = 0
    for number, example in enumerate(chosen, 1):
        look = reader.look(Asked.by(builder, example.question), neutral, longest)
        attention = attention_by_head(look, blocks)  # [groups, heads of a group, passages]
        check_finite(attention, "the model's attention is")
        right = attention[..., first + example.gold, None]
        scores += 1 / (attention >= right).sum(-1) / len(chosen)
        first += len(example.passages)
        on_progress(number, len(chosen))
    best = scores.flatten().topk(n)  # groups are in the order of layers and KV heads, so this is the order of heads
    pairs = [(layer, head) for layer, heads in per_layer.items() for head in range(heads)]
    found = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [HeadScore(pairs[index][0], pairs[index][1], value) for index, value in found]
