"""Reads a corpus: text, Markdown and JSON-lines files -> passages with stable ids."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

from typing_extensions import Unpack

from ..checks import checked, truth, whole_number
from ..errors import CorpusError, InputError
from ..jsonl import json_objects
from ..prompts.passages import Passage
from .contents import MAX_FILE_BYTES, Contents, UnreadableError
from .files import Found, as_text, find_files, left_out, shown
from .ids import with_own_ids
from .splitting import markdown_sections, split_text

EXTENSIONS = (".txt", ".md", ".jsonl")
_READ = "what is read: .txt, .md and .jsonl files, also with .gz"
_RULES = {
    "follow_links": truth,
    "max_file_bytes": whole_number(unit=" byte"),
    "max_corpus_bytes": whole_number(unit=" byte"),
}
_QUESTIONS = "questions"  # JSON-lines files of a folder whose names begin so hold evaluation questions


@dataclass(frozen=True, slots=True)
class Corpus:
    """Passages read from files.

    Attributes:
        passages: In the order of their files' paths, each with text, id and title (None where a JSON line has none).
        warnings: One line for each file that was left out because it could not be read, one for links that were not
            followed, and one each for passages that stand more than once or have the id of another.
        shared_ids: Ids that several passages had; the first of each has it still.
    """

    passages: list[Passage]
    warnings: list[str] = field(default_factory=list)
    shared_ids: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Question:
    """A question with known answers.

    Attributes:
        id: Its id; "FILE#LINE" where the file has none.
        question: The question.
        answers: Texts of which any is right; at least one, unless the question cannot be answered.
        gold_ids: Ids of the passages that hold the answer; of a question that cannot be answered, those that seem to.
        answerable: Whether a passage holds the answer.
        sentences: For each annotator the sentences of the gold passages that support the answer; none where nobody
            marked them.
        needs_all: Whether all ``answers`` are asked for, and not any of them.
    """

    id: str
    question: str
    answers: tuple[str, ...]
    gold_ids: tuple[str, ...]
    answerable: bool = True
    sentences: tuple[tuple[str, ...], ...] = ()
    needs_all: bool = False


class CorpusOptions(TypedDict, total=False):
    """Options of `read_corpus`.

    Attributes:
        follow_links: Whether links to folders are followed, and links that lead out of the folder; a folder that is
            reached in several ways is read once.
        max_file_bytes: A file of more bytes, when it is expanded, is left out; 1 GiB where it is not given.
        max_corpus_bytes: A corpus of more bytes is refused; 16 GiB where it is not given.
    """

    follow_links: bool
    max_file_bytes: int
    max_corpus_bytes: int


def read_corpus(path: str | Path, **options: Unpack[CorpusOptions]) -> Corpus:
    r"""Reads a file, or all files of a folder and its subfolders, as passages.

    - ``.md`` is split at its headings: the heading is the title, the id is "PATH#SLUG" with GitHub's slug. Text before
      the first heading has the id "PATH" and the file's stem as its title.
    - ``.txt`` is split at paragraphs: the title is the file's stem, the ids are "PATH#1", "PATH#2" ...
    - ``.jsonl`` holds a passage a line, ``{"id", "title", "text"}``, of which only ``text`` is required; texts are
      not split.

    PATH is relative to the folder. Sections and text of more than 160 words are cut between paragraphs, then
    sentences; the further parts of a section have ".part2", ".part3" ... behind their id. All of it may be compressed
    (``.gz``). Files that begin with a dot are left out, and so are a folder's ``questions*.jsonl``, which hold
    evaluation questions. Bytes of a name that are not UTF-8 are escaped (``\xe9``).

    No two passages have one id: a JSON line that stands again is left out, and what has the id of another passage gets
    ".2", ".3" ... behind it. What is left out or gets another id is said in ``warnings``.

    Args:
        path: The file or folder.
        options: See `CorpusOptions`.

    Raises:
        CorpusError: If it is missing, too large or has no passages, or a JSON line cannot be read as a passage.
        InputError: If an option cannot work.
    """
    root, chosen = Path(path), checked(_RULES, options, InputError)
    follow_links = chosen.pop("follow_links", False)
    contents = Contents(**chosen)
    passages: list[Passage] = []
    found = _found(root, follow_links)
    warnings = found.warnings
    for name, file in found.files:
        try:
            read = list(_READERS[_extension(name)](name, contents.text(file)))
        except UnreadableError as reason:
            warnings.append(left_out(name, str(reason)))
            continue
        if not read:
            warnings.append(f"{shown(name)} has no text")
        passages += read
    if not passages:
        count = len(found.files)
        raise CorpusError(f"the corpus {root} has no text: {count} file(s) looked at, {'; '.join(warnings[:3])}")
    passages, renamed, shared_ids = with_own_ids(passages)
    return Corpus(passages, [*warnings, *renamed], shared_ids)


def load_questions(path: str | Path, *, max_file_bytes: int = MAX_FILE_BYTES) -> list[Question]:
    """Reads evaluation questions, one JSON object a line, plain or ``.gz``.

    A line has ``question``, ``answers`` (a list of texts) and ``gold_ids`` (a list of passage ids) or ``gold_id``
    (one); ``id`` may be missing. Where ``answerable`` is false, ``answers`` and ``gold_ids`` may be empty or missing.
    ``sentences`` may hold, for each annotator, the list of sentences that support the answer.

    Args:
        path: The file.
        max_file_bytes: The most bytes that it has, when it is expanded.

    Raises:
        CorpusError: If the file is missing or unreadable, has no questions, or a line is not a question.
        InputError: If the limit cannot be one.
    """
    file = Path(path)
    try:
        file.stat()
    except (OSError, ValueError) as error:
        raise CorpusError(f"the questions {file} do not exist: pass a .jsonl file, plain or .gz") from error
    try:
        text = Contents(**checked(_RULES, {"max_file_bytes": max_file_bytes}, InputError)).text(file)
    except UnreadableError as reason:
        raise CorpusError(f"{file} {reason}: pass a .jsonl file, plain or .gz") from reason
    questions = [_question(file.name, number, fields) for number, fields in json_objects(file.name, text, CorpusError)]
    if not questions:
        raise CorpusError(f"{file} has no questions: it needs a JSON object a line")
    return questions


def _found(root: Path, follow_links: bool) -> Found:
    """Files to read with their names in ids, sorted by name."""
    try:
        mode = root.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:  # a NUL, half a surrogate pair
        raise CorpusError(f"the corpus {root} does not exist: pass a folder or a file; {_READ}") from error
    except OSError as error:
        reason = f"{shown(str(root))} cannot be read ({error.strerror})"
        raise CorpusError(f"the corpus {reason}: pass another one") from error
    if not stat.S_ISDIR(mode):
        if not stat.S_ISREG(mode):
            raise CorpusError(f"the corpus {root} is no regular file: pass a folder or a file; {_READ}")
        if not _extension(root.name):
            raise CorpusError(f"the corpus {root} is not of a kind that can be read; {_READ}")
        return Found([(as_text(root.name), root)])
    found = find_files(root, _is_read, follow_links)
    if not found.files:
        left = f" ({'; '.join(found.warnings[:3])})" if found.warnings else ""
        raise CorpusError(f"the corpus {root} has no files that can be read{left}; {_READ}")
    return found


def _is_read(name: str) -> bool:
    extension = _extension(name)
    return bool(extension) and not (extension == ".jsonl" and name.startswith(_QUESTIONS))


def _extension(name: str) -> str:
    bare = name.lower().removesuffix(".gz")
    return next((extension for extension in EXTENSIONS if bare.endswith(extension)), "")


def _stem(name: str) -> str:
    """A file's name without folders and extensions."""
    bare = name.rpartition("/")[2]
    bare = bare[: -len(".gz")] if bare.lower().endswith(".gz") else bare
    return Path(bare).stem


