"""What `FinchLLM` is given -> settings that work, or one line that says why not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_index.core.bridge.pydantic import ValidationError
from llama_index.core.prompts import BasePromptTemplate, PromptTemplate

from finch_rag import PassageStore, SettingsError
from finch_rag.adapters import StorePlace, check_options

if TYPE_CHECKING:
    from .base import FinchLLM

_GENERATE_KWARGS = ("do_sample", "max_new_tokens", "repetition_penalty", "seed", "temperature", "top_k", "top_p")
_ACCELERATE_MAPS = ("balanced", "balanced_low_0", "sequential")  # device maps that accelerate works out


def checked_mapping(name: str, value: Mapping[str, Any] | None) -> dict[str, Any]:
    """A dictionary; an empty one for None.

    Args:
        name: What to call it in an error.
        value: What was given.

    Raises:
        SettingsError: If it is none.
    """
    if value is not None and not isinstance(value, Mapping):
        raise SettingsError(f"{name} is {type(value).__name__}: pass a dictionary")
    return dict(value or {})


def checked_generate_kwargs(value: Mapping[str, Any] | None) -> dict[str, Any]:
    """Options of generation as Finch names them.

    Args:
        value: ``generate_kwargs`` as transformers takes them.

    Raises:
        SettingsError: If one is unknown or out of its range.
    """
    options = checked_mapping("generate_kwargs", value)
    if unknown := set(options) - set(_GENERATE_KWARGS):
        raise SettingsError(
            f"generate_kwargs has {', '.join(sorted(unknown))}, which Finch does not have: use "
            f"{', '.join(_GENERATE_KWARGS)}"
        )
    sample = options.pop("do_sample", None)
    if sample is False:
        options["temperature"] = 0.0
    elif sample:
        options.setdefault("temperature", 1.0)
    check_options(options, SettingsError)
    return options


def split_store(store: StorePlace) -> tuple[str | bool | None, PassageStore | None]:
    """A store as what can be written down, and what cannot: an open one.

    Args:
        store: What was given.

    Raises:
        SettingsError: If it is no store.
    """
    check_options({"store": store}, SettingsError)
    if isinstance(store, PassageStore):
        return None, store
    return str(store) if isinstance(store, Path) else store, None


def call_options(llm: FinchLLM, call: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a call: its own before those of its LLM; for what is None in both the engine's own settings hold.

    Args:
        llm: The LLM.
        call: What the caller says, as LlamaIndex names it.
    """
    names = (
        "budget",
        "chunk_size",
        "cutoff",
        "instructions",
        "max_context_tokens",
        "max_new_tokens",
        "min_support",
        "prior",
        "quotes",
        "repetition_penalty",
        "rounds",
        "selection",
        "shortlist_tokens",
        "stop",
        "strategy",
        "support",
        "strict",
    )
    own = {name: getattr(llm, name) for name in names}
    own |= {"stop_token_ids": llm.stopping_ids, "store": llm.store_place, **llm.generate_kwargs}
    said = {"max_new_tokens" if name == "max_tokens" else name: value for name, value in call.items()}
    return {name: value for options in (own, said) for name, value in options.items() if value is not None}


def as_wrapper(prompt: str | BasePromptTemplate | None) -> BasePromptTemplate | None:
    """A query wrapper prompt; a text is its template.

    Args:
        prompt: With ``{query_str}``.

    Raises:
        SettingsError: If it has no place for the query, or is neither text nor a template.
    """
    if prompt is None:
        return None
    template = PromptTemplate(prompt) if isinstance(prompt, str) else prompt
    if not isinstance(template, BasePromptTemplate):
        raise SettingsError(f"query_wrapper_prompt is {type(prompt).__name__}: pass a text or a prompt template")
    if "query_str" not in template.template_vars:
        raise SettingsError("query_wrapper_prompt has no {query_str}: put it where the query goes")
    return template


def placement(device_map: str | Mapping[str, Any]) -> dict[str, Any]:
    """A device map as arguments of the engine.

    Args:
        device_map: A device, or a map as transformers takes it.
    """
    if isinstance(device_map, Mapping):
        return {"model_kwargs": {"device_map": dict(device_map)}}
    if device_map in _ACCELERATE_MAPS:
        return {"model_kwargs": {"device_map": device_map}}
    return {"device": device_map}


@contextmanager
def one_line() -> Iterator[None]:
    """Says in one line what pydantic says in several.

    Raises:
        SettingsError: For the first value of a wrong type.
    """
    try:
        yield
    except ValidationError as invalid:
        first = invalid.errors()[0]
        name = ".".join(map(str, first["loc"])) or "a setting"
        raise SettingsError(f"{name} is {type(first['input']).__name__}: {first['msg']}") from None
