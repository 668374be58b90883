"""Lists and parts in the options of benchmarks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..errors import InputError
from ..terminal.loading import check_positive


def numbers_in(option: str, text: str) -> list[int]:
    """The whole numbers from 1 that an option's text lists.

    Args:
        option: Its name, for the message.
        text: Numbers with commas between them.

    Raises:
        InputError: If it is anything else.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() and int(part) for part in parts):
        raise InputError(f"--{option} is {text!r}: use whole numbers from 1, such as 256,512")
    return [int(part) for part in parts]


def names_in(text: str) -> list[str]:
    """The names that a text lists.

    Args:
        text: Names with commas between them.
    """
    return [name for part in text.split(",") if (name := part.strip())]


def shard_of(text: str) -> tuple[int, int]:
    """The part that "2/3" names, counted from 0, and how many there are.

    Args:
        text: I/N.

    Raises:
        InputError: If it is anything else, or I is not from 1 to N.
    """
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise InputError(f"--shard is {text!r}: use I/N with I from 1 to N, such as 1/4")
    return int(part) - 1, int(parts)


def check_runs(methods: Sequence[str], known: Iterable[str], budgets: Sequence[int], **least_one: int | None) -> None:
    """Raises an InputError that names the first argument that cannot work.

    Args:
        methods: What to run.
        known: The methods that there are.
        budgets: With which budgets.
        least_one: Further numbers by their names.
    """
    names = list(known)
    if not methods or (unknown := [method for method in methods if method not in names]):
        wrong = f"method {', '.join(unknown)} is unknown" if methods else "there is no method to run"
        raise InputError(f"{wrong}: use {', '.join(names)}")
    if not budgets:
        raise InputError("there is no budget: name at least one")
    check_positive(budget=min(budgets), **least_one)