def _markdown(name: str, text: str) -> Iterator[Passage]:
    for section in markdown_sections(text):
        section_id = name if section.heading is None else f"{name}#{section.slug}"
        for number, part in enumerate(split_text(section.text), 1):
            # A slug has no dot, so this id is no other section's.
            part_id = section_id if number == 1 else f"{section_id}.part{number}"
            yield Passage(part, part_id, section.heading or _stem(name))


def _plain(name: str, text: str) -> Iterator[Passage]:
    for number, part in enumerate(split_text(text), 1):
        yield Passage(part, f"{name}#{number}", _stem(name))


def _json_passages(name: str, text: str) -> Iterator[Passage]:
    for number, fields in json_objects(name, text, CorpusError):
        title = fields.get("title")
        if not (title is None or isinstance(title, str)):
            raise CorpusError(f'{name}, line {number}: "title" is {type(title).__name__}, not text')
        yield Passage(_text(fields, "text", name, number), _id(fields, name, number), title or None)


_READERS = {".txt": _plain, ".md": _markdown, ".jsonl": _json_passages}


def _text(fields: dict[str, Any], key: str, name: str, number: int) -> str:
    value = fields.get(key)
    if not isinstance(value, str) or not value.strip():
        raise CorpusError(f'{name}, line {number} has no text in "{key}"')
    return value


def _id(fields: dict[str, Any], name: str, number: int) -> str:
    value = fields.get("id")
    if value is None or value == "":
        return f"{name}#{number}"
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise CorpusError(f'{name}, line {number}: "id" is {type(value).__name__}, not text')
    return str(value)


def _question(name: str, number: int, fields: dict[str, Any]) -> Question:
    answerable = fields.get("answerable", True)
    if not isinstance(answerable, bool):
        raise CorpusError(f'{name}, line {number}: "answerable" is {type(answerable).__name__}, not true or false')
    least = 1 if answerable else 0
    if "gold_ids" in fields or (not answerable and "gold_id" not in fields):
        gold = _texts(fields.get("gold_ids", []), "gold_ids", name, number, least)
    else:
        gold = (_text(fields, "gold_id", name, number),)
    marked = fields.get("sentences", [])
    if not isinstance(marked, list):
        raise CorpusError(f'{name}, line {number}: "sentences" must be a list of lists of texts')
    sentences = (_texts(of_one, "sentences", name, number, 0) for of_one in marked)
    return Question(
        id=_id(fields, name, number),
        question=_text(fields, "question", name, number),
        answers=_texts(fields.get("answers", []), "answers", name, number, least),
        gold_ids=gold,
        answerable=answerable,
        sentences=tuple(of_one for of_one in sentences if of_one),
    )


def _texts(values: object, key: str, name: str, number: int, least: int) -> tuple[str, ...]:
    if not isinstance(values, list) or len(values) < least or not all(isinstance(value, str) for value in values):
        ending = ", at least one" if least else ""
        raise CorpusError(f'{name}, line {number}: "{key}" must be a list of texts{ending}')
    return tuple(values)
