"""JSON by a schema: of the model's logits, only those stay whose tokens the schema allows next.

llguidance, of the extra ``json``, says which those are. JSON comes on one line, as `json.dumps` writes it: with one
space behind a comma or colon and no other white space between values, so that no small model goes on with it forever.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import pad

from ..errors import InputError, MissingExtraError, ModelError
from ..prompts.builder import PromptBuilder

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from llguidance._lib import JsonCompileOptions

_FORM: JsonCompileOptions = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_SHOWN = 150  # characters of llguidance's own words that a message shows

# Where a schema holds other schemas; what stands elsewhere (enum, const, default, examples) is data.
_ONE = ("items", "additionalProperties", "additionalItems", "contains", "not", "if", "then", "else", "propertyNames")
_LIST = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
# Beside these, an object's properties may be named in several places, each of which must let the others' pass.
_JOINED = frozenset(
    ("$ref", "$dynamicRef", "anyOf", "oneOf", "allOf", "if", "dependentSchemas", "unevaluatedProperties")
)


def can_force_json() -> bool:
    """Whether llguidance is installed, so that an answer can be held to a JSON schema."""
    return find_spec("llguidance") is not None


def closed(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """A schema whose objects have the properties that it names and no others, where it leaves that open.

    What keeps to it keeps to ``schema``, too; a small model would add properties without end. A schema that puts an
    object together of several parts stays as it is.

    Args:
        schema: A JSON schema.
    """
    parts = list(_parts(schema))
    if any("allOf" in part or ("properties" in part and not _JOINED.isdisjoint(part)) for part in parts):
        return schema
    copy: dict[str, Any] = json.loads(json.dumps(schema))
    for part in _parts(copy):
        if "properties" in part:
            part.setdefault("additionalProperties", False)
    return copy


def _parts(schema: Any) -> Iterator[dict[str, Any]]:
    """A schema and all schemas inside it."""
    if not isinstance(schema, dict):
        return
    yield schema
    for name in _ONE:
        yield from _parts(schema.get(name))
    for name in _LIST:
        for part in found if isinstance(found := schema.get(name), list) else ():
            yield from _parts(part)
    for name in _NAMED:
        for part in found.values() if isinstance(found := schema.get(name), dict) else ():
            yield from _parts(part)


class JsonConstraints:
    """Makes constraints for one tokenizer. Safe to share between threads.

    Args:
        prompts: Has the tokenizer.
        end_tokens: Tokens that end an answer.
    """

    def __init__(self, prompts: PromptBuilder, end_tokens: frozenset[int]) -> None:
        self._prompts = prompts
        self._end_tokens = end_tokens
        self._lock = threading.Lock()
        self._tokenizer: LLTokenizer | None = None

    def of(self, schema: str) -> JsonConstraint:
        """A constraint for one answer.

        Args:
            schema: A JSON schema, as JSON.

        Raises:
            InputError: If an answer cannot be held to it.
            MissingExtraError: If llguidance is not installed.
            ModelError: If the tokenizer is one that llguidance cannot read.
        """
        if not can_force_json():
            raise MissingExtraError.of("llguidance", "json")
        from llguidance import LLMatcher

        tokenizer = self._made()
        try:
            grammar = LLMatcher.grammar_from_json_schema(json.dumps(closed(json.loads(schema))), overrides=_FORM)
        except (ValueError, RecursionError) as error:
            raise _refused(str(error)) from None
        matcher = LLMatcher(tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise _refused(matcher.get_error())
        return JsonConstraint(matcher, self._end_tokens)

    def _made(self) -> LLTokenizer:
        """The tokenizer as llguidance reads it; made once, which takes about a second for a large vocabulary."""
        from llguidance.hf import from_tokenizer

        with self._lock:
            if self._tokenizer is None:
                tokenizer: Any  # it says itself whether it can be read
                with self._prompts.alone() as tokenizer:
                    # Which of several end tokens it knows makes no difference: see `JsonConstraint.mask`.
                    end = min(self._end_tokens, default=None)
                    try:
                        self._tokenizer = from_tokenizer(tokenizer, eos_token=end)
                    except Exception as error:  # what its Rust library raises has no class of its own
                        raise ModelError(
                            f"json_schema does not work with this tokenizer ({type(tokenizer).__name__}): "
                            f"{_line(str(error))}; leave it out"
                        ) from error
            return self._tokenizer


class JsonConstraint:
    """Holds one answer to a JSON schema.

    Args:
        matcher: At the schema's beginning.
        end_tokens: Tokens that end an answer; they are allowed where the JSON may end, and nowhere else.
    """

    def __init__(self, matcher: LLMatcher, end_tokens: frozenset[int]) -> None:
        self._matcher = matcher
        self._end_tokens = end_tokens

    def mask(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits whose tokens may come next; -inf for the others, and for columns that stand for no token.

        Args:
            logits: Shape [1, columns]; they stay as they are.

        Raises:
            InputError: If no token may come next.
        """
        bits = bytearray(self._matcher.compute_bitmask())
        if self._matcher.is_error():
            raise _refused(self._matcher.get_error())
        may_end = self._matcher.is_accepting()
        for token in self._end_tokens:
            if token // 8 < len(bits):
                bits[token // 8] = bits[token // 8] & ~(1 << token % 8) | may_end << token % 8
        # Unpacked on the device: the bits are an eighth of the bytes to send.
        packed = torch.frombuffer(bits, dtype=torch.uint8).to(logits.device)
        places = torch.arange(8, dtype=torch.uint8, device=logits.device)
        forbidden = ((packed[:, None] >> places) & 1 == 0).view(1, -1)  # [1, tokens, up to the next whole byte]
        columns = logits.shape[-1] - forbidden.shape[-1]  # more than tokens where the vocabulary is padded
        return logits.masked_fill(pad(forbidden, (0, columns), value=True), -torch.inf)

    def take(self, token: int) -> bool:
        """Goes on by the chosen token; says whether the JSON is complete and nothing can follow.

        Args:
            token: One that `mask` left.

        Raises:
            InputError: If the schema does not allow it, which is so where the model forbids all that are allowed.
        """
        if token in self._end_tokens and self._matcher.is_accepting():
            return True
        if not self._matcher.consume_token(token):
            raise _refused(self._matcher.get_error())
        return self._matcher.is_stopped()


def _refused(reason: str) -> InputError:
    return InputError(f"an answer cannot be held to json_schema: {_line(reason)}; change the schema")


def _line(reason: str) -> str:
    """The beginning of llguidance's own words, in one line."""
    line = " ".join(reason.split("<state>")[0].split())
    return line if len(line) <= _SHOWN else f"{line[:_SHOWN]}..."
