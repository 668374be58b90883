"""JSON lines: of any text come objects, or one line that says what is wrong."""

from __future__ import annotations

from finch_rag.errors import CorpusError
from finch_rag.jsonl import complete_objects, json_objects

from .support import dictionary, holds, only, text_of

WORDS = (
    *('{"id": "a", "text": "b"}', '{"a": ', "}", "[", "]", '"', "\\u", "\\ud800", "\n", "\r\n", "1e999", "-0", "NaN"),
    *(
        "null",
        "true",
        '{"a": {"a": {"a": ',
        "[" * 1000,
        "{" * 1000,
        '{"a":' * 1000,
        "9" * 5000,
        "\u2028",
        "\ufeff",
        "\0",
    ),
)
DICTIONARY = dictionary(WORDS)


def seeds() -> list[bytes]:
    """Good lines, and a bad one among them."""
    return [
        b'{"id": "a", "text": "b"}\n\n{"c": [1, 2.5e3, null, true, {"d": "\\u00e4"}]}\n',
        b'{"a": 1}\n{"b": \n',
        b'{"a": "\\ud83d\\ude00"}',
    ]


def check(data: bytes) -> None:
    """A text."""
    text = text_of(data, WORDS)
    lines = text.split("\n")
    with only():
        for number, fields in json_objects("some.jsonl", text, CorpusError, "pass objects"):
            holds(isinstance(fields, dict), "what is no object is handed out")
            holds(bool(lines[number - 1].strip()), f"line {number} is empty")
    for fields in complete_objects(text):
        holds(isinstance(fields, dict), f"of a line that was cut off comes {str(fields)[:40]}")
