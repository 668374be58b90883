"""Corpora that somebody made to hurt, or that went wrong: they are read, or one clear line says why not."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from finch_rag import CorpusError, Finch, InputError, Passage, StoreError
from finch_rag.bench.cases import DataSet, QualityCase, read_cases, write_cases
from finch_rag.bench.kept import Attended, read_attended, write_attended
from finch_rag.corpus import Question, contents, load_questions, read_corpus
from finch_rag.corpus.splitting import markdown_sections
from finch_rag.jsonl import json_objects

from .command_line import one_error, only_json, run
from .hostile import ALL, MIB, Hostile, _bomb, files

CASES = [pytest.param(case, id=f"{group}: {case.name}") for group, cases in ALL.items() for case in cases]
posix = pytest.mark.skipif(os.name != "posix", reason="pipes, sockets and links as POSIX has them")


class HangError(BaseException):
    """No Exception: nothing may catch it."""


@contextmanager
def ends_within(seconds: float) -> Iterator[None]:
    """Fails a test that waits for ever, in place of waiting with it."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise HangError(f"it goes on after {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    made = tmp_path / "corpus"
    made.mkdir()
    yield made
    subprocess.run(["rm", "-rf", made], check=True)  # pytest cannot remove what is so deep


def check_line(text: str) -> None:
    """One line that a terminal can be shown, and a person can read."""
    assert text.isprintable()
    assert len(text) < 1200


@posix
@pytest.mark.parametrize("case", CASES)
def test_a_hostile_corpus_is_read_or_refused(case: Hostile, folder: Path) -> None:
    corpus = case.make(folder) or folder
    with ends_within(20):
        if case.ids is None:
            with pytest.raises(CorpusError) as error:
                read_corpus(corpus, **case.options)
            check_line(str(error.value))
            assert [part for part in case.said if part not in str(error.value)] == []
            return
        read = read_corpus(corpus, **case.options)
    assert [passage.id for passage in read.passages] == list(case.ids)
    for passage in read.passages:
        json.dumps([passage.id, passage.title, passage.text], ensure_ascii=False).encode()  # all of it is text
    for warning in read.warnings:
        check_line(warning)
    told = " | ".join(read.warnings)
    assert [part for part in case.said if part not in told] == []
    assert bool(told) is bool(case.said)


@contextmanager
def without_privileges(folder: Path) -> Iterator[None]:
    """Root reads every folder; somebody else does not."""
    if os.geteuid():
        yield
        return
    for above in folder.parents[: len(folder.parents) - 1]:
        above.chmod(above.stat().st_mode | 0o011)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@posix
@pytest.mark.parametrize("closed", ["sub", "sub/deeper"])
def test_a_folder_that_cannot_be_listed_is_said(folder: Path, closed: str) -> None:
    files("a.txt", "sub/deeper/b.txt")(folder)
    folder.chmod(0o755)
    (folder / closed).chmod(0)
    try:
        with without_privileges(folder):
            read = read_corpus(folder)
            (folder / "a.txt").exists()
    finally:
        (folder / closed).chmod(0o755)
    assert [passage.id for passage in read.passages] == ["a.txt#1"]
    assert read.warnings == [f"{closed} cannot be listed (Permission denied), so it is left out"]


@posix
def test_a_corpus_that_cannot_be_listed_is_refused(folder: Path) -> None:
    files("a.txt")(folder)
    folder.chmod(0)
    try:
        with without_privileges(folder), pytest.raises(CorpusError, match="Permission denied"):
            read_corpus(folder)
    finally:
        folder.chmod(0o755)


def _vanishes(file: Path) -> None:
    file.unlink()


def _becomes_a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def _becomes_a_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def _grows(file: Path) -> None:
    os.truncate(file, 2**40)


@posix
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_vanishes, "cannot be read (No such file or directory)"),
        (_becomes_a_folder, "is no regular file"),
        (_becomes_a_pipe, "is no regular file"),
        (_grows, "has more than 1,073,741,824 bytes"),
    ],
)
@pytest.mark.parametrize("when", ["listed", "looked at"])
def test_a_file_that_changes_under_the_reader_is_left_out(
    folder: Path, monkeypatch: pytest.MonkeyPatch, change: Any, reason: str, when: str
) -> None:
    files("a.txt", "b.txt", "c.txt")(folder)
    text, opening = contents.Contents.text, os.open

    def changed_before_text(self: contents.Contents, file: Path) -> str:
        if file.name == "b.txt":
            change(file)
        return text(self, file)

    def changed_before_open(file: Any, *args: Any) -> int:
        if str(file).endswith("b.txt"):
            change(Path(file))
        return opening(file, *args)

    if when == "looked at" and change is _becomes_a_folder:
        reason = "cannot be read (Is a directory)"
    if when == "listed":
        monkeypatch.setattr(contents.Contents, "text", changed_before_text)
    else:
        monkeypatch.setattr(os, "open", changed_before_open)
    with ends_within(20):
        read = read_corpus(folder)
    assert [passage.id for passage in read.passages] == ["a.txt#1", "c.txt#1"]
    assert len(read.warnings) == 1
    assert read.warnings[0].startswith(f"b.txt {reason}")


