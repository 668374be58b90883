from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finch_rag.errors import CorpusError, FinchError, InputError
from finch_rag.jsonl import complete_objects, json_objects

TEXT = st.text(st.characters(exclude_categories=["Cs"]))  # no half surrogate pairs
OBJECTS = st.lists(st.dictionaries(TEXT, TEXT | st.integers() | st.none() | st.lists(TEXT)))


def read(text: str, error: type[FinchError] = InputError, cure: str = "") -> list[tuple[int, dict[str, Any]]]:
    return list(json_objects("mine.jsonl", text, error, cure))


def test_each_object_comes_with_the_number_of_its_line() -> None:
    assert read('{"a": 1}\n\n  \n{"a": [2, null]}\n') == [(1, {"a": 1}), (4, {"a": [2, None]})]
    assert read("") == []


@given(OBJECTS, st.booleans())
def test_what_is_written_is_read(objects: list[dict[str, Any]], ascii_only: bool) -> None:
    text = "\n".join(json.dumps(fields, ensure_ascii=ascii_only) for fields in objects)
    assert read(text) == list(enumerate(objects, 1))


@pytest.mark.parametrize("error", [InputError, CorpusError])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("{", r"mine\.jsonl, line 2 is not JSON: Expecting"),
        ('{"a": 1} {"b": 2}', r"mine\.jsonl, line 2 is not JSON: Extra data"),
        ('{"a": "\\ud800"}', r"mine\.jsonl, line 2 is not JSON: .*surrogates not allowed"),
        ('{"\\udfff": 1}', r"mine\.jsonl, line 2 is not JSON: .*surrogates not allowed"),
        ("[" * 100_000, r"mine\.jsonl, line 2 is not JSON: .*recursion"),
        ("[1]", r"mine\.jsonl, line 2 is a JSON list: each line must be an object"),
        ("null", r"mine\.jsonl, line 2 is a JSON NoneType: each line must be an object"),
    ],
)
def test_a_wrong_line_is_named(wrong: str, message: str, error: type[FinchError]) -> None:
    with pytest.raises(error, match=message) as raised:
        read(f'{{"a": 1}}\n{wrong}\n', error)
    assert type(raised.value) is error
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("wrong", ["{", "[1]"])
def test_the_cure_ends_the_message(wrong: str) -> None:
    with pytest.raises(InputError, match=r"line 1 .*: each line is a passage$"):
        read(wrong, cure="each line is a passage")


def test_objects_before_a_wrong_line_are_handed_out() -> None:
    found = json_objects("mine.jsonl", '{"a": 1}\n{', InputError)
    assert next(found) == (1, {"a": 1})
    with pytest.raises(InputError):
        next(found)


def test_an_object_may_hold_any_line_separator() -> None:
    text = json.dumps({"a": "x\u2028y\u0085z"}, ensure_ascii=False)
    assert list(complete_objects(text)) == [{"a": "x\u2028y\u0085z"}]


def test_a_line_that_was_cut_off_is_passed_over() -> None:
    assert list(complete_objects('{"a": 1}\n{"a": 2, "b": "x\n{"a": 3}\n\n{"a": 4')) == [{"a": 1}, {"a": 3}]
