"""Parameters of OpenAI's and vLLM's requests as options of a call; what cannot be honoured is refused by its name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from pydantic import BaseModel, ConfigDict, Field

from ..settings import CallOptions, check_options
from .documents import Documents
from .errors import refused

# They change no answer.
_IGNORED = frozenset(
    (
        "metadata",
        "user",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "prompt_cache_options",
        "prediction",
        "parallel_tool_calls",
        "max_tool_calls",
    )
)
# They change no answer with these values; None is always among them.
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False, 0),
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "reasoning_effort": ("none", "minimal"),
    "reasoning": ({},),
    "truncation": ("disabled", "auto"),
    "include": ([],),
    "background": (False,),
    "previous_response_id": (),
    "conversation": (),
    "prompt": (),
    "verbosity": ("medium",),
    "echo": (False,),
    "suffix": ("",),
    "min_p": (0,),
    "min_tokens": (0,),
    "length_penalty": (1,),
    "ignore_eos": (False,),
    "skip_special_tokens": (True,),
    "use_beam_search": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
}
_CURES = {
    "n": "one answer is made a request",
    "tools": "put what tools found into documents",
    "tool_choice": "put what tools found into documents",
    "logprobs": "no probabilities are handed out",
    "previous_response_id": "no answers are kept: send the messages before",
}
_OWN = frozenset(CallOptions.__annotations__) - {"render", "on_progress", "store", "history", "notes"}
_SAME_NAMES = ("temperature", "top_p", "top_k", "seed", "stop", "stop_token_ids", "repetition_penalty")
_ANY_OBJECT = {"type": "object", "additionalProperties": True}


class StreamOptions(BaseModel):
    """What a stream has beside the text.

    Attributes:
        include_usage: Whether a last chunk has the tokens.
    """

    include_usage: bool = False


class Parameters(BaseModel):
    """What chat and text completions have in common. Parameters that are not listed are taken where they do nothing.

    Attributes:
        model: The model; may be left out.
        documents: Passages to answer from: texts, or objects with id, title and text.
        store: Name of a store of the server; without documents all of it is asked.
        finch: Options of finch-rag by their names (budget, cutoff, rounds, quotes, support, ...); ``report`` asks for
            the report.
        stream: Whether the answer comes in pieces.
        stream_options: What else a stream has.
        max_tokens: The most tokens of the answer.
        temperature: 0, the default, is greedy.
        top_p: Nucleus sampling.
        top_k: Sampling from the best.
        seed: Of the sampling.
        stop: Texts that end the answer.
        stop_token_ids: Tokens that end the answer.
        repetition_penalty: Above 1, repetitions are rarer.
        response_format: "text", "json_object" or "json_schema".
    """

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    documents: Documents = Field(default_factory=list)
    store: str | bool | None = None
    finch: dict[str, Any] = Field(default_factory=dict)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    repetition_penalty: float | None = None
    response_format: dict[str, Any] | None = None

    @property
    def most_tokens(self) -> int | None:
        """The most tokens of the answer; None for the default."""
        return self.max_tokens

    @property
    def answer_format(self) -> dict[str, Any] | None:
        """The form of the answer, as ``response_format`` has it; None for free text."""
        return self.response_format

    @property
    def store_name(self) -> str | None:
        """Name of a store; OpenAI has a switch of the same name, which may be off.

        Raises:
            ApiError: 400, if it is on.
        """
        if self.store is True:
            raise refused(
                "store is true, and this server keeps no answers: pass the name of a store, or leave it out", "store"
            )
        return self.store if isinstance(self.store, str) else None

    @property
    def wants_report(self) -> bool:
        """Whether the report is part of the answer.

        Raises:
            ApiError: 400, if it is neither asked for nor not.
        """
        wanted = self.finch.get("report", False)
        if not isinstance(wanted, bool):
            raise refused(f"finch.report is {repr(wanted)[:60]}: pass true or false", "finch.report")
        return wanted


def options_of(parameters: Parameters) -> CallOptions:
    """The options of a call.

    Args:
        parameters: Of a request.

    Raises:
        ApiError: 400, for what cannot be honoured.
        InputError: If a value cannot work with any model.
    """
    _check_others(parameters.model_extra or {})
    options: dict[str, Any] = {name: value for name in _SAME_NAMES if (value := getattr(parameters, name)) is not None}
    if parameters.most_tokens is not None:
        options["max_new_tokens"] = parameters.most_tokens
    if parameters.answer_format is not None and (schema := _schema(parameters.answer_format)) is not None:
        options["json_schema"] = schema
    own = {name: value for name, value in parameters.finch.items() if name != "report"}
    if unknown := sorted(set(own) - _OWN):
        raise refused(
            f"finch.{unknown[0][:60]} is no option of a request: use report, {', '.join(sorted(_OWN))}",
            f"finch.{unknown[0][:60]}",
        )
    if twice := sorted(set(own) & set(options)):
        raise refused(f"{twice[0]} stands in finch and beside it: leave one of them out", f"finch.{twice[0]}")
    options |= own
    check_options(options)
    return cast(CallOptions, options)


def _check_others(others: Mapping[str, Any]) -> None:
    for name, value in others.items():
        if name in _IGNORED or value is None or any(_same(value, neutral) for neutral in _NEUTRAL.get(name, ())):
            continue
        shown = name[:60]
        if name not in _NEUTRAL:
            raise refused(f"unknown parameter {shown!r}: leave it out; options of finch-rag go into finch", shown)
        cure = _CURES.get(name, "it would change the answer and cannot be honoured")
        raise refused(f"{shown} is {repr(value)[:60]}: {cure}; leave it out", shown, "unsupported_parameter")


def _same(value: object, neutral: object) -> bool:
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def _schema(response_format: Mapping[str, Any]) -> Mapping[str, Any] | None:
    kind = response_format.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return _ANY_OBJECT
    described = response_format.get("json_schema")
    if kind == "json_schema" and isinstance(described, Mapping) and isinstance(described.get("schema"), Mapping):
        schema: Mapping[str, Any] = described["schema"]
        return schema
    raise refused(
        'response_format cannot be read: use {"type": "json_schema", "json_schema": {"name": ..., "schema": {...}}}, '
        '{"type": "json_object"} or {"type": "text"}',
        "response_format",
    )