def _peak(folder: Path, **options: Any) -> float:
    """MiB that reading a corpus takes at the most."""
    tracemalloc.start()
    try:
        read_corpus(folder, **options)
        return tracemalloc.get_traced_memory()[1] / MIB
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["b.txt", "b.txt.gz"])
def test_a_bomb_takes_no_more_memory_than_its_limit(folder: Path, name: str) -> None:
    files("a.txt")(folder)
    (folder / name).write_bytes(_bomb(64) if name.endswith("gz") else b"a " * (32 * MIB))
    assert _peak(folder, max_file_bytes=MIB) < 8  # pieces of one MiB


@pytest.mark.parametrize("option", ["max_file_bytes", "max_corpus_bytes"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "many", None])
def test_limits_that_cannot_be_are_refused(folder: Path, option: str, value: Any) -> None:
    files("a.txt")(folder)
    with pytest.raises(InputError, match=f"{option} is .*: (the least is 1 byte|pass a whole number)"):
        read_corpus(folder, **{option: value})


def test_follow_links_is_true_or_false(folder: Path) -> None:
    files("a.txt")(folder)
    with pytest.raises(InputError, match="follow_links is 'no': pass True or False"):
        read_corpus(folder, follow_links="no")  # type: ignore[arg-type]


def test_an_unknown_option_is_refused(folder: Path) -> None:
    files("a.txt")(folder)
    with pytest.raises(InputError, match="unknown option max_bytes: use follow_links, max_file_bytes"):
        read_corpus(folder, max_bytes=1)  # type: ignore[call-arg]


@pytest.mark.parametrize("shape", ["one text", "one key"])
def test_a_line_of_100_mb_is_read(folder: Path, shape: str) -> None:
    long = {
        "one text": lambda: json.dumps({"text": "x" * 10**8}),
        "one key": lambda: json.dumps({"text": "a", "k" * 10**8: 1}),
    }[shape]
    (folder / "p.jsonl").write_text(long() + "\n" + json.dumps({"text": "b"}))
    started = time.process_time()
    assert [passage.id for passage in read_corpus(folder).passages] == ["p.jsonl#1", "p.jsonl#2"]
    assert time.process_time() - started < 10


def test_lines_are_not_held_all_at_once() -> None:
    text = "\n".join(['{"text": "' + "x" * 100 + '"}'] * 100_000)
    tracemalloc.start()
    try:
        count = sum(1 for _ in json_objects("p.jsonl", text, CorpusError))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 100_000
    assert peak < MIB


