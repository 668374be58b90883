"""Per-call options: their types, their checks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypedDict

from .chat_template import Render
from .decode import Sampling
from .errors import FinchError, InputError
from .selection import SELECTIONS, Selection

ChunkSize = int | Literal["auto"] | None  # None says the same as "auto"
Progress = Callable[[str, int, int], None]  # stage ("heads" or "prefill"), done, total


class SamplingOptions(TypedDict, total=False):
    """Options of generation; see `finch_rag.decode.Sampling`."""

    max_new_tokens: int
    temperature: float
    top_p: float | None
    top_k: int | None
    seed: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int]


class ReadingOptions(TypedDict, total=False):
    """Options of reading; where the engine has such a setting, each stands in for it, also when it is None.

    Attributes:
        budget: See `Finch`.
        chunk_size: See `Finch`.
        selection: See `Finch`.
        reread: See `Finch`.
        instructions: See `Finch`.
        system_prompt: See `Finch`.
        history: Earlier messages of the conversation, dictionaries with "role" ("user" or "assistant") and "content".
            They are read before the passages and never evicted.
        render: Makes the prompt of messages, control tokens included, in place of the tokenizer's chat template.
        max_context_tokens: Refuse passages that have more tokens than this.
        on_progress: See `Finch`.
    """

    budget: int | None
    chunk_size: ChunkSize
    selection: Selection
    reread: bool
    instructions: str | None
    system_prompt: str | None
    history: Sequence[Mapping[str, object]]
    render: Render | None
    max_context_tokens: int | None
    on_progress: Progress


class CallOptions(ReadingOptions, SamplingOptions, total=False):
    """All options of a call."""


def sampling_of(options: Mapping[str, Any], max_new_tokens: int) -> Sampling:
    """The options of generation among a call's options, checked.

    Args:
        options: A call's options.
        max_new_tokens: Taken where the options have none.

    Raises:
        InputError: If a value is out of its range.
    """
    check_names(options)
    chosen = {name: options[name] for name in SamplingOptions.__annotations__ if name in options}
    stop = chosen.pop("stop", None) or ()
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    stop_ids = chosen.pop("stop_token_ids", None) or ()
    if isinstance(stop_ids, (str, int)) or not all(isinstance(token, int) for token in stop_ids):
        raise InputError(f"stop_token_ids is {stop_ids!r}: pass a list of token ids")
    sampling = Sampling(**{"max_new_tokens": max_new_tokens, **chosen}, stop=stops, stop_token_ids=tuple(stop_ids))
    sampling.check()
    return sampling


def check_names(options: Mapping[str, Any]) -> None:
    """Raises an InputError if a call has an option that does not exist."""
    if unknown := set(options) - set(CallOptions.__annotations__):
        raise InputError(f"unknown option {', '.join(sorted(unknown))}: use {', '.join(CallOptions.__annotations__)}")


def chunk_tokens(chunk_size: ChunkSize) -> int | None:
    """Tokens of a chunk that were asked for; None where Finch chooses."""
    return None if chunk_size == "auto" else chunk_size


def check_reading(budget: int | None, chunk_size: ChunkSize, selection: str, error: type[FinchError]) -> None:
    """Raises ``error`` if a setting cannot work with any model.

    Args:
        budget: Document tokens kept per layer, or None.
        chunk_size: Document tokens read per step, or "auto" or None.
        selection: Name of the selection.
        error: What to raise.
    """
    for name, value in (("budget", budget), ("chunk_size", chunk_tokens(chunk_size))):
        if value is not None and not isinstance(value, int):
            default = "None" if name == "budget" else '"auto"'
            raise error(f"{name} is {value!r}: pass a whole number of tokens, or {default}")
        if value is not None and value < 1:
            raise error(f"{name} is {value}: the least is 1 token; leave it out for a default that fits the model")
    if selection not in SELECTIONS:
        raise error(f"selection is {selection!r}: use one of {', '.join(map(repr, SELECTIONS))}")


def check_length(context_tokens: int, max_context_tokens: int | None) -> None:
    """Raises an InputError if the passages are longer than the caller allows.

    Args:
        context_tokens: Tokens of all passages.
        max_context_tokens: The most that are allowed; None for no limit.
    """
    if max_context_tokens is not None and not isinstance(max_context_tokens, int):
        raise InputError(f"max_context_tokens is {max_context_tokens!r}: pass a whole number of tokens, or None")
    if max_context_tokens is not None and context_tokens > max_context_tokens:
        raise InputError(
            f"the passages have {context_tokens} tokens, more than max_context_tokens={max_context_tokens}: pass fewer "
            "passages, or raise max_context_tokens"
        )
