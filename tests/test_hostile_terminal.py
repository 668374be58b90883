"""What users, corpora and models give is shown as text: it is no markup, and it does not steer the terminal."""

from __future__ import annotations

import ast
import io
import json
import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import finch_rag
from finch_rag import Answer, Finch, FinchError, InputError, MissingExtraError, errors
from finch_rag.answer import Citation, Quote, Source, Statement
from finch_rag.bench import load, many, soak, speed, tables
from finch_rag.cli import tables as cli_tables
from finch_rag.cli.serve import _Lines
from finch_rag.errors import escaped
from finch_rag.terminal import output, progress

from .command_line import one_error, run
from .small import chat_tokenizer, small_finch, small_model

HOSTILE = {
    "closing tag": "[/bold]",
    "tags": "[red]x[/red]",
    "unknown tag": "[/no-such-tag][x=",
    "link": "[link=https://example.org]y[/link]",
    "emoji": ":smile:",
    "backslash": "\\[bold]\\",
    "colour": "\x1b[31mred",
    "title of the window": "\x1b]0;mine\x07",
    "C1": "\x9b2J",
    "clear": "\x1b[2J\x1b[H",
    "carriage return": "a\rb",
    "backspace": "a\b\bb",
    "line feed": "a\nb",
    "tabs": "a\tb\vc\fd",
    "override": "\u202eevil",
    "isolate": "\u2066evil\u2069",
    "mark": "\u200fevil\u061c",
    "separators": "a\u2028b\u2029c\x85d",
    "NUL": "a\0b",
    "half a surrogate pair": "\ud800",
    "byte that is not UTF-8": "\udcff",
    "invisible tags": "a\U000e0041b",
    "byte order mark": "\ufeffa",
}
every = pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)


