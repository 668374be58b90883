"""JSON schemas of users: an answer is held to one, or the schema is refused."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import torch

from finch_rag.decode.constraint import JsonConstraint, JsonConstraints
from finch_rag.prompts.builder import PromptBuilder
from finch_rag.settings import check_options
from tests.small import chat_tokenizer

from .support import Choices, dictionary, holds, only, text_of

_KEYS = (
    *("type", "properties", "items", "enum", "const", "anyOf", "oneOf", "allOf", "not", "if", "then", "else", "$ref"),
    *("$defs", "required", "additionalProperties", "patternProperties", "propertyNames", "prefixItems", "minItems"),
    *("maxItems", "minLength", "maxLength", "pattern", "format", "minimum", "maximum", "multipleOf", "uniqueItems"),
    *("minProperties", "maxProperties", "contains", "default", "title", "$schema", "$id", "dependentSchemas", "a"),
)
_VALUES: tuple[Any, ...] = (
    *("object", "array", "string", "integer", "number", "boolean", "null", "#", "#/$defs/a", "#/properties/a", "a", ""),
    *(
        "^a*$",
        "(a|b){2,3}",
        "(a+)+$",
        "[",
        "\\d{1,9999}",
        "date-time",
        "uuid",
        "email",
        "ipv4",
        "\U0001f600",
        "\u0000",
    ),
    *(0, 1, -1, 2, 3, 7, 1000, 10**6, 10**20, 0.1, -0.5, 1e308, True, False, None),
)
WORDS = (
    *("{", "}", "[", "]", ", ", ": ", '"'),
    *(f'"{key}": ' for key in _KEYS),
    *(json.dumps(value) for value in _VALUES if not isinstance(value, float)),
)
DICTIONARY = dictionary(WORDS)
_STEPS = 40
_AS_TEXT, _AS_CHOICES = 0, 1


@cache
def _constraints() -> JsonConstraints:
    return JsonConstraints(PromptBuilder(chat_tokenizer()), frozenset((chat_tokenizer().eos_token_id,)))


def seeds() -> list[bytes]:
    """Schemas as users write them, and some as choices."""
    schemas: list[Any] = [
        {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", None]}}, "required": ["a"]},
        {"$ref": "#/$defs/a", "$defs": {"a": {"type": "array", "items": {"$ref": "#/$defs/a"}, "maxItems": 2}}},
        {"anyOf": [{"type": "string", "pattern": "^a{2,3}$", "maxLength": 5}, {"const": 3}, {"type": "null"}]},
        {"type": "object", "patternProperties": {"^x": {"type": "boolean"}}, "additionalProperties": False},
        {"type": "array", "prefixItems": [{"type": "number", "minimum": 0.5, "maximum": 2}], "minItems": 1},
    ]
    texts = [bytes((_AS_TEXT, 3, 200, 77, 9)) + json.dumps(schema).encode() for schema in schemas]
    return [*texts, bytes((_AS_CHOICES, 3, 200, 77, 9, 3, 0, 0, 1, 1, 2, 0, 0, 3)), bytes((_AS_CHOICES, *range(60)))]


def check(data: bytes) -> None:
    """How the answer goes on, then a schema."""
    choices = Choices(data)
    way, draws = choices.number(2), choices.take(4)
    if way == _AS_TEXT:
        try:
            schema = json.loads(text_of(choices.rest(), WORDS))
        except (ValueError, RecursionError):
            return
    else:
        schema = _schema(choices, 4)
    with only():
        written = check_options({"json_schema": schema})["json_schema"]
        if written is not None:
            _check_answer(_constraints().of(written), draws)


def _schema(choices: Choices, depth: int) -> Any:
    kind = choices.number(4) if depth and choices.left else 3
    if kind == 3:
        return choices.one_of(_VALUES)
    if kind == 2:
        return [_schema(choices, depth - 1) for _ in range(choices.number(4))]
    return {choices.one_of(_KEYS): _schema(choices, depth - 1) for _ in range(choices.number(5))}


def _check_answer(constraint: JsonConstraint, draws: bytes) -> None:
    vocabulary = len(chat_tokenizer())
    logits, tokens = torch.zeros(1, vocabulary), []
    for step in range(_STEPS):
        allowed = constraint.mask(logits)[0].isfinite().nonzero()[:, 0].tolist()
        holds(bool(allowed), "no token may come next, and no error says so")
        token = allowed[(draws[step % len(draws)] if draws else 0) * (step + 1) % len(allowed)]
        done = constraint.take(token)
        if token != chat_tokenizer().eos_token_id:
            tokens.append(token)
        if done:
            json.loads(str(chat_tokenizer().decode(tokens)))  # a ValueError is a finding
            return
