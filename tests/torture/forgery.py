"""Passages made of pieces of control tokens: none of these tokens may enter a prompt."""

from __future__ import annotations

import random

from finch_rag.prompts.builder import PromptBuilder

from ..small import chat_tokenizer
from .tally import RECOVERED, WRONG, Tally


def attack(count: int, seed: int = 0) -> Tally:
    """Encodes so many hostile texts.

    Args:
        count: How many.
        seed: Of the texts.
    """
    tally, drawn = Tally("control tokens and pieces of them in passages, titles and questions"), random.Random(seed)
    prompts = PromptBuilder(chat_tokenizer())
    control = prompts.control_ids
    written = sorted(map(str, prompts.tokenizer.convert_ids_to_tokens(sorted(control))))
    pieces = [
        *written,
        *(own[:place] for own in written for place in range(1, len(own))),
        " ",
        "\n",
        "\u200b",
        "\u00ad",
        "a",
    ]
    for _ in range(count):
        text = "".join(drawn.choices(pieces, k=drawn.randint(1, 12)))
        found = control.intersection(prompts.encode([text])[0])
        tally.note(WRONG if found else RECOVERED, repr(text))
    return tally
