"""Settings of an engine, options of a call: their types, and one table of rules for all of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypedDict, TypeVar, get_args

from .checks import (
    Refused,
    Rule,
    checked,
    function,
    list_of,
    number,
    one_of,
    or_none,
    shown,
    text,
    truth,
    whole_number,
)
from .decode.sampling import Sampling
from .errors import FinchError, InputError
from .heads.pairs import AloneHeads, Heads
from .prefill.planning import ChunkSize, Prior, ReadingSettings, Strategy
from .prefill.selection import SELECTIONS, Selection
from .prompts.builder import PromptSettings
from .prompts.chat_template import Render
from .request import NOT_SEARCHED, Progress, Searched
from .store.opening import StorePlace
from .store.store import PassageStore

Part = TypeVar("Part", PromptSettings, ReadingSettings, Sampling)


class EngineSettings(TypedDict, total=False):
    """Settings of an engine; see `finch_rag.Finch`."""

    name: str | None
    budget: int | None
    chunk_size: ChunkSize
    strategy: Strategy
    selection: Selection
    reread: bool
    cutoff: float | None
    prior: Prior
    rounds: int | None
    heads: Heads
    alone_heads: AloneHeads
    max_new_tokens: int
    instructions: str | None
    system_prompt: str | None
    compile_layers: bool
    strict: bool
    store: StorePlace
    shortlist_tokens: int | None
    quotes: bool
    support: bool
    min_support: float | None
    on_progress: Progress | None


class SamplingOptions(TypedDict, total=False):
    """Options of generation; see `finch_rag.decode.sampling.Sampling`. ``json_schema`` is a dictionary here.

    Attributes:
        quotes: See `Finch`.
        support: See `Finch`.
        min_support: See `Finch`.
    """

    max_new_tokens: int
    temperature: float
    top_p: float | None
    top_k: int | None
    seed: int | None
    repetition_penalty: float | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int]
    json_schema: Mapping[str, Any] | None
    quotes: bool
    support: bool
    min_support: float | None


class ReadingOptions(TypedDict, total=False):
    """Options of reading; where the engine has such a setting, each stands in for it, also when it is None.

    Attributes:
        budget: See `Finch`.
        chunk_size: See `Finch`.
        strategy: See `Finch`.
        selection: See `Finch`.
        reread: See `Finch`.
        cutoff: See `Finch`.
        prior: See `Finch`.
        rounds: See `Finch`.
        instructions: See `Finch`.
        system_prompt: See `Finch`.
        history: Earlier messages of the conversation, dictionaries with "role" ("user" or "assistant") and "content".
            They are read before the passages and never evicted.
        render: Makes the prompt of messages, control tokens included, in place of the tokenizer's chat template.
        max_context_tokens: Refuse passages that have more tokens than this.
        strict: See `Finch`.
        notes: Said in the report, beside Finch's own.
        store: See `Finch`.
        shortlist_tokens: See `Finch`.
        on_progress: See `Finch`.
    """

    budget: int | None
    chunk_size: ChunkSize
    strategy: Strategy
    selection: Selection
    reread: bool
    cutoff: float | None
    prior: Prior
    rounds: int | None
    instructions: str | None
    system_prompt: str | None
    history: Sequence[Mapping[str, object]]
    render: Render | None
    max_context_tokens: int | None
    strict: bool
    notes: Sequence[str]
    store: StorePlace
    shortlist_tokens: int | None
    on_progress: Progress | None


class CallOptions(ReadingOptions, SamplingOptions, total=False):
    """All options of a call."""


# The smallest temperature above 0: logits divided by less leave float32's range, and the answer would be greedy anyway.
_LEAST_TEMPERATURE = 1e-4
_SEEDS = (-(2**63), 2**64 - 1)  # what torch's generators take


def _budget(name: str, value: Any) -> int:
    return _tokens(name, value, ", or None")


def _chunk_size(name: str, value: Any) -> ChunkSize:
    if value is None or (isinstance(value, str) and value == "auto"):
        return None if value is None else "auto"
    return _tokens(name, value, ', or "auto"')


def _tokens(name: str, value: Any, other: str) -> int:
    """A number of tokens; ``other`` names the default where something else was passed."""
    cure = other if isinstance(value, (str, float, bool)) else "; leave it out for a default that fits the model"
    return int(whole_number(unit=" token", cure=cure)(name, value))


def _stop(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        value = [value] if value else None
    stops: tuple[str, ...] = list_of(text, "texts")(name, value)
    if not all(stops):
        raise Refused("a stop string is empty: leave it out")
    return stops


def _json_schema(name: str, value: Any) -> str:
    """A schema as JSON, so that nobody changes it during the call."""
    if not isinstance(value, Mapping):
        raise Refused(f"{name} is {shown(value)}: pass a JSON schema as a dictionary, or None")
    try:
        written = json.dumps(dict(value), allow_nan=False, ensure_ascii=False)
        written.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise Refused(f"{name} cannot be written as JSON: {shown(str(error))}; pass plain values") from None
    return written


def _store(name: str, value: Any) -> StorePlace:
    if not isinstance(value, (PassageStore, str, Path, bool)):
        raise Refused(
            f"{name} is {type(value).__name__}: pass a folder, True for a store in memory, what finch.open_store(...) "
            "returns, or None"
        )
    if isinstance(value, str) and not value.strip():
        raise Refused(f"{name} is an empty text: pass a folder, or True for a store in memory")
    return None if value is False else value  # an empty store is false too


def _history(name: str, value: Any) -> Any:
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Sequence):
        raise Refused(f"{name} is {type(value).__name__}: pass a list of messages, or leave it out")
    return value


RULES: Mapping[str, Rule] = {
    "budget": or_none(_budget),
    "chunk_size": _chunk_size,
    "strategy": one_of(get_args(Strategy)),
    "selection": one_of(SELECTIONS),
    "reread": truth,
    "cutoff": or_none(number(lambda value: 0 <= value <= 1, "it must be from 0, which leaves nothing out, to 1")),
    "prior": one_of(get_args(Prior)),
    "rounds": or_none(whole_number(most=2, cure=", or None")),
    "max_context_tokens": or_none(whole_number(unit=" token", cure=", or None for no limit")),
    "instructions": or_none(text),
    "system_prompt": or_none(text),
    "history": _history,
    "render": or_none(function),
    "strict": truth,
    "notes": list_of(text, "texts"),
    "store": or_none(_store),
    "shortlist_tokens": or_none(whole_number(least=0, unit=" tokens", cure=", which reads the best at once")),
    "max_new_tokens": whole_number(),
    "temperature": number(
        lambda value: value == 0 or value >= _LEAST_TEMPERATURE,
        f"the least is 0, which is greedy; the least that samples is {_LEAST_TEMPERATURE}",
    ),
    "top_p": or_none(number(lambda value: 0 < value <= 1, "it must be above 0 and at most 1")),
    "top_k": or_none(whole_number(cure=", or None")),
    "seed": or_none(whole_number(least=_SEEDS[0], most=_SEEDS[1], cure=", or None")),
    "repetition_penalty": or_none(number(lambda value: value > 0, "it must be above 0; 1 does nothing")),
    "stop": _stop,
    "stop_token_ids": list_of(whole_number(least=0), "token ids"),
    "json_schema": or_none(_json_schema),
    "quotes": truth,
    "support": truth,
    "min_support": or_none(number(lambda value: 0 <= value <= 1, "it must be from 0 to 1")),
    "on_progress": or_none(function),
}


def check_options(options: Mapping[str, object], error: type[FinchError] = InputError) -> dict[str, Any]:
    """Options of a call, or settings of an engine by the same names, as Finch uses them.

    Args:
        options: By name.
        error: What to raise.

    Raises:
        FinchError: Of the class ``error``, if a name is unknown or a value cannot work with any model.
    """
    return checked(RULES, options, error)


@dataclass(frozen=True, slots=True)
class Settings:
    """What a call does: an engine's defaults, or these with a call's options in their place.

    Attributes:
        reading: How passages are read.
        prompt: What the prompt says beside passages and question.
        sampling: How the answer is generated.
        on_progress: Told of a stage, and of its steps done and in all.
        strict: Raise where a prompt would have to be guessed at.
        notes: Said in the report.
        store: Asked in place of a scan, see `finch_rag.Finch`.
        shortlist_tokens: See `finch_rag.request.Request`.
        searched: See `finch_rag.request.Request`.
        quotes: Whether to find the sentences that an answer rests on.
        support: Whether to judge how well the passages support an answer.
        min_support: See `finch_rag.request.Request`.
    """

    reading: ReadingSettings = field(default_factory=ReadingSettings)
    prompt: PromptSettings = field(default_factory=PromptSettings)
    sampling: Sampling = field(default_factory=Sampling)
    on_progress: Progress = lambda stage, done, total: None
    strict: bool = False
    notes: tuple[str, ...] = ()
    store: StorePlace = None
    shortlist_tokens: int | None = None
    searched: Searched = NOT_SEARCHED
    quotes: bool = True
    support: bool = False
    min_support: float | None = None

    def updated(self, options: Mapping[str, object], error: type[FinchError] = InputError) -> Settings:
        """The same with options in place of what they name.

        Args:
            options: See `CallOptions`.
            error: What to raise.

        Raises:
            FinchError: Of the class ``error``, see `check_options`.
        """
        values = check_options(options, error)

        def part(settings: Part) -> Part:
            own = {entry.name for entry in fields(settings)}
            return replace(settings, **{name: value for name, value in values.items() if name in own})

        return Settings(
            part(self.reading),
            part(self.prompt),
            part(self.sampling),
            on_progress=values.get("on_progress") or self.on_progress,
            strict=values.get("strict", self.strict),
            notes=values.get("notes", self.notes),
            store=values.get("store", self.store),
            shortlist_tokens=values.get("shortlist_tokens", self.shortlist_tokens),
            quotes=values.get("quotes", self.quotes),
            support=values.get("support", self.support),
            min_support=values.get("min_support", self.min_support),
        )
