"""Corpora that somebody made to hurt, or that went wrong: each with what must come of it."""

from __future__ import annotations

import gzip
import json
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import chdir
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MIB = 2**20
RAISED = "max_file_bytes (--max-file-mib)"


@dataclass(frozen=True)
class Hostile:
    """A corpus, and what must come of it.

    Attributes:
        name: Of the test.
        make: Makes it in an empty folder; what it returns is read, the folder where that is None.
        ids: Of the passages; None where an error is raised.
        said: Parts of the warnings, or of the error; nothing else may be said where there are none.
        options: Of `read_corpus`.
    """

    name: str
    make: Callable[[Path], Path | None]
    ids: Sequence[str] | None
    said: Sequence[str] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


def files(*names: str, text: str = "words", beside: Callable[[Path], object] | None = None) -> Callable[[Path], None]:
    """Files that all have one text, and something else beside them."""

    def make(folder: Path) -> None:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        if beside is not None:
            beside(folder)

    return make


def raw(**contents: bytes) -> Callable[[Path], None]:
    """Files, a keyword each, with a dot for its last underscore (``a_txt`` is a.txt, ``a_txt_gz`` is a.txt.gz)."""

    def make(folder: Path) -> None:
        for name, content in contents.items():
            (folder / name.replace("_", ".")).write_bytes(content)

    return make


def lines(*records: Any) -> Callable[[Path], None]:
    """A file p.jsonl; what is text already stands as it is."""
    text = "\n".join(record if isinstance(record, str) else json.dumps(record) for record in records)
    return raw(p_jsonl=text.encode())


def _named(name: bytes) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        with open(os.fsencode(folder) + b"/" + name, "wb") as file:  # noqa: PTH123 - no Path has such a name
            file.write(b"words")

    return make


def _deep(depth: int, name: str = "d") -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        here = Path.cwd()
        (folder / "a.txt").write_text("words")
        try:
            os.chdir(folder)
            for _ in range(depth):
                os.mkdir(name)  # noqa: PTH102 - relative: the whole path may be longer than the system allows
                os.chdir(name)
            Path("z.txt").write_text("words")
        finally:
            os.chdir(here)

    return make


