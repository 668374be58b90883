"""How the next token is chosen from the model's logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen and when generation ends.

    Attributes:
        max_new_tokens: The most tokens to generate, at least 1; 0 where nothing is generated.
        temperature: 0 takes the likeliest token; above 0 samples.
        top_p: Sample only from the likeliest tokens whose probabilities sum to this, in (0, 1].
        top_k: Sample only from this many of the likeliest tokens.
        seed: Makes sampling repeatable.
        repetition_penalty: Above 1, tokens that the answer has already become less likely, as in CTRL (Keskar et al.
            2019, https://arxiv.org/abs/1909.05858), and below 1 likelier; 1 and None do nothing. Unlike transformers'
            own, it leaves the prompt's tokens alone: an answer repeats words of its passages.
        stop: Strings that end the answer; they are never shown.
        stop_token_ids: Tokens that end the answer as the model's own end tokens do.
        json_schema: A JSON schema, as JSON, that the answer is held to; None for free text. Such an answer ends where
            its JSON is complete: ``stop`` and ``stop_token_ids`` would cut it apart and are not heeded. Where
            ``max_new_tokens`` ends it before, the JSON is incomplete, and the stop reason is "length".
        ignore_eos: Go on after the model's own end tokens, to ``max_new_tokens``; for measuring.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    repetition_penalty: float | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    json_schema: str | None = None
    ignore_eos: bool = False


Sampler = Callable[[torch.Tensor], torch.Tensor]


def is_greedy(sampling: Sampling) -> bool:
    """Whether the next token is the one with the largest logit.

    Args:
        sampling: Checked settings.
    """
    return sampling.temperature == 0 and sampling.repetition_penalty in (None, 1)


def sampler(sampling: Sampling) -> Sampler:
    """Logits of shape [1, vocabulary] -> a token's id, one element, on their device.

    Args:
        sampling: Checked settings.
    """
    choose = _chooser(sampling)
    if sampling.repetition_penalty in (None, 1):
        return choose
    penalty = RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty or 1))
    said: torch.Tensor | None = None  # on the logits' device, so that no token waits for another

    def pick(logits: torch.Tensor) -> torch.Tensor:
        nonlocal said
        token = choose(logits if said is None else penalty(said, logits))
        latest = token.view(1, 1)
        said = latest if said is None else torch.cat((said, latest), dim=1)
        return token

    return pick


def _chooser(sampling: Sampling) -> Sampler:
    """Greedy, or sampling with its own generator."""
    if sampling.temperature == 0:
        return lambda logits: logits.argmax(dim=-1)
    warpers: list[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = [
        TemperatureLogitsWarper(float(sampling.temperature))
    ]
    if sampling.top_k is not None:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p is not None:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    generator: torch.Generator | None = None

    def pick(logits: torch.Tensor) -> torch.Tensor:
        nonlocal generator
        logits = logits.nan_to_num(nan=0.0)  # reported with the token; sampling from NaN would break the device
        if generator is None:
            generator = torch.Generator(logits.device)
            if sampling.seed is not None:
                generator.manual_seed(sampling.seed)
            else:
                generator.seed()
        for warper in warpers:
            logits = warper(torch.empty(1, 0, dtype=torch.long), logits)
        return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)

    return pick
