"""Files of a corpus: passages come of them, or a line that says why not; and no word is lost."""

from __future__ import annotations

import gzip
import tempfile
from functools import cache
from pathlib import Path

from finch_rag.corpus.reading import load_questions, read_corpus
from finch_rag.corpus.splitting import count_words, markdown_sections, split_text
from finch_rag.prompts.sentences import sentence_spans

from .support import Choices, dictionary, holds, only, text_of

WORDS = (
    *("# ", "## a\n", "### [a](b) #\n", "```\n", "~~~\n", "\n\n", "\n", ". ", "e.g. ", "word " * 40, "a" * 200, "\t"),
    *("[", "](", ")", "\u3002", "\u4e00", "\u30a2" * 50, "\u2026", "\u201d", "\r\n", "- ", "| a | b |\n", "1. ", "!"),
    *('{"text": "', '"}\n', '{"id": 1, "title": "t", "text": "x"}\n', '{"question": "q", "answers": ["a"], '),
    *('"gold_ids": ["b"]}\n', '"answerable": false', '"sentences": [["s"]]', "\u2028", "\x85", "\x0c", "\ufeff", "\0"),
)
DICTIONARY = dictionary(WORDS)
_NAMES = ("a.txt", "a.md", "a.jsonl", "a.md.gz", "questions.jsonl", "a.gz.txt")


def seeds() -> list[bytes]:
    """A file of each kind."""
    markdown = b"Before.\n\n# One [a](b)\n\nText e.g. this. And that!\n\n```\n# no heading\n```\n## One\nMore.\n"
    lines = b'{"id": "a", "title": "T", "text": "The bridge."}\n{"text": "The museum."}\n'
    questions = b'{"question": "who?", "answers": ["Novak"], "gold_ids": ["a"], "sentences": [["s"]]}\n'
    return [
        b"\0" + b"A sentence. Another one! And \xe4\xb8\x80\xe3\x80\x82\n\nA paragraph.\n" * 9,
        b"\x01" + markdown,
        b"\x02" + lines,
        b"\x03" + gzip.compress(markdown, mtime=0),
        b"\x04" + questions,
        b"\x05plain",
    ]


@cache
def _folder() -> Path:
    shared_memory = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="finch-fuzz-", dir=shared_memory if shared_memory.is_dir() else None))


def check(data: bytes) -> None:
    """The kind of a file, and what is in it."""
    choices = Choices(data)
    name = choices.one_of(_NAMES)
    content = choices.rest()
    file = _folder() / name
    file.write_bytes(
        content if name.endswith(".gz") else text_of(content, WORDS).encode() if content[:1] != b"\xff" else content
    )
    try:
        with only():
            found = read_corpus(file)
            holds(bool(found.passages), "no passages, and no error")
            holds(all(passage.text.strip() for passage in found.passages), "a passage without text")
            ids = [passage.id for passage in found.passages]
            holds(name.endswith(".jsonl") or len(set(ids)) == len(ids), "two passages have one id")
        with only():
            load_questions(file)
    finally:
        file.unlink()
    _check_texts(text_of(content, WORDS))


def _check_texts(text: str) -> None:
    pieces = split_text(text, 20)
    holds("".join("".join(pieces).split()) == "".join(text.split()), "splitting lost a word")
    holds(all(count_words(piece) <= 20 for piece in pieces), "a piece is too long")
    sections = markdown_sections(text)
    holds(
        len({s.slug for s in sections if s.heading is not None}) == sum(s.heading is not None for s in sections), "slug"
    )
    place = 0
    for start, end in sentence_spans(text):
        holds(place <= start < end, "sentences overlap")
        holds(not text[place:start].strip(), "text stands between sentences")
        holds(text[start:end] == text[start:end].strip(), "white space around a sentence")
        place = end
    holds(not text[place:].strip(), "text stands behind the last sentence")
