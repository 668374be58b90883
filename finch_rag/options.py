"""Per-call options: their types, their checks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

from .decode import Sampling
from .errors import FinchError, InputError
from .selection import SELECTIONS, Selection

Progress = Callable[[str, int, int], None]  # stage ("heads" or "prefill"), done, total


class SamplingOptions(TypedDict, total=False):
    """Options of generation; see `finch_rag.decode.Sampling`."""

    max_new_tokens: int
    temperature: float
    top_p: float | None
    top_k: int | None
    seed: int | None
    stop: str | Sequence[str] | None


class ReadingOptions(TypedDict, total=False):
    """Options of reading; each stands in for the engine's own setting, also when it is None."""

    budget: int | None
    chunk_size: int | None
    selection: Selection
    reread: bool
    instructions: str | None
    system_prompt: str | None
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
    sampling = Sampling(**{"max_new_tokens": max_new_tokens, **chosen}, stop=stops)
    sampling.check()
    return sampling


def check_names(options: Mapping[str, Any]) -> None:
    """Raises an InputError if a call has an option that does not exist."""
    if unknown := set(options) - set(CallOptions.__annotations__):
        raise InputError(f"unknown option {', '.join(sorted(unknown))}: use {', '.join(CallOptions.__annotations__)}")


def check_reading(budget: int | None, chunk_size: int | None, selection: str, error: type[FinchError]) -> None:
    """Raises ``error`` if a setting cannot work with any model.

    Args:
        budget: Document tokens kept per layer, or None.
        chunk_size: Document tokens read per step, or None.
        selection: Name of the selection.
        error: What to raise.
    """
    for name, value in (("budget", budget), ("chunk_size", chunk_size)):
        if value is not None and not isinstance(value, int):
            raise error(f"{name} is {value!r}: pass a whole number of tokens, or None")
        if value is not None and value < 1:
            raise error(f"{name} is {value}: the least is 1 token; leave it out for a default that fits the model")
    if selection not in SELECTIONS:
        raise error(f"selection is {selection!r}: use one of {', '.join(map(repr, SELECTIONS))}")
