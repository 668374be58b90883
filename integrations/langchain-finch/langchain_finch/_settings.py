"""What both models share: their settings, the options of a call, the engine, what identifies a call in a cache."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from finch_rag import Finch, FinchError, InputError, Passage, SettingsError
from finch_rag.adapters import INSTRUCTIONS, ChunkSize, Prior, Selection, Strategy, check_options

from ._convert import NO_DOCUMENTS, passages_of
from ._engines import EngineSource
from ._stores import StoreField, StoreHolder, for_store, is_store, store_identity

if TYPE_CHECKING:
    from langchain_core.language_models import LangSmithParams

PROVIDER = "finch"

_OTHER_NAMES = {"max_new_tokens": "max_tokens"}  # finch-rag's name -> LangChain's
_LOADING = ("tokenizer", "dtype", "device", "heads", "trust_remote_code", "model_kwargs", "tokenizer_kwargs")
_HOW = ("stream",)  # options of a call that say how LangChain runs it, not what it asks
# Tokens of an answer whose form is asked for, where nobody says how many: JSON that is cut off is no JSON. A smaller
# part of the window where that has no room for them.
_FORMED_TOKENS, _FORMED_PART = 512, 4
# What an answer of a given engine depends on.
_ENGINE_SETTINGS = (
    *(
        "alone_heads",
        "budget",
        "chunk_size",
        "cutoff",
        "heads",
        "instructions",
        "max_new_tokens",
        "min_support",
        "prior",
        "quotes",
        "reread",
        "rounds",
        "selection",
    ),
    *("strategy", "support", "system_prompt"),
)
# Standard parameters of LangChain that concern a server, which a local model has none of.
_OF_SERVERS = ("api_key", "base_url", "max_retries", "timeout")


class CallSettings(BaseModel):
    """Settings that a call may replace; None stands for the engine's own."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    budget: int | None = Field(default=None, description="Document tokens kept per layer.")
    chunk_size: ChunkSize = Field(default=None, description='Document tokens scanned per step; "auto" chooses.')
    strategy: Strategy | None = Field(default=None, description='How passages are ranked; "auto" chooses.')
    selection: Selection | None = Field(default=None, description='What is kept: "passage" (whole ones) or "token".')
    reread: bool | None = Field(default=None, description="Whether kept passages are prefilled again at the end.")
    cutoff: float | None = Field(
        default=None, description="Leave out what got less than this part of the best's attention."
    )
    prior: Prior | None = Field(default=None, description='What the retriever\'s order counts: "auto" or "none".')
    rounds: int | None = Field(default=None, description="How often passages are ranked: 1, or 2 for several sources.")
    instructions: str | None = Field(default=None, description="Read before the passages.")
    system_prompt: str | None = Field(default=None, description="System message where the messages have none.")
    max_tokens: int | None = Field(default=None, description="The most tokens of an answer; also max_new_tokens.")
    max_context_tokens: int | None = Field(default=None, description="Refuse passages with more tokens than this.")
    temperature: float | None = Field(default=None, description="0 or None takes the likeliest token.")
    top_p: float | None = Field(default=None, description="Sample from tokens whose probabilities sum to this.")
    top_k: int | None = Field(default=None, description="Sample from this many of the likeliest tokens.")
    seed: int | None = Field(default=None, description="Makes sampling repeatable.")
    repetition_penalty: float | None = Field(default=None, description="Above 1, makes what was said less likely.")
    stop: list[str] | None = Field(default=None, description="Texts that end an answer; they are never shown.")
    strict: bool | None = Field(
        default=None, description="Whether an unknown prompt that does not fit into the window is an error."
    )
    store: StoreField = Field(default=None, description="Keeps what is read, so that it is read once for all calls.")
    shortlist_tokens: int | None = Field(
        default=None, description="The most tokens of the best passages that the loop then scans; 0 for none."
    )
    support: bool | None = Field(default=None, description="Whether to judge how well passages support an answer.")
    min_support: float | None = Field(default=None, description="Withhold an answer that is supported less.")
    quotes: bool | None = Field(default=None, description="Whether to find the sentences that an answer rests on.")


class _Call(CallSettings):
    """All that a call may say."""

    stop_token_ids: list[int] | None = None
    json_schema: dict[str, Any] | None = None
    prompt_instructions: str | None = None  # stand behind those of the model, or in for Finch's own
    keeps_default_instructions: bool = False  # Finch's own stand before those of the prompt
    format_instructions: str | None = None
    on_progress: Callable[[str, int, int], None] | None = None
    notes: list[str] | None = None


