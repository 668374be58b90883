"""Retrieval heads: the few attention heads whose attention finds the passage that answers a question.

In a language model most heads look at syntax, at neighbours or at the first token. A handful in the middle and late
layers look at what the question asks for, and those alone rank passages far better than all heads together. They are a
property of the model, found once by what they do on examples (see `finch_rag.heads.examples`) and then remembered under
a fingerprint of the model in the user's cache. The embedded model's are part of the package.

Heads are looked for in the lower two thirds of the layers: they rank as well as those of all layers (see
docs/benchmarks.md), and a scan that only chooses passages ends at the last of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..errors import InputError, ModelError, WindowError
from ..models.attention import SeenEnough, use_finch_attention
from ..models.cache import CompressedCache
from ..models.finite import check_finite
from ..models.forward import forward
from ..models.inspection import text_config, window_of
from ..prefill.scoring import passage_sums, question_attention
from ..prompts.builder import PromptBuilder
from ..prompts.passages import Passage
from .examples import HeadExample, make_examples
from .pairs import layers_to_search

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HEADS = 8
EXAMPLES = 24
PASSAGES = 10


@dataclass(frozen=True, slots=True)
class HeadScore:
    """How well one head finds the passage that answers.

    Attributes:
        layer: Its layer.
        head: Its number in the layer.
        score: Attention of the question's tokens on the right passage minus their mean on a passage, averaged over
            question tokens and examples; between -1 and 1.
    """

    layer: int
    head: int
    score: float


def find_heads(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    n: int = HEADS,
    examples: int | Sequence[HeadExample] = EXAMPLES,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[HeadScore]:
    """The ``n`` heads that look most at the passage that holds the answer.

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
        WindowError: If the model's window has no room for one of one's own examples.
        ModelError: If it has none for an example that is made.
        NumericsError: If the model computes NaN or infinity.
    """
    layers, per_layer = searched_heads(n, text_config(model))
    use_finch_attention(model)
    builder = PromptBuilder(tokenizer)
    window = window_of(text_config(model))
    if isinstance(examples, int):
        examples = _examples_that_fit(builder, examples, window)
    else:
        _check_fit(builder, examples, window)
    scores = torch.zeros(layers, per_layer)
    for number, example in enumerate(examples, 1):
        attention = attention_by_passage(model, builder, example)  # [layers, heads, passages]
        check_finite(attention, "the model's attention is")
        scores += (attention[..., example.gold] - attention.mean(dim=-1)) / len(examples)
        on_progress(number, len(examples))
    best = scores.flatten().topk(n)
    return [
        HeadScore(index // per_layer, index % per_layer, value)
        for index, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def searched_heads(n: int, config: Any) -> tuple[int, int]:
    """Layers that heads are looked for in, and heads of each.

    Args:
        n: Heads that are wanted.
        config: The model's configuration.

    Raises:
        InputError: If there are not so many.
    """
    layers, per_layer = layers_to_search(config), int(config.num_attention_heads)
    if not 1 <= n <= layers * per_layer:
        raise InputError(
            f"n is {n}: the model has {layers * per_layer} heads in the lower two thirds of its layers, ask for 1 to "
            f"{layers * per_layer}"
        )
    return layers, per_layer


def _examples_that_fit(builder: PromptBuilder, count: int, window: int) -> list[HeadExample]:
    """Examples with as many passages as the window takes, at most ``PASSAGES``."""
    for passages in range(PASSAGES, 1, -2):
        made = make_examples(count, passages)
        if all(prompt_tokens(builder, example) <= window for example in made):
            return made
    raise ModelError(
        f"the model's window of {window} tokens has no room for two example passages, so its retrieval heads cannot "
        'be found; use heads="all" or name them'
    )


def _check_fit(builder: PromptBuilder, examples: Sequence[HeadExample], window: int) -> None:
    if not examples:
        raise InputError("there are no examples: pass at least one")
    for number, example in enumerate(examples, 1):
        if (tokens := prompt_tokens(builder, example)) > window:
            raise WindowError(
                f"example {number} ({example.question!r}) has {tokens} tokens, and the model's window is {window}: "
                "give it fewer or shorter passages"
            )


def prompt_tokens(builder: PromptBuilder, example: HeadExample) -> int:
    """Tokens that the model reads of an example.

    Args:
        builder: Builds the prompt.
        example: The example.
    """
    prompt = builder.build(example.question, [Passage(text) for text in example.passages])
    return len(prompt.prefix) + sum(map(len, prompt.passages)) + len(prompt.question)


@torch.inference_mode()
def attention_by_passage(model: PreTrainedModel, builder: PromptBuilder, example: HeadExample) -> torch.Tensor:
    """Mean attention of the question's tokens on each passage.

    Args:
        model: A model that runs Finch's attention.
        builder: Builds the prompt.
        example: What is read.

    Returns:
        Shape [layers to search, heads, passages].
    """
    layers = layers_to_search(text_config(model))
    prompt = builder.build(example.question, [Passage(text) for text in example.passages])
    lengths = torch.tensor([len(passage) for passage in prompt.passages])
    passage_of = torch.repeat_interleave(torch.arange(len(lengths)), lengths)[None]
    document = slice(len(prompt.prefix), len(prompt.prefix) + len(passage_of[0]))
    by_layer: dict[int, torch.Tensor] = {}

    def observe(layer: int, query: torch.Tensor, key: torch.Tensor, scaling: float) -> None:
        weights = question_attention(query, key, scaling, len(prompt.question), prompt.own_tokens)
        by_layer[layer] = passage_sums(weights.mean(dim=1)[:, document], passage_of, len(lengths)).cpu()
        if layer == layers - 1:
            raise SeenEnough

    tokens = [*prompt.prefix, *(token for passage in prompt.passages for token in passage), *prompt.question]
    forward(model, torch.tensor(tokens), CompressedCache(layers, len(tokens)), observe)
    return torch.stack([by_layer[layer] for layer in sorted(by_layer)])