def check_plain(text: str) -> None:
    assert [c for c in text if not c.isprintable() and c != "\n"] == []


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What goes to stdout and stderr by rich, wide enough for anything."""
    written = io.StringIO()
    plain = Console(file=written, highlight=False, width=2000)
    for module in (output, cli_tables, tables, speed, many, load, soak):
        for name in ("out", "err"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, plain)
    return written


@every
def test_what_is_escaped_can_be_printed_and_stays_so(text: str) -> None:
    once = escaped(text)
    check_plain(once)
    assert "\n" not in once
    assert escaped(once) == once  # an error is made of another one
    assert (once == text) is text.isprintable()
    once.encode()


@pytest.mark.parametrize(
    "text", ["Größe", "漢字", "שלום", "\u0645\u0631", "a\u00a0b", "\u06cc\u200c\u062e", "👩\u200d🚀", "C:\\new\\x1b"]
)
def test_what_people_write_is_not_escaped(text: str) -> None:
    assert escaped(text) == text


@every
def test_an_error_is_one_line(text: str) -> None:
    for kind in (FinchError, InputError, MissingExtraError, errors.SettingsError):
        error = kind(f"the file {text} is wrong")
        assert str(error) == f"the file {escaped(text)} is wrong"
        assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_an_error_without_a_message_stays_one() -> None:
    assert FinchError().args == ()
    assert FinchError("a", 3).args == ("a", 3)


@every
def test_lines_and_notes(text: str, shown: io.StringIO, capsys: pytest.CaptureFixture[str]) -> None:
    output.say(text)
    output.say(f"a {text} b", style="bold")
    lines = shown.getvalue().split("\n")
    assert lines == [escaped(text), f"a {escaped(text)} b", ""]
    output.show_error(InputError(text))
    output.show_error(OSError(2, text, text))
    output.note(text)
    assert len(shown.getvalue().rstrip("\n").split("\n")) == 5
    output.say_delta(text)
    output.say_lines(text)
    check_plain((shown.getvalue() + capsys.readouterr().out).replace("\t", ""))


@every
def test_what_is_logged_is_shown_as_a_note(text: str, shown: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = logging.getLogger("finch_rag")
    monkeypatch.setattr(logger, "handlers", list(logger.handlers))
    monkeypatch.setattr(logger, "propagate", False)  # pytest's own report cannot hold half a surrogate pair
    output.show_log()
    logging.getLogger("finch_rag.corpus").warning("the index %s is damaged", text)
    (line,) = shown.getvalue().splitlines()
    check_plain(line)
    assert line.startswith("Note: the index ")


@every
def test_a_line_of_the_servers_log(text: str) -> None:
    record = logging.LogRecord("finch_rag.serve", logging.INFO, "x", 1, "asked: %s", ([text],), None)
    line = _Lines("%(message)s").format(record)
    check_plain(line)
    assert "\n" not in line


@every
def test_progress_shows_names_as_they_are(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    terminal = Console(file=written, force_terminal=True, color_system=None, width=200, legacy_windows=False)
    monkeypatch.setattr(progress, "err", terminal)
    with progress.ProgressBars() as bars, bars.busy(f"loading {text}"):
        bars(text, 1, 2)
    assert f"loading {escaped(text)} " in written.getvalue()
    assert f" {escaped(text)} " in written.getvalue()


@pytest.fixture(scope="module")
def answered() -> Answer:
    return small_finch(max_new_tokens=3).ask("Who?", ["The harbour was built in 1874."])


@every
def test_tables_of_an_answer(text: str, shown: io.StringIO, answered: Answer) -> None:
    quote = Quote(f"The {text}.", 0, 1, 0.5)
    citation = Citation(text, 0, text, 0.5, 3, 4, (quote,))
    statement = Statement(f"So {text}.", 0, 1, (Source(0, 0.5, (quote,)),))
    report = replace(answered.report, model=text)
    answer = replace(answered, text=f"A {text}", citations=[citation], statements=(statement,), report=report)
    cli_tables.show_answer(answer, streamed=False, quotes=True)
    written = shown.getvalue()
    check_plain(written.replace("\t", "").expandtabs())
    rows = [line for line in written.split("\n") if "50.0%" in line]
    assert len(rows) == 1
    assert rows[0].count(escaped(text)) == 2
    assert f"by {escaped(text)}" in written
    cell = output.cell(text)
    assert (cell.plain, cell.spans) == (escaped(text), [])


def _summaries(text: str) -> Iterator[tuple[Any, dict[str, Any]]]:
    yield (
        speed._print,
        {
            "model": text,
            "device": text,
            "budget": 1,
            "repeats": 1,
            "cases": [{"method": text, "tokens": 1, "skipped": text}],
            "ratios": {text: 1.0},
        },
    )
    ways = {text: {many._READ: 1.0, many._WRITE: 1.0, "seconds": 1.0}}
    yield (
        many._print,
        {
            **{
                "model": text,
                "device": text,
                "questions": 1,
                "tokens": 1,
                "shared": True,
                "throughput": 1.0,
                "ways": ways,
            }
        },
    )
    row = {"a_second": 1.0, "different": 0, "requests": 1, "peak_mib": 1, "new_tokens": 1.0}
    row |= dict.fromkeys(("first_p50", "first_p99", "last_p50", "last_p99"), 1.0)
    clients = {"1": row}
    yield load._print, {"model": text, "device": text, "passages": text, "clients": clients}
    other = {"model": text, "url": text, "clients": clients}
    yield load._print_against, {"against": other, "clients": clients}
    yield (
        soak._print,
        {
            **{
                "model": text,
                "device": text,
                "minutes": 1,
                "clients": 1,
                "running": 1,
                "requests": 1,
                "problems": [text],
            },
            **{"outcomes": {}, "kinds": {}, "mib_before": {text: 1}, "mib_after": {text: 1}},
        },
    )
    settings = {"data": text, "retriever": "bm25", "top_k": 1, "order": text, "model": text}
    skipped = {"n": 0, "skipped": text}
    yield tables.show_quality, {"settings": settings, "cases": 0, "unanswerable": 0, "methods": {text: skipped}}


@every
def test_tables_of_benchmarks(text: str, shown: io.StringIO) -> None:
    for show, summary in _summaries(text):
        shown.truncate(0)
        shown.seek(0)
        show(summary)
        check_plain(shown.getvalue())
        assert escaped(text) in shown.getvalue(), show


@pytest.mark.parametrize("name", ["closing tag", "colour", "line feed"])
@pytest.mark.usefixtures("hashed")
def test_a_model_of_any_name_is_loaded_on_a_terminal(
    name: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / f"m{HOSTILE[name]}"  # a slash begins another folder, and the path has the tag all the same
    small_model(max_position_embeddings=2048).save_pretrained(folder)
    chat_tokenizer().save_pretrained(folder)
    written = io.StringIO()
    terminal = Console(file=written, force_terminal=True, color_system=None, width=2000, legacy_windows=False)
    monkeypatch.setattr(progress, "err", terminal)
    result = run("rank", "Who built it?", "--corpus", corpus, "--model", folder, "--no-store")
    assert result.exit_code == 0, result.stderr
    check_plain(result.output)
    assert f"loading {escaped(str(folder))}" in written.getvalue()


@pytest.mark.parametrize("name", ["closing tag", "colour", "line feed"])
@pytest.mark.parametrize(
    "command",
    [
        ("ask", "Who?", "--corpus", "TEXT"),
        ("index", "TEXT", "--store", "TEXT"),
        ("store", "info", "TEXT"),
        ("store", "clear", "TEXT"),
        ("heads", "no/such-model", "--examples", "TEXT"),
        ("check", "TEXT"),
        ("bench", "quality", "TEXT"),
        ("bench", "speed", "--tokens", "TEXT"),
        ("bench", "speed", "--methods", "TEXT"),
        ("bench", "ruler", "out", "--tasks", "TEXT"),
        ("bench", "load", "--shape", "TEXT"),
        ("serve", "--api-key-file", "TEXT"),
    ],
    ids=" ".join,
)
def test_what_is_wrong_with_an_argument_is_one_plain_line(command: tuple[str, ...], name: str, tmp_path: Path) -> None:
    before = Path.cwd()
    os.chdir(tmp_path)
    try:
        line = one_error(run(*(part.replace("TEXT", f"no {HOSTILE[name]}") for part in command)))
    finally:
        os.chdir(before)
    check_plain(line)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_encoding_of_the_terminal_will_do(encoding: str) -> None:
    code = (
        "from finch_rag.terminal.output import say, say_delta, say_lines, note, show_error\n"
        "for tell in (say, say_delta, say_lines, note): tell('Gr\\u00f6\\u00dfe \\u6f22 \\ud800 \\x1b[31m')\n"
        "show_error(ValueError('\\u6f22'))\n"
    )
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr
    assert b"\x1b" not in done.stdout
    assert done.stdout.count("Größe".encode(encoding, "backslashreplace")) == 3


def test_json_has_the_text_itself_as_ascii(capsys: pytest.CaptureFixture[str]) -> None:
    output.say_json({"all": list(HOSTILE.values())})
    line = capsys.readouterr().out
    assert line.isascii()
    check_plain(line)
    assert json.loads(line) == {"all": list(HOSTILE.values())}


def test_only_the_terminal_room_makes_text_for_it() -> None:
    """Markup is read in strings that are printed, and in titles; a table's cells are `cell`s where they are names."""
    wrong = []
    package = Path(finch_rag.__file__).parent
    for file in package.rglob("*.py"):
        if file.parent.name == "terminal":
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            if called.endswith((".print", "Console", "from_markup")) or called == "Text":
                given = [ast.unparse(argument) for argument in node.args]
                if not all(argument == "table" or "_table(" in argument for argument in given) or called == "Text":
                    wrong.append(f"{file.name}:{node.lineno} {ast.unparse(node)}")
            if called == "Table":
                titles = [ast.unparse(each.value) for each in node.keywords if each.arg in ("title", "caption")]
                wrong += [f"{file.name}:{node.lineno} {title}" for title in titles if not title.startswith("cell(")]
    assert wrong == []


def test_the_engine_shows_nothing_by_itself(finch: Finch, capfd: pytest.CaptureFixture[str]) -> None:
    finch.ask("[/bold] \x1b[31m", ["[red] \x1b[31m text"], max_new_tokens=2)
    assert "\x1b" not in "".join(capfd.readouterr())