class FinchSettings(StoreHolder, CallSettings):
    """Settings of a model; those of loading decide which engine it shares, the others only how calls are made."""

    model_config = ConfigDict(arbitrary_types_allowed=True, populate_by_name=True)

    model: str = Field(
        default="", description='A hub id, a folder, a GGUF file or "embedded"; only a name where engine is given.'
    )
    tokenizer: str | None = Field(default=None, description="Hub id or folder of the tokenizer, if not the model's.")
    dtype: str = Field(default="auto", description='"auto", "float32", "bfloat16" or "float16".')
    device: str = Field(default="auto", description='"auto", "cpu", "cuda" or "cuda:N".')
    heads: str | list[tuple[int, int]] = Field(default="auto", description='"auto", "all" or (layer, head) pairs.')
    trust_remote_code: bool = Field(default=False, description="Whether code that comes with the model may run.")
    model_kwargs: dict[str, Any] = Field(default_factory=dict, description="For transformers' from_pretrained.")
    tokenizer_kwargs: dict[str, Any] = Field(default_factory=dict, description="The same for the tokenizer.")
    # An alias, so that type checkers know the keyword; `engine` itself is what it leads to.
    engine_source: Finch | EngineSource = Field(
        default_factory=EngineSource, alias="engine", exclude=True, repr=False, description="A finch_rag.Finch to use."
    )

    def __init__(self, **settings: Any) -> None:
        # Checked here and not in a validator, out of which pydantic would make an error of several lines.
        given = _renamed({name: value for name, value in settings.items() if name not in _OF_SERVERS}, SettingsError)
        source = given.pop("engine", given.pop("engine_source", None))
        if source is not None:
            if not isinstance(source, (Finch, EngineSource)):
                raise SettingsError(f"engine is {type(source).__name__}: pass a finch_rag.Finch, or a name as model")
            given["engine_source"] = source if isinstance(source, EngineSource) else EngineSource(source)
            given = {"model": getattr(source, "name", None), **given}
        if not given.get("model"):
            raise SettingsError(
                'there is no model: pass model= (a hub id, a folder, a .gguf file, "embedded") or engine='
            )
        for name in ("model", "store"):
            if isinstance(given.get(name), Path):
                given[name] = str(given[name])
        if isinstance(given.get("stop"), str):
            given["stop"] = [given["stop"]]
        if unknown := set(given) - set(type(self).model_fields):
            own = [name for name in FinchSettings.model_fields if name != "engine_source"]
            raise SettingsError(f"unknown setting {', '.join(sorted(unknown))}: use {', '.join(own)}, engine")
        with _one_line(SettingsError):
            super().__init__(**given)
        check_options(self._own_options(), SettingsError)

    @classmethod
    def is_lc_serializable(cls) -> bool:
        """Whether LangChain may serialise it: by its settings, without the engine."""
        return True

    @property
    def engine(self) -> Finch:
        """The engine, loaded at the first use; models with the same settings of loading share it.

        Raises:
            ModelError: If the model cannot be loaded, or Finch cannot run it.
        """
        return self._source.engine(self.model, self._differing(_LOADING))

    def get_token_ids(self, text: str) -> list[int]:
        """A text's token ids, by the model's tokenizer.

        Args:
            text: The text.
        """
        custom: Callable[[str], list[int]] | None = getattr(self, "custom_get_token_ids", None)
        return self.engine.prompts.encode([text])[0] if custom is None else custom(text)

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        named = {_OTHER_NAMES.get(name, name): value for name, value in kwargs.items()}  # bad ones raise later
        params: LangSmithParams = super()._get_ls_params(stop=self._stop_of(stop), **named)  # type: ignore[misc]
        return params

    @property
    def _source(self) -> EngineSource:
        source = self.engine_source
        return source if isinstance(source, EngineSource) else EngineSource(source)

    @property
    def max_new_tokens(self) -> int | None:
        """The same as ``max_tokens``, by finch-rag's name."""
        return self.max_tokens

    @property
    def _identifying_params(self) -> Mapping[str, Any]:
        """All that an answer depends on, for caches and traces."""
        identity = {"model": self.model, **self._differing(_LOADING), **self._differing(CallSettings.model_fields)}
        if "store" in identity:
            identity["store"] = store_identity(self.store)
        if (engine := self._source.given) is not None:  # its settings hold where the model has none
            own = {name: getattr(engine, name) for name in _ENGINE_SETTINGS}
            own |= {"store": store_identity(engine.settings.store), "shortlist": engine.settings.shortlist_tokens}
            identity["engine"] = {"fingerprint": engine.fingerprint, **own}
        return identity

    def _differing(self, names: Sequence[str] | Mapping[str, Any]) -> dict[str, Any]:
        """Settings that are not at their defaults."""
        fields = type(self).model_fields
        defaults = {name: fields[name].get_default(call_default_factory=True) for name in names}
        return {name: value for name, default in defaults.items() if (value := getattr(self, name)) != default}

    def _own_options(self) -> dict[str, Any]:
        """The settings as options of the engine's calls."""
        return _options({name: getattr(self, name) for name in CallSettings.model_fields})

    def _request(self, stop: Sequence[str] | None, kwargs: Mapping[str, Any]) -> tuple[list[Passage], dict[str, Any]]:
        """Passages and options of a call.

        Args:
            stop: Of the call; the model's own when None.
            kwargs: The call's keyword arguments.

        Raises:
            InputError: If one of them does not exist or cannot be used.
        """
        given = _renamed({name: value for name, value in kwargs.items() if name not in _HOW}, InputError)
        documents = given.pop("documents", None)
        if stop is not None:
            given["stop"] = [stop] if isinstance(stop, str) else stop
        known = list(_Call.model_fields)
        if unknown := set(given) - set(known):
            raise InputError(f"unknown option {', '.join(sorted(unknown))}: use documents, {', '.join(known)}")
        with _one_line(InputError):
            call = _Call(**given)
        options = {
            **self._own_options(),
            **_options({name: getattr(call, name) for name in call.model_fields_set}),
        }
        keeps_default = options.pop("keeps_default_instructions", False)
        if (words := options.pop("prompt_instructions", None)) is not None:
            self._add_instructions(options, words, INSTRUCTIONS if keeps_default else None)
        if (form := options.pop("format_instructions", None)) is not None:
            self._ask_for_form(options, form)
        if documents is None:
            return [], options
        passages = passages_of(documents)
        if not passages:
            options["notes"] = [*options.get("notes", ()), NO_DOCUMENTS]
        return passages, options

    def _storable(self, passages: list[Passage], options: dict[str, Any]) -> list[Passage]:
        """A call's passages as its store may keep them; changes the options where there is nothing to keep."""
        if not is_store(options.get("store", self.engine.settings.store)):
            return passages
        if passages and not any(passage.text.strip() for passage in passages):
            options["store"] = False  # it could rank none of them
        return for_store(passages)

    def _ask_for_form(self, options: dict[str, Any], form: str) -> None:
        """Says in a call's options what form its answer shall have, behind the instructions that there are."""
        self._add_instructions(options, form)
        if self._source.given is None:  # a given engine has its own length
            least, room = self.engine.max_new_tokens, self.engine.window // _FORMED_PART
            options.setdefault("max_new_tokens", max(least, min(_FORMED_TOKENS, room)))

    def _add_instructions(self, options: dict[str, Any], words: str, default: str | None = None) -> None:
        """Puts words behind a call's instructions, or behind a default where there are none."""
        said = options.get("instructions", self.engine.instructions)
        said = default if said is None else said
        options["instructions"] = f"{said}\n\n{words}" if said else words

    def _stop_of(self, stop: list[str] | None) -> list[str] | None:
        """A call's stop texts, the model's own where it has none."""
        return self.stop if stop is None else stop

    def _call_params(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """What a call's keyword arguments add to `_identifying_params`; documents are there by a digest."""
        params = _renamed(
            {name: value for name, value in kwargs.items() if name not in (*_HOW, "on_progress")}, InputError
        )
        if (documents := params.get("documents")) is not None:
            params["documents"] = _digest(passages_of(documents))
        if "store" in params:
            params["store"] = store_identity(params["store"])
        return params


def _renamed(given: Mapping[str, Any], error: type[FinchError]) -> dict[str, Any]:
    """The same by LangChain's names."""
    renamed = dict(given)
    for name, standard in _OTHER_NAMES.items():
        if name in renamed:
            if standard in renamed:
                raise error(f"{name} and {standard} are the same setting: pass one of them")
            renamed[standard] = renamed.pop(name)
    return renamed


def _options(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as finch-rag's options; None leaves one to the engine."""
    core = {standard: name for name, standard in _OTHER_NAMES.items()}
    return {core.get(name, name): value for name, value in settings.items() if value is not None}


def _digest(passages: Sequence[Passage]) -> str:
    """Stands for what an answer shows of its passages; of the metadata that is what citations have."""
    cited = ("title", "url", "source")
    shown = [(p.text, p.id, p.title, *(p.metadata.get(name) for name in cited)) for p in passages]
    return f"{len(passages)} documents, sha256 {hashlib.sha256(repr(shown).encode()).hexdigest()}"


@contextmanager
def _one_line(error: type[FinchError]) -> Iterator[None]:
    """Says in one line what pydantic says in several."""
    try:
        yield
    except ValidationError as invalid:
        first = invalid.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise error(f"{name} is {first['input']!r}: {first['msg'][:1].lower()}{first['msg'][1:]}") from invalid
