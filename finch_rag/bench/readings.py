"""Ways to read a document whose speed is measured.

full              one plain forward pass (SDPA) and its steps, as transformers runs them
finch             each passage alone, the best into a small cache, and CUDA graphs where there is a GPU: `Finch.ask`
finch-compiled    the same with compiled layers
finch-loop        chunk by chunk under the question, as in the paper
finch-store       a store that has read the document before: its search, then the loop over a shortlist
finch-store-best  the same without the loop: the passages that it ranks best are read at once
kvpress           kvpress' FinchPress: one forward pass, each layer compressed after it; needs its own environment
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache

from ..engine import Finch
from ..errors import InputError, MissingExtraError
from ..models.forward import on_device
from ..prefill.planning import Strategy
from ..prefill.shortlists import shortlist_tokens
from ..prompts.builder import Prompt
from ..reading import read_request
from ..request import Request
from ..resolving import resolve, with_store
from ..settings import Settings
from ..store.store import PassageStore
from .peer_methods import compression_ratio

if TYPE_CHECKING:
    from transformers import PreTrainedModel

COMPILED = "finch-compiled"
STRATEGIES: Mapping[str, Strategy] = {"finch": "auto", COMPILED: "auto", "finch-loop": "loop"}  # Finch without a store
STORE_SHORTLISTS = {"finch-store": shortlist_tokens, "finch-store-best": lambda budget: 0}  # of a budget


@dataclass(frozen=True, slots=True)
class Reading:
    """A prompt in a cache.

    Attributes:
        layer_tokens: Tokens that ran through a layer, summed over the layers; None where it is not counted.
        step: Runs the model for the next token of the answer; the first one reads the question, if need be.
    """

    layer_tokens: int | None
    step: Callable[[], Any]


def full(finch: Finch, request: Request) -> Reading:
    """One plain forward pass.

    Args:
        finch: The engine, for its model.
        request: What is read.
    """
    cache = DynamicCache(config=finch.model.config)
    tokens = [*_document(request.prompt), *request.answer_prompt]
    logits = _logits(finch.model, cache, tokens)
    return Reading(len(tokens) * _layers(finch.model), _plain_steps(finch.model, cache, logits))


def by_finch(finch: Finch, request: Request) -> Reading:
    """Finch's reading of all passages, and its re-prefill.

    Args:
        finch: The engine.
        request: What is read.
    """
    cache = read_request(finch.runtime, request, ahead=True)
    prompt, figures = request.prompt, cache.document.figures
    document = sum(request.passage_tokens)
    questions = 2 if figures.strategy == "independent" else figures.chunks  # the neutral one is read beside it
    scanned = len(prompt.prefix) + document + questions * len(prompt.question)
    layer_tokens = scanned * figures.scanned_layers
    if cache.kept_tokens < document:
        layer_tokens += cache.length * _layers(finch.model)
    counted = None if finch.runtime.no_loop else layer_tokens  # layers of several kinds are not counted
    return Reading(counted, finch.runtime.decoder(cache.fork(request.room), request).steps().__next__)


def from_store(finch: Finch, store: PassageStore, question: str, settings: Settings) -> Reading:
    """Finch's search among passages that it has read before, and what it reads of them.

    Args:
        finch: The engine.
        store: Has read the document.
        question: The question.
        settings: Of the call, with the store.
    """
    passages, found = with_store(finch.runtime, question, [], replace(settings, store=store))
    request = resolve(finch.runtime, question, passages, found)
    cache = read_request(finch.runtime, request, ahead=True)
    return Reading(None, finch.runtime.decoder(cache.fork(request.room), request).steps().__next__)


def kvpress(finch: Finch, request: Request) -> Reading:
    """Kvpress' FinchPress at the same cache size.

    Args:
        finch: The engine, for its model.
        request: What is read.
    """
    from kvpress.presses.finch_press import FinchPress

    model, prompt = finch.model, request.prompt
    document = _document(prompt)
    tokens = [*document, *prompt.question]
    press = FinchPress()
    budget = request.plan.budget if request.plan is not None else 0
    press.compression_ratio = compression_ratio(len(tokens), len(prompt.prefix) + budget + len(prompt.question))
    used = set(tokens)
    press.delimiter_token_id = next(i for i in range(int(model.config.vocab_size)) if i not in used)
    cache = DynamicCache()
    ids = torch.tensor([[*document, press.delimiter_token_id, *prompt.question]], device=model.device)
    with press(model):
        model.base_model(input_ids=ids, past_key_values=cache, use_cache=True)
    logits = _logits(model, cache, prompt.tail)
    return Reading(len(tokens) * _layers(model), _plain_steps(model, cache, logits))


READINGS: dict[str, Callable[[Finch, Request], Reading]] = {
    "full": full,
    **dict.fromkeys(STRATEGIES, by_finch),
    "kvpress": kvpress,
}


def _plain_steps(model: PreTrainedModel, cache: Any, logits: torch.Tensor) -> Callable[[], int]:
    """The likeliest tokens one by one; a step beyond the first runs the model for the token before."""
    made: list[int] = []

    def step() -> int:
        after = logits if not made else _logits(model, cache, made[-1:])
        made.append(int(after.argmax()))
        return made[-1]

    return step


def check_methods(methods: Sequence[str]) -> None:
    """Raises if a method does not exist, or its package is not installed.

    Args:
        methods: What to measure.

    Raises:
        InputError: If there is no such method.
        MissingExtraError: If kvpress is not installed.
    """
    known = [*READINGS, *STORE_SHORTLISTS]
    if unknown := [method for method in methods if method not in known]:
        raise InputError(f"method {', '.join(unknown)} is unknown: use {', '.join(known)}")
    if "kvpress" in methods:
        try:
            import kvpress  # noqa: F401
        except ImportError as error:
            raise MissingExtraError(
                "kvpress is not installed: it needs transformers below 5.3, so run this with the finch-rag of the "
                "environment .venv-peers, which 'make bench-peers' sets up"
            ) from error


def _layers(model: PreTrainedModel) -> int:
    return int(model.config.num_hidden_layers)


def _document(prompt: Prompt) -> list[int]:
    return [*prompt.prefix, *(token for passage in prompt.passages for token in passage)]


def _logits(model: PreTrainedModel, cache: Any, tokens: list[int]) -> torch.Tensor:
    ids = on_device(tokens, model.device)[None]
    logits: torch.Tensor = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    return logits