def test_a_million_keys_of_which_the_last_stands_twice_take_linear_time(folder: Path) -> None:
    keys = ",".join(f'"k{n}":1' for n in [*range(300_000), 299_999])
    (folder / "p.jsonl").write_text(f'{{"text":"a",{keys}}}')
    started = time.process_time()
    with pytest.raises(CorpusError, match='the key "k299999" stands twice'):
        read_corpus(folder)
    assert time.process_time() - started < 5


def test_100_000_passages_of_one_id_take_linear_time(folder: Path) -> None:
    (folder / "p.jsonl").write_text("\n".join(f'{{"id": "x", "text": "{n}"}}' for n in range(100_000)))
    started = time.process_time()
    read = read_corpus(folder)
    assert time.process_time() - started < 10
    assert len({passage.id for passage in read.passages}) == 100_000
    assert read.shared_ids == {"x"}
    assert read.warnings[0].startswith("99,999 passages have the id of another one")


def test_a_heading_of_a_million_brackets_takes_linear_time() -> None:
    started = time.process_time()
    (section,) = markdown_sections("# " + "[" * 2_000_000 + "\ntext")
    assert section.text == "text"
    assert time.process_time() - started < 2


def test_a_link_in_a_usual_heading_is_its_words() -> None:
    (section,) = markdown_sections("# " + "[a](b) " * 1000 + "\ntext")
    assert section.heading == " ".join(["a"] * 1000)


# Questions, and what benchmarks store


@posix
@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda file: os.mkfifo(file), "is no regular file"),
        (lambda file: file.symlink_to("/dev/zero"), "is no regular file"),
        (lambda file: file.symlink_to(file), "do not exist"),
        (lambda file: file.mkdir(), "is no regular file"),
        (lambda file: file.write_bytes(_bomb(2)), "has more than 1,048,576 bytes"),
        (lambda file: file.write_bytes(gzip.compress(b"{}")[:-4]), "cannot be decompressed"),
        (lambda file: file.write_bytes(gzip.compress(b"\xff")), "is not UTF-8"),
        (lambda file: file.write_bytes(gzip.compress(b'{"question": "\x1b"}')), "line 1 is not JSON"),
        (lambda file: file.write_bytes(gzip.compress(b'{"question": "a", "question": "b"}')), "stands twice"),
    ],
)
def test_hostile_questions_are_refused(tmp_path: Path, make: Any, said: str) -> None:
    file = tmp_path / "questions\n\x1b.jsonl.gz"
    make(file)
    with ends_within(20), pytest.raises(CorpusError) as error:
        load_questions(file, max_file_bytes=MIB)
    check_line(str(error.value))
    assert said in str(error.value)


def data_set(folder: Path, **passages: str) -> Path:
    question = {"question": "Who?", "answers": ["x"], "gold_id": "p"}
    (folder / "questions.jsonl").write_text(json.dumps(question))
    for name, text in passages.items():
        (folder / f"{name}.jsonl").write_text(text)
    return folder


def test_a_gold_passage_must_be_one(folder: Path) -> None:
    data_set(folder, a='{"id": "p", "text": "x"}\n{"id": "p", "text": "y"}')
    with pytest.raises(CorpusError, match=r"the gold passage 'p' of question questions\.jsonl#1 is one of several"):
        DataSet.read(folder)


def test_what_is_left_out_of_a_data_set_is_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data_set(folder, a='{"id": "p", "text": "x"}\n{"id": "q", "text": "y"}\n{"id": "q", "text": "z"}')
    (folder / "l\x1b.txt").symlink_to("/etc/hostname")
    assert len(DataSet.read(folder).passages) == 3
    shown = capsys.readouterr().err
    assert "Note: 1 link is not followed, such as l\\x1b.txt" in shown
    assert "Note: 1 passage has the id of another one, such as 'q'" in shown
    assert len(DataSet.read(folder, follow_links=True).passages) == 4
    assert "not followed" not in capsys.readouterr().err
    with pytest.raises(CorpusError, match="max_file_bytes"):
        DataSet.read(folder, max_file_bytes=1)