def _bomb(mib: int) -> bytes:
    """A text of so many MiB that takes a thousandth of it."""
    return gzip.compress(b"a " * (mib * MIB // 2), compresslevel=9)


def _link(name: str, target: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).symlink_to(target)


def _both(*makes: Callable[[Path], object]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        for each in makes:
            each(folder)

    return make


def _outside(folder: Path) -> None:
    """A neighbour of the corpus, with files of its own."""
    other = folder.parent / "outside"
    (other / "sub").mkdir(parents=True)
    (other / "secret.txt").write_text("secret")
    (other / "sub" / "more.txt").write_text("secret")


def _hard_link(folder: Path) -> None:
    (folder / "b.txt").hardlink_to(folder / "a.txt")


def _socket(folder: Path) -> None:
    with chdir(folder), socket.socket(socket.AF_UNIX) as made:
        made.bind("s.txt")


def _fifo(name: str) -> Callable[[Path], None]:
    return lambda folder: os.mkfifo(folder / name)


def _read(make: Callable[[Path], object], name: str) -> Callable[[Path], Path]:
    """Makes a corpus, and reads one thing in it."""

    def made(folder: Path) -> Path:
        make(folder)
        return folder / name

    return made


def _text(text: str = "words", **fields: Any) -> dict[str, Any]:
    return {**fields, "text": text}


_NO_FILE = "is no regular file, so it is left out"
_TWICE = "the later ones are called ID.2, ID.3 ..."

NAMES = (
    Hostile("not UTF-8", _named(b"caf\xe9.txt"), ["caf\\xe9.txt#1"]),
    Hostile("not UTF-8 nor a text", _both(_named(b"\xff.txt"), raw(b_txt=b"\xff")), ["\\xff.txt#1"], ["b.txt is not"]),
    Hostile(
        "unreadable and not UTF-8",
        _both(files("a.txt"), lambda f: _named(b"\xff.txt.gz")(f)),
        ["a.txt#1"],
        ["\\xff.txt.gz cannot be decompressed"],
    ),
    Hostile("line feed", files("a\nb.txt"), ["a\nb.txt#1"]),
    Hostile(
        "line feed and unreadable",
        _both(files("z.txt"), lambda f: (f / "a\nb.txt").write_bytes(b"\xff")),
        ["z.txt#1"],
        ["a\\nb.txt is not UTF-8"],
    ),
    Hostile("line feed in a title", files("a\nb.md"), ["a\nb.md"]),
    Hostile("escape sequence", files("\x1b[31mred.txt"), ["\x1b[31mred.txt#1"]),
    Hostile(
        "escape sequence and empty",
        files("a.txt", beside=files("\x1b]0;x\x07.txt", text="")),
        ["a.txt#1"],
        ["\\x1b]0;x\\x07.txt has no text"],
    ),
    Hostile("bidi override", files("\u202etxt.exe.txt"), ["\u202etxt.exe.txt#1"]),
    Hostile("markup", files("[/bold].txt", "[red]x.txt"), ["[/bold].txt#1", "[red]x.txt#1"]),
    Hostile("capitals", files("A.TXT"), ["A.TXT#1"]),
    Hostile("255 bytes", files("x" * 251 + ".txt"), ["x" * 251 + ".txt#1"]),
    Hostile("a folder that is called like a file", files("a.txt/b.txt"), ["a.txt/b.txt#1"]),
    Hostile("1,200 folders deep", _deep(1200), ["a.txt#1", "d/" * 1200 + "z.txt#1"]),
    Hostile("a path of 5,000 characters", _deep(25, "d" * 200), ["a.txt#1"], ["cannot be listed (File name too long)"]),
    Hostile("no such corpus, with a line feed", lambda f: f / "a\nb", None, ["a\\nb does not exist"]),
    Hostile("no such corpus, with a NUL", lambda f: f / "a\0b", None, ["a\\x00b does not exist"]),
    Hostile("no such corpus, half a surrogate pair", lambda f: f / "a\ud800b", None, ["a\\ud800b does not exist"]),
    Hostile("no such corpus, 10,000 characters", lambda f: f / ("a" * 10_000), None, ["cannot be read (File name too"]),
    Hostile("below a file", _read(files("a.txt"), "a.txt/b"), None, ["does not exist"]),
)

_SMALL = gzip.compress(b"a " * 500)
SIZES = (
    Hostile(
        "bomb",
        _both(files("a.txt"), raw(b_txt_gz=_bomb(16))),
        ["a.txt#1"],
        ["b.txt.gz has more than 1,048,576 bytes", RAISED],
        {"max_file_bytes": MIB},
    ),
    Hostile(
        "bomb of many members",
        _both(files("a.txt"), raw(b_md_gz=_bomb(1) * 16)),
        ["a.txt#1"],
        ["b.md.gz has more than 2,097,152 bytes", RAISED],
        {"max_file_bytes": 2 * MIB},
    ),
    Hostile(
        "a bomb alone",
        _read(raw(b_txt_gz=_bomb(2)), "b.txt.gz"),
        None,
        ["b.txt.gz has more than", RAISED],
        {"max_file_bytes": MIB},
    ),
    Hostile(
        "a bomb of JSON lines",
        _both(files("a.txt"), raw(b_jsonl_gz=_bomb(2))),
        ["a.txt#1"],
        ["b.jsonl.gz has more than"],
        {"max_file_bytes": MIB},
    ),
    Hostile(
        "many small ones",
        raw(a_txt_gz=_SMALL, b_txt_gz=_SMALL, c_txt_gz=_SMALL),
        None,
        ["more than 2,999 bytes", "max_corpus_bytes (--max-corpus-mib)"],
        {"max_corpus_bytes": 2999},
    ),
    Hostile(
        "a large plain file",
        files("a.txt", beside=raw(b_txt=b"a" * 1025)),
        ["a.txt#1"],
        ["b.txt has more than 1,024 bytes", RAISED],
        {"max_file_bytes": 1024},
    ),
    Hostile(
        "just small enough", raw(b_txt=b"a" * 1024), ["b.txt#1"], (), {"max_file_bytes": 1024, "max_corpus_bytes": 1024}
    ),
    Hostile(
        "a hole of a terabyte",
        files("a.txt", beside=lambda f: os.truncate(_touched(f / "b.txt"), 2**40)),
        ["a.txt#1"],
        ["b.txt has more than 1,073,741,824 bytes", RAISED],
    ),
    Hostile("truncated", files("a.txt", beside=raw(b_txt_gz=_bomb(1)[:-9])), ["a.txt#1"], ["cannot be decompressed"]),
    Hostile(
        "without its end", files("a.txt", beside=raw(b_txt_gz=_bomb(1)[:-8])), ["a.txt#1"], ["cannot be decompres"]
    ),
    Hostile(
        "a wrong checksum",
        files("a.txt", beside=raw(b_txt_gz=_bomb(1)[:-8] + b"\0" * 8)),
        ["a.txt#1"],
        ["cannot be decompressed"],
    ),
    Hostile(
        "damaged in its middle",
        files("a.txt", beside=raw(b_txt_gz=_bomb(1)[:40] + b"\xff" * 40)),
        ["a.txt#1"],
        ["cannot be decompressed"],
    ),
    Hostile(
        "something behind it",
        files("a.txt", beside=raw(b_txt_gz=gzip.compress(b"words") + b"more")),
        ["a.txt#1"],
        ["cannot be decompressed"],
    ),
    Hostile("zeros behind it", raw(b_txt_gz=gzip.compress(b"words") + b"\0" * 512), ["b.txt.gz#1"]),
    Hostile("an empty file", files("a.txt", beside=raw(b_txt_gz=b"")), ["a.txt#1"], ["b.txt.gz has no text"]),
    Hostile(
        "gz in gz by its name",
        files("a.txt", beside=raw(b_txt_gz_gz=gzip.compress(gzip.compress(b"words")))),
        ["a.txt#1"],
    ),
    Hostile(
        "gz in gz by its name, alone",
        _read(raw(b_txt_gz_gz=gzip.compress(b"x")), "b.txt.gz.gz"),
        None,
        ["b.txt.gz.gz is not of a kind that can be read"],
    ),
    Hostile(
        "gz in gz",
        files("a.txt", beside=raw(b_txt_gz=gzip.compress(gzip.compress(b"words")))),
        ["a.txt#1"],
        ["b.txt.gz is not UTF-8"],
    ),
)


def _touched(file: Path) -> Path:
    file.touch()
    return file


_ONE_LEFT = "1 link is not followed"
LINKS = (
    Hostile(
        "a file outside",
        _both(files("a.txt"), _outside, _link("l.txt", "../outside/secret.txt")),
        ["a.txt#1"],
        [f"{_ONE_LEFT}, such as l.txt", "follow_links (--follow-links)"],
    ),
    Hostile(
        "a file outside, followed",
        _both(files("a.txt"), _outside, _link("l.txt", "../outside/secret.txt")),
        ["a.txt#1", "l.txt#1"],
        (),
        {"follow_links": True},
    ),
    Hostile(
        "an absolute link outside",
        _both(files("a.txt"), _outside, lambda f: (f / "l.txt").symlink_to(f.parent / "outside" / "secret.txt")),
        ["a.txt#1"],
        [_ONE_LEFT],
    ),
    Hostile(
        "by way of two links",
        _both(files("a.txt"), _outside, _link("k", "../outside/secret.txt"), _link("l.txt", "k")),
        ["a.txt#1"],
        [_ONE_LEFT],
    ),
    Hostile(
        "by way of a folder's link",
        _both(files("a.txt"), _outside, _link(".k", "../outside"), _link("l.txt", ".k/secret.txt")),
        ["a.txt#1"],
        [_ONE_LEFT],
    ),
    Hostile("a folder outside", _both(files("a.txt"), _outside, _link("l", "../outside")), ["a.txt#1"], [_ONE_LEFT]),
    Hostile(
        "a folder outside, followed",
        _both(files("a.txt"), _outside, _link("l", "../outside")),
        ["a.txt#1", "l/secret.txt#1", "l/sub/more.txt#1"],
        (),
        {"follow_links": True},
    ),
    Hostile(
        "a folder that begins alike",
        _both(
            files("a.txt"),
            lambda f: files("x.txt")(f.with_name(f.name + "2")),
            lambda f: _link("l.txt", f"../{f.name}2/x.txt")(f),
        ),
        ["a.txt#1"],
        [_ONE_LEFT],
    ),
    Hostile(
        "several",
        _both(files("a.txt"), _outside, *(_link(f"l{n}", "../outside") for n in range(3))),
        ["a.txt#1"],
        ["3 links are not followed, such as l0"],
    ),
    Hostile("nothing else", _both(_outside, _link("l", "../outside")), None, ["no files that can be read", _ONE_LEFT]),
    Hostile(
        "a circle of two",
        _both(files("a.txt"), _link("l.txt", "k.txt"), _link("k.txt", "l.txt")),
        ["a.txt#1"],
        ["l.txt cannot be read (Too many levels of symbolic links)", "k.txt cannot be read"],
    ),
    Hostile(
        "a circle of two, followed",
        _both(files("a.txt"), _link("l.txt", "k.txt"), _link("k.txt", "l.txt")),
        ["a.txt#1"],
        ["l.txt cannot be read (Too many levels", "k.txt cannot"],
        {"follow_links": True},
    ),
    Hostile("itself", _both(files("a.txt"), _link("l.txt", "l.txt")), ["a.txt#1"], ["l.txt cannot be read (Too many"]),
    Hostile("the folder itself", _both(files("a.txt"), _link("l", ".")), ["a.txt#1"], [_ONE_LEFT]),
    Hostile(
        "the folder itself, followed", _both(files("a.txt"), _link("l", ".")), ["a.txt#1"], (), {"follow_links": True}
    ),
    Hostile("its parent", _both(files("s/a.txt"), _link("s/l", "..")), ["s/a.txt#1"], [_ONE_LEFT]),
    Hostile(
        "its parent, followed", _both(files("s/a.txt"), _link("s/l", "..")), ["s/a.txt#1"], (), {"follow_links": True}
    ),
    Hostile(
        "above it, followed",
        _both(files("a.txt"), _outside, _link("l", "..")),
        ["a.txt#1", "l/outside/secret.txt#1", "l/outside/sub/more.txt#1"],
        (),
        {"follow_links": True},
    ),
    Hostile(
        "two folders that hold each other, followed",
        _both(files("a/x.txt", "b/y.txt"), _link("a/l", "../b"), _link("b/l", "../a")),
        ["a/x.txt#1", "b/y.txt#1"],
        (),
        {"follow_links": True},
    ),
    Hostile(
        "a folder of links that double at each level, followed",
        _both(
            files("d0/a.txt"),
            *(
                _both(files(f"d{n}/no.pdf"), _link(f"d{n}/x", f"../d{n - 1}"), _link(f"d{n}/y", f"../d{n - 1}"))
                for n in range(1, 40)
            ),
        ),
        ["d0/a.txt#1"],
        (),
        {"follow_links": True},
    ),
    Hostile("a file inside", _both(files("s/a.txt"), _link("l.txt", "s/a.txt")), ["l.txt#1", "s/a.txt#1"]),
    Hostile(
        "a file inside, as Kubernetes mounts it",
        _both(files("..2026/a.txt"), _link("..data", "..2026"), _link("a.txt", "..data/a.txt")),
        ["a.txt#1"],
    ),
    Hostile(
        "to nothing",
        _both(files("a.txt"), _link("l.txt", "nowhere")),
        ["a.txt#1"],
        ["l.txt cannot be read (No such file or directory)"],
    ),
    Hostile("hard", _both(files("a.txt"), _hard_link), ["a.txt#1", "b.txt#1"]),
    Hostile("the corpus is a link", _both(files("s/a.txt"), lambda f: _link("l", "s")(f)), ["s/a.txt#1"], [_ONE_LEFT]),
    Hostile(
        "the corpus is read by a link",
        _read(_both(files("s/a.txt", "s/b.txt"), _link("l", "s")), "l"),
        ["a.txt#1", "b.txt#1"],
    ),
    Hostile(
        "the corpus is read by a link, with a link inside",
        _read(_both(files("s/a.txt"), _link("s/b.txt", "a.txt"), _link("l", "s")), "l"),
        ["a.txt#1", "b.txt#1"],
    ),
    Hostile(
        "the corpus is a file that is read by a link",
        _read(_both(_outside, _link("l.txt", "../outside/secret.txt")), "l.txt"),
        ["l.txt#1"],
    ),
    Hostile(
        "questions outside",
        _both(files("a.txt"), _outside, _link("questions.jsonl", "../outside/secret.txt")),
        ["a.txt#1"],
    ),
    Hostile(
        "other files outside", _both(files("a.txt"), _outside, _link("l.pdf", "../outside/secret.txt")), ["a.txt#1"]
    ),
)

SPECIAL = (
    Hostile("a pipe", _both(files("a.txt"), _fifo("p.txt")), ["a.txt#1"], [f"p.txt {_NO_FILE}"]),
    Hostile(
        "a pipe that is called compressed", _both(files("a.txt"), _fifo("p.md.gz")), ["a.txt#1"], ["p.md.gz is no"]
    ),
    Hostile("a pipe of questions", _both(files("a.txt"), _fifo("questions.jsonl")), ["a.txt#1"]),
    Hostile("a pipe alone", _read(_fifo("p.txt"), "p.txt"), None, ["p.txt is no regular file"]),
    Hostile("a link to a pipe", _both(files("a.txt"), _fifo(".p"), _link("p.txt", ".p")), ["a.txt#1"], ["p.txt is no"]),
    Hostile(
        "a link to a pipe, followed",
        _both(files("a.txt"), _fifo(".p"), _link("p.txt", ".p")),
        ["a.txt#1"],
        ["p.txt is no regular file"],
        {"follow_links": True},
    ),
    Hostile("a socket", _both(files("a.txt"), _socket), ["a.txt#1"], [f"s.txt {_NO_FILE}"]),
    Hostile("a socket alone", _read(_socket, "s.txt"), None, ["s.txt is no regular file"]),
    Hostile("a device alone", lambda f: Path("/dev/zero"), None, ["/dev/zero is no regular file"]),
    Hostile("a link to a device", _both(files("a.txt"), _link("z.txt", "/dev/zero")), ["a.txt#1"], ["z.txt is no"]),
    Hostile(
        "a link to a device, followed",
        _both(files("a.txt"), _link("z.txt", "/dev/zero")),
        ["a.txt#1"],
        ["z.txt is no regular file"],
        {"follow_links": True},
    ),
    Hostile(
        "a link to a device alone", _read(_link("z.txt", "/dev/zero"), "z.txt"), None, ["z.txt is no regular file"]
    ),
)

JSON_LINES = (
    Hostile(
        "an id twice in a file",
        lines(_text("one", id="x"), _text("two", id="x"), _text("three")),
        ["x", "x.2", "p.jsonl#3"],
        ["1 passage has the id of another one, such as 'x'", _TWICE],
    ),
    Hostile(
        "an id three times",
        lines(*(_text(str(n), id="x") for n in range(3))),
        ["x", "x.2", "x.3"],
        ["2 passages have the id of another one", _TWICE],
    ),
    Hostile(
        "an id that stands for another's second",
        lines(_text("1", id="x"), _text("2", id="x.2"), _text("3", id="x")),
        ["x", "x.2", "x.3"],
        ["1 passage has"],
    ),
    Hostile(
        "an id of another file",
        raw(a_jsonl=b'{"id": "x", "text": "one"}', b_jsonl=b'{"id": "x", "text": "two"}'),
        ["x", "x.2"],
        ["1 passage has the id of another one"],
    ),
    Hostile(
        "an id of a text file",
        _both(files("a.txt"), lines(_text("other", id="a.txt#1"))),
        ["a.txt#1", "a.txt#1.2"],
        ["1 passage has"],
    ),
    Hostile(
        "the id of a line without one",
        lines(_text("one", id="p.jsonl#2"), _text("two")),
        ["p.jsonl#2", "p.jsonl#2.2"],
        ["1 passage has"],
    ),
    Hostile(
        "a line twice",
        lines(_text("one", id="x"), _text("one", id="x"), _text("two", id="y")),
        ["x", "y"],
        ["1 passage stands more than once, such as 'x': each is read once"],
    ),
    Hostile(
        "a line twice with other titles",
        lines(_text(id="x", title="A"), _text(id="x", title="B")),
        ["x", "x.2"],
        ["1 passage has"],
    ),
    Hostile("a text twice without ids", lines(_text(), _text()), ["p.jsonl#1", "p.jsonl#2"]),
    Hostile("numbers as ids", lines(_text("a", id=7), _text("b", id="8"), _text("c", id=-1)), ["7", "8", "-1"]),
    Hostile("a number and its text as ids", lines(_text("a", id=7), _text("b", id="7")), ["7", "7.2"], ["'7'"]),
    Hostile("an empty id", lines(_text("a", id=""), _text("b", id="")), ["p.jsonl#1", "p.jsonl#2"]),
    Hostile("an id of a million characters", lines(_text(id="x" * 10**6)), ["x" * 10**6]),
    Hostile(
        "an id of a million characters twice",
        lines(_text("a", id="x" * 10**6), _text("b", id="x" * 10**6)),
        ["x" * 10**6, "x" * 10**6 + ".2"],
        ["1 passage has"],
    ),
    Hostile(
        "control characters in ids and titles",
        lines(_text(id="a\nb\x1b[31m\u202e", title="\x07\r")),
        ["a\nb\x1b[31m\u202e"],
    ),
    Hostile("NUL", lines(_text("a\0b", id="a\0b", title="\0")), ["a\0b"]),
    Hostile("a raw NUL", lines('{"text": "a\0"}'), None, ["p.jsonl, line 1 is not JSON: Invalid control character"]),
    Hostile("a float as id", lines(_text(id=1.5)), None, ['line 1: "id" is float, not text']),
    Hostile("NaN as id", lines('{"text": "a", "id": NaN}'), None, ['line 1: "id" is float, not text']),
    Hostile("Infinity as text", lines('{"text": Infinity}'), None, ['line 1 has no text in "text"']),
    Hostile("NaN where nobody looks", lines('{"text": "a", "score": NaN, "more": [-Infinity, 1e999]}'), ["p.jsonl#1"]),
    Hostile("true as id", lines(_text(id=True)), None, ['"id" is bool']),
    Hostile("a list as text", lines({"text": ["a"]}), None, ['no text in "text"']),
    Hostile("an object as title", lines(_text(title={})), None, ['"title" is dict, not text']),
    Hostile(
        "a number of 10,000 digits", lines('{"text": "a", "id": ' + "1" * 10_000 + "}"), None, ["line 1 is not JSON"]
    ),
    Hostile(
        "a key twice", lines('{"text": "a", "text": "b"}'), None, ['line 1 is not JSON: the key "text" stands twice']
    ),
    Hostile(
        "a key twice, further in", lines('{"text": "a", "m": [{"k\\n": 1, "k\\n": 2}]}'), None, ['"k\\n" stands twice']
    ),
    Hostile("half a surrogate pair", lines(_text("a\ud800")), None, ["line 1 is not JSON", "surrogates not allowed"]),
    Hostile("half a surrogate pair as id", lines(_text(id="\udfff")), None, ["line 1 is not JSON"]),
    Hostile("half a surrogate pair, by the way", lines(_text(more=["\udc00"])), None, ["line 1 is not JSON"]),
    Hostile("a surrogate pair", lines('{"text": "\\ud83d\\ude00", "id": "\\uD83D\\uDE00"}'), ["\U0001f600"]),
    Hostile(
        "nested 100,000 deep",
        lines('{"text": "a", "m": ' + "[" * 100_000 + "]" * 100_000 + "}"),
        None,
        ["line 1 is not JSON", "recursion"],
    ),
    Hostile("a BOM", raw(p_jsonl=b'\xef\xbb\xbf{"text": "a"}'), ["p.jsonl#1"]),
    Hostile(
        "a BOM in the middle", raw(p_jsonl=b'{"text": "a"}\n\xef\xbb\xbf{"text": "b"}'), None, ["line 2 is not JSON"]
    ),
    Hostile("CRLF", raw(p_jsonl=b'{"text": "a"}\r\n\r\n{"text": "b"}\r\n'), ["p.jsonl#1", "p.jsonl#3"]),
    Hostile("CR", raw(p_jsonl=b'{"text": "a"}\r{"text": "b"}'), ["p.jsonl#1", "p.jsonl#2"]),
    Hostile(
        "UTF-16",
        files("a.txt", beside=raw(p_jsonl='{"text": "a"}'.encode("utf-16"))),
        ["a.txt#1"],
        ["p.jsonl is not UTF-8 (byte 0)"],
    ),
    Hostile("other ends of lines", lines(_text("a\u2028b\x85c\x0cd", id="x\u2028")), ["x\u2028"]),
    Hostile(
        "nothing but ends of lines", _both(files("a.txt"), raw(p_jsonl=b"\n \n\t\n")), ["a.txt#1"], ["has no text"]
    ),
    Hostile(
        "a name with a line feed",
        files("a\nb.jsonl", text="{"),
        None,
        ["a\\nb.jsonl, line 1 is not JSON"],
    ),
    Hostile("an id that quotes a wrong line", lines("\x1b[31m{"), None, ["line 1 is not JSON"]),
)

ALL = {"names": NAMES, "sizes": SIZES, "links": LINKS, "special": SPECIAL, "json": JSON_LINES}
