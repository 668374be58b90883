"""Rules for what users pass in: each says in one line what is wrong and what to pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral, Real
from typing import Any

from .errors import FinchError

Rule = Callable[[str, Any], Any]  # name and value -> the value to use; raises `Refused`

_SHOWN = 60  # characters of a bad value that a message shows


class Refused(Exception):  # noqa: N818 - becomes an error of the caller's class
    """A value breaks a rule; the message is the line for the user."""


def checked(rules: Mapping[str, Rule], values: Mapping[str, object], error: type[FinchError]) -> dict[str, Any]:
    """The values to use.

    Args:
        rules: By name.
        values: By name.
        error: What to raise.

    Raises:
        FinchError: Of the class ``error``, if a name is unknown or a value breaks its rule.
    """
    if unknown := sorted(set(values) - set(rules)):
        raise error(f"unknown option {', '.join(unknown)}: use {', '.join(rules)}")
    try:
        return {name: rules[name](name, value) for name, value in values.items()}
    except Refused as refused:
        raise error(str(refused)) from None


def whole_number(*, least: int = 1, most: int | None = None, unit: str = "", cure: str = "") -> Rule:
    """A whole number in a range.

    Args:
        least: The smallest.
        most: The largest; None for no limit.
        unit: What is counted, for messages: " token".
        cure: Ends the message: "; leave it out ...".
    """

    def rule(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise Refused(f"{name} is {shown(value)}: pass a whole number{f' of{unit}s' if unit else ''}{cure}")
        whole = int(value)
        if whole < least:
            raise Refused(f"{name} is {shown(whole)}: the least is {least}{unit}{cure}")
        if most is not None and whole > most:
            raise Refused(f"{name} is {shown(whole)}: the most is {most}{unit}{cure}")
        return whole

    return rule


def number(holds: Callable[[float], bool], what: str) -> Rule:
    """A finite number.

    Args:
        holds: Whether it is in its range.
        what: Says in words what its range is.
    """

    def rule(name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, Real):
            raise Refused(f"{name} is {shown(value)}: pass a number; {what}")
        if not math.isfinite(value) or not holds(float(value)):
            raise Refused(f"{name} is {shown(value)}: {what}")
        return float(value)

    return rule


def text(name: str, value: Any) -> str:
    """A text that can be encoded."""
    if not isinstance(value, str):
        raise Refused(f"{name} is {type(value).__name__}, not text: pass a str")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Refused(f"{name} holds half a surrogate pair: decode it with errors='replace' first") from None
    return value


def truth(name: str, value: Any) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise Refused(f"{name} is {shown(value)}: pass True or False")
    return value


def function(name: str, value: Any) -> Any:
    """Something that can be called."""
    if not callable(value):
        raise Refused(f"{name} is {shown(value)}: pass a function")
    return value


def one_of(choices: Iterable[str]) -> Rule:
    """One of some words."""
    listed = tuple(choices)

    def rule(name: str, value: Any) -> str:
        if not isinstance(value, str) or value not in listed:
            raise Refused(f"{name} is {shown(value)}: use one of {', '.join(map(repr, listed))}")
        return value

    return rule


def or_none(rule: Rule) -> Rule:
    """None, or what a rule takes."""
    return lambda name, value: None if value is None else rule(name, value)


def list_of(rule: Rule, what: str) -> Rule:
    """Values that each keep a rule, as a tuple; None stands for none.

    Args:
        rule: Of each value.
        what: The values in words.
    """

    def of_list(name: str, value: Any) -> tuple[Any, ...]:
        if value is None:
            return ()
        if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
            raise Refused(f"{name} is {shown(value)}: pass a list of {what}")
        return tuple(rule(f"{name}[{place}]", item) for place, item in enumerate(value))

    return of_list


def shown(value: Any) -> str:
    """A value as a message shows it.

    Args:
        value: Any value.
    """
    written = repr(value)
    return written if len(written) <= _SHOWN else f"{written[:_SHOWN]}..."