CASE = QualityCase(Question("q", "Who?", ("x",), ("a",)), [Passage("t", "a"), Passage("u", "b")], [1, 0])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda record: record.pop("ranks"), "KeyError('ranks')"),
        (lambda record: record.update(ranks=[0]), "1 ranks of 2 passages"),
        (lambda record: record.update(ranks=[0, 0]), "2 ranks of 2 passages"),
        (lambda record: record.update(ranks=["a", 1]), "TypeError"),
        (lambda record: record.update(ranks=None), "TypeError"),
        (lambda record: record.update(answers=3), "TypeError"),
        (lambda record: record.update(passages=[3, 4]), "TypeError"),
        (lambda record: record.update(passages={"a": 1}), "TypeError"),
    ],
)
def test_a_case_that_a_benchmark_did_not_store_is_refused(tmp_path: Path, change: Any, said: str) -> None:
    file = tmp_path / "cases.jsonl.gz"
    write_cases([CASE], file)
    assert list(read_cases(file)) == [CASE]
    record = json.loads(gzip.decompress(file.read_bytes()))
    change(record)
    file.write_bytes(gzip.compress(json.dumps(record).encode()))
    with pytest.raises(InputError) as error:
        list(read_cases(file))
    check_line(str(error.value))
    assert "cases.jsonl.gz, line 1 is not what a benchmark stores" in str(error.value)
    assert said in str(error.value)


DAMAGES = [
    lambda content: content[:-9],
    lambda content: content[:12] + b"\xff" * 40,
    lambda content: b"no",
    lambda content: gzip.compress(b"\xff"),
    lambda content: gzip.compress(b"{"),
    lambda content: gzip.compress(b"[1]"),
]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", ["cases", "attention"])
def test_a_damaged_file_of_a_benchmark_is_one_line(tmp_path: Path, damage: Any, kind: str) -> None:
    file = tmp_path / "stored.jsonl.gz"
    if kind == "cases":
        write_cases([CASE], file)
    else:
        write_attended([Attended("q", 1, [True, False], [1, 0], [3, 4], [0.5, 0.5])], file)
    read: Any = read_cases if kind == "cases" else read_attended
    assert len(list(read(file))) == 1
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(InputError) as error:
        list(read(file))
    check_line(str(error.value))


@pytest.mark.parametrize("wrong", [{"ranks": [0]}, {"attention": ["a", "b"]}, {"lengths": 3}, {"is_gold": [None, 1]}])
def test_attention_that_was_not_measured_is_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    file = tmp_path / "attention.jsonl.gz"
    right = {"question_id": "q", "gold": 1, "is_gold": [True, False], "ranks": [1, 0], "lengths": [3, 4]}
    file.write_bytes(gzip.compress(json.dumps({**right, "attention": [0.5, 0.5], **wrong}).encode()))
    with pytest.raises(InputError, match="does not hold measured attention"):
        read_attended(file)


# Stores


@pytest.mark.parametrize("on_disk", [False, True])
def test_ids_with_control_characters_are_kept_as_they_are(finch: Finch, tmp_path: Path, on_disk: bool) -> None:
    ids = ["a\nb", "\x1b[31m", "\0", "\u202e", "[/bold]", "x" * 10_000]
    with finch.open_store(tmp_path / "store" if on_disk else None, heads=[(0, 1)]) as store:
        store.add([Passage(f"The harbour has number {n}.", own) for n, own in enumerate(ids)])
        assert [passage.id for passage in store.passages()] == ids
        store.remove(ids[:3])
        assert [passage.id for passage in store.passages()] == ids[3:]


@pytest.mark.parametrize(
    ("passage", "error", "said"),
    [
        (Passage("text", "\ud800"), InputError, "the id of passage 0 holds half a surrogate pair"),
        (Passage("text", "a", metadata={"m": "\ud800"}), StoreError, "the metadata of 'a' cannot be stored"),
        (Passage("text", "a", metadata={"\udfff": 1}), StoreError, "the metadata of 'a' cannot be stored"),
    ],
)
def test_what_no_store_can_keep_is_one_line(finch: Finch, passage: Passage, error: Any, said: str) -> None:
    store = finch.open_store(heads=[(0, 1)])
    with pytest.raises(error) as raised:
        store.add([passage])
    assert said in str(raised.value)
    check_line(str(raised.value))


def test_an_id_that_is_a_number_is_no_raw_error(finch: Finch) -> None:
    store = finch.open_store(heads=[(0, 1)])
    for _ in range(2):
        store.add([Passage("The harbour.", 7)])  # type: ignore[arg-type]
    assert [passage.id for passage in store.passages()] == ["7"]


# The command line

NASTY = "a\n\x1b[31m\u202e[/bold].txt"


@pytest.fixture
def nasty(folder: Path) -> Path:
    """A corpus with names and ids that would steer a terminal."""
    files(NASTY, text="The harbour was built in 1874.")(folder)
    record = {
        "id": "\x1b[2J\n[red]x[/red]",
        "title": "\x07[/bold]\u2028",
        "text": "The museum [/bold] \x1b[31m opened.",
    }
    (folder / "p.jsonl").write_text(json.dumps(record))
    (folder / "\x1b]0;bad\x07.txt").write_bytes(b"\xff")
    (folder / "l\r.txt").symlink_to("/etc/hostname")
    return folder


def check_terminal(text: str) -> None:
    assert [c for c in text if not c.isprintable() and c not in "\n"] == []


@pytest.mark.usefixtures("hashed")
@pytest.mark.parametrize("command", ["ask", "rank"])
def test_nothing_of_a_corpus_steers_the_terminal(nasty: Path, model_folder: str, command: str) -> None:
    args = (command, "Who built [/bold] \x1b[31m?", "--corpus", nasty, "--model", model_folder)
    shown = run(*args, *(["--quotes"] if command == "ask" else []))
    assert shown.exit_code == 0
    check_terminal(shown.output)
    assert "a\\n\\x1b[31m\\u202e[/bold].txt#1" in shown.stdout
    assert "\\x1b[2J\\n[red]x[/red]" in shown.stdout
    assert "\\x1b]0;bad\\x07.txt is not UTF-8" in shown.stderr
    assert "such as l\\r.txt" in shown.stderr
    read = only_json(run(*args, "--json"))
    assert {cited["passage_id"] for cited in read["citations"]} == {f"{NASTY}#1", "\x1b[2J\n[red]x[/red]"}
    assert read["question"] == "Who built [/bold] \x1b[31m?"


@pytest.mark.usefixtures("hashed")
def test_nothing_of_a_store_steers_the_terminal(nasty: Path, model_folder: str, tmp_path: Path) -> None:
    store = tmp_path / "st\x1b[31m\n[/bold]"
    made = run("index", nasty, "--store", store, "--model", model_folder)
    assert made.exit_code == 0
    (segment,) = store.glob("keys-*.safetensors")
    content = bytearray(segment.read_bytes())
    content[-1] ^= 255
    segment.write_bytes(content)
    outputs = [made, *(run("store", command, store) for command in ("info", "verify", "clear"))]
    for shown in outputs:
        check_terminal(shown.output)
    assert "st\\x1b[31m\\n[/bold]" in made.stdout
    assert "damaged; --repair removes them: " in outputs[2].stdout
    assert "\\x1b[2J\\n[red]x[/red]" in outputs[2].stdout
    check_terminal(one_error(run("store", "info", tmp_path / "\x1b[31m\n[/bold]")))
    line = one_error(run("index", tmp_path / "\x1b[31m\n[/bold]", "--store", store))
    assert "\\x1b[31m\\n[/bold] does not exist" in line


@pytest.mark.usefixtures("hashed")
def test_links_and_limits_are_options_of_every_command_that_takes_a_corpus(
    folder: Path, model_folder: str, tmp_path: Path
) -> None:
    files("a.txt")(folder)
    (tmp_path / "b.txt").write_text("more words " * 10)
    (folder / "l.txt").symlink_to("../b.txt")
    store = tmp_path / "store"
    for command in (("ask", "Who?", "--corpus", folder), ("rank", "Who?", "--corpus", folder)):
        common = (*command, "--model", model_folder, "--json", "--no-store")
        left = run(*common)
        assert "Note: 1 link is not followed, such as l.txt: follow_links (--follow-links)" in left.stderr
        assert {c["passage_id"] for c in only_json(left)["citations"]} == {"a.txt#1"}
        followed = run(*common, "--follow-links", "--top-k", 2)
        assert followed.stderr == ""
        assert "l.txt#1" in followed.stdout
        (folder / "c.txt").write_text("x " * MIB)
        assert "c.txt has more than 1,048,576 bytes" in run(*common, "--max-file-mib", 1).stderr
        assert "more than 1,048,576 bytes, with" in one_error(run(*common, "--max-corpus-mib", 1))
        assert "--max-file-mib is 0: the least is 1" in one_error(run(*common, "--max-file-mib", 0))
        (folder / "c.txt").unlink()
        asked = run(*command[:2], "--store", store, "--follow-links")
        assert "--follow-links, --max-file-mib and --max-corpus-mib are for a corpus" in one_error(asked)
    indexing = ("index", folder, "--store", store, "--model", model_folder, "--json")
    assert only_json(run(*indexing))["passages"] == 1
    assert only_json(run(*indexing, "--follow-links"))["passages"] == 2
    assert "--max-corpus-mib is -1: the least is 1" in one_error(run(*indexing, "--max-corpus-mib", -1))


@pytest.mark.parametrize(
    "command",
    [
        ("quality", "--methods", "gold"),
        ("positions", "--passages", "2"),
        ("recall", "--rankers", "bm25"),
        ("kept", "--attention", "a.jsonl.gz"),
    ],
)
def test_links_and_limits_are_options_of_benchmarks(
    folder: Path, tmp_path: Path, command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data_set(folder, a='{"id": "q", "text": "the harbour"}')
    (tmp_path / "b.jsonl").write_text('{"id": "p", "text": "the lighthouse"}')
    (folder / "l.jsonl").symlink_to("../b.jsonl")
    name, *options = command
    common = ("bench", name, folder, "--model", "no/such-model", *options)
    left = run(*common)
    assert "Note: 1 link is not followed" in left.stderr
    reason = "no gold passage of question questions.jsonl#1"
    assert reason in left.stderr
    followed = run(*common, "--follow-links")
    assert "link" not in followed.stderr
    assert reason not in followed.stderr
    (folder / "c.txt").write_text("x " * MIB)
    shutil.rmtree("bench-results", ignore_errors=True)  # the cases that were drawn
    assert "c.txt has more than 1,048,576 bytes" in run(*common, "--max-file-mib", 1).stderr
    assert "more than 1,048,576 bytes, with" in one_error(run(*common, "--max-corpus-mib", 1))
    assert "--max-file-mib is 0: the least is 1" in one_error(run(*common, "--max-file-mib", 0))


def test_names_that_are_not_utf_8_are_stored_and_found(
    folder: Path, tmp_path: Path, model_folder: str, hashed: None
) -> None:
    if sys.platform != "linux":
        pytest.skip("elsewhere names are text")
    with open(os.fsencode(folder) + b"/caf\xe9.txt", "wb") as file:  # noqa: PTH123
        file.write(b"The harbour was built in 1874.")
    store = tmp_path / "store"
    assert only_json(run("index", folder, "--store", store, "--model", model_folder, "--json"))["passages"] == 1
    shown = only_json(run("ask", "When?", "--store", store, "--model", model_folder, "--json"))
    assert shown["citations"][0]["passage_id"] == "caf\\xe9.txt#1"
    assert shown["citations"][0]["title"] == "caf\\xe9"
