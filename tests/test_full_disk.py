"""Every writer, on a disk that is full or cannot be written from its n-th change on, for every n."""

from __future__ import annotations

import errno
import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from finch_rag import CompressedCache, Finch, FinchError, InputError, ModelError, PassageStore, StoreError
from finch_rag.bench.cases import QualityCase, read_cases, write_cases
from finch_rag.bench.kept import Attended, read_attended, write_attended
from finch_rag.bench.plots import plot_positions
from finch_rag.bench.quality import appending, read_results
from finch_rag.corpus import retrieval
from finch_rag.corpus.reading import Question
from finch_rag.errors import SettingsError
from finch_rag.heads import stored as heads
from finch_rag.heads.search import HeadScore
from finch_rag.models import embedded
from finch_rag.models.fingerprint import fingerprint
from finch_rag.paths import write_atomically
from finch_rag.prompts.passages import Passage
from finch_rag.serve.shelf import Shelf
from finch_rag.store.index import StoreIndex

from .faulty_files import ERRORS, faulty
from .small import chat_tokenizer, small_finch, small_model, texts
from .test_paths import full_after
from .test_store import HEADS, QUESTION, named, new_finch, segment_files


class Writer(NamedTuple):
    """Something that writes.

    Attributes:
        write: Writes an old or a new state into a folder.
        read: What is there.
        error: What it raises; None where it goes on and says so in the log.
        states: What `read` finds after the old and the new state were written.
        keeps: Whether the old state is there after a failure; else it is, or nothing (a damaged one is replaced).
    """

    write: Callable[[Path, str], Any]
    read: Callable[[Path], Any]
    error: type[FinchError] | None
    states: tuple[Any, Any] = ("old", "new")
    keeps: bool = True


def cache_of(question: str) -> CompressedCache:
    return small_finch().compress(question, texts(3))


CACHES = {state: cache_of(state) for state in ("old", "new")}
VECTORS = {state: np.eye(3, 256, k, dtype="float32") for k, state in enumerate(("old", "new"))}


def write_heads(folder: Path, state: str) -> None:
    model = small_model()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        patch.setattr(heads, "load_heads", lambda *args: None)
        patch.setattr(heads, "find_heads", lambda *args, **options: [HeadScore(0, int(state == "new"), 0.5)])
        heads.resolve_heads("auto", model, chat_tokenizer(), "small")


def read_heads(folder: Path) -> Any:
    file = folder / "finch-rag" / "heads" / f"{fingerprint(small_model())}.json"
    return json.loads(file.read_text())["heads"][0][1] if file.exists() else None


def write_index(folder: Path, state: str) -> None:
    retrieval._save(folder / "indexes" / "index", VECTORS[state])


def read_index(folder: Path) -> Any:
    found = retrieval._load(folder / "indexes" / "index", 3)
    return None if found is None else int(found[0].argmax())


def question_of(state: str) -> Question:
    return Question("1", state, ("a",), ())


def write_some_cases(folder: Path, state: str) -> None:
    case = QualityCase(question_of(state), [Passage("p")], [0])
    write_cases([case] * 3, folder / "out" / "cases.jsonl.gz")


def write_some_attention(folder: Path, state: str) -> None:
    write_attended([Attended(state, 1, [True], [0], [3], [1.0])], folder / "out" / "kept.jsonl.gz")


def write_results(folder: Path, state: str) -> None:
    with appending(folder / "results.jsonl") as store:
        store({"state": state})


def read_all_results(folder: Path) -> Any:
    return [found["state"] for found in read_results(folder)]


POSITIONS = {
    "settings": {"retriever": "bm25", "budget": 512, "model": "m", "data": "d", "limit": 1, "seed": 0},
    "cases": 3,
    "passages": {"10": {"finch@512": {"places": {"0": {"n": 1, "accuracy": {"mean": 0.5, "low": 0.4, "high": 0.6}}}}}},
}


def write_plot(folder: Path, state: str) -> None:
    shown = json.loads(json.dumps(POSITIONS))
    shown["settings"]["retriever"] = state
    plot_positions(shown, folder / "out" / "plot.svg")


def read_plot(folder: Path) -> Any:
    svg = (folder / "out" / "plot.svg").read_text()
    assert svg.rstrip().endswith("</svg>")
    return len(svg)


class Convertible:
    """Stands in for a model and its tokenizer, which write as transformers does: with safetensors and in Rust."""

    def __init__(self, state: str, name: str) -> None:
        self._state, self._name = state, name

    def save_pretrained(self, folder: Path) -> None:
        from safetensors import torch as saving

        for name in (name for name in embedded._NEEDED if name.startswith(self._name)):
            if name.endswith(".safetensors"):
                saving.save_file({"w": CACHES[self._state].kept.clone()}, str(folder / name), {"state": self._state})
            else:
                (folder / name).write_text(self._state)


def write_conversion(folder: Path, state: str) -> None:
    def convert(gguf: Path, made: Path) -> None:
        embedded.put_in_place(Convertible(state, ""), Convertible(state, "tokenizer"), made)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        patch.setattr(embedded, "convert_gguf", convert)
        patch.setattr(embedded, "EMBEDDED_NAME", "model")
        patch.setattr(embedded, "version", lambda name: "0")
        patch.setattr(embedded, "is_intact", lambda place: False)
        embedded.embedded_folder()


def read_conversion(folder: Path) -> Any:
    places = [path for path in (folder / "finch-rag" / "models").iterdir() if path.is_dir()]
    if not places:
        return None
    (place,) = places
    assert embedded.is_intact(place)
    return (place / "config.json").read_text()


WRITERS = {
    "text": Writer(
        lambda folder, state: write_atomically(folder / "file", state),
        lambda folder: (folder / "file").read_text(),
        None,
    ),
    "cache": Writer(
        lambda folder, state: CACHES[state].save(folder / "cache"),
        lambda folder: CompressedCache.load(folder / "cache").document.question,
        InputError,
    ),
    "heads": Writer(write_heads, read_heads, None, (0, 1)),
    "index": Writer(write_index, read_index, None, (0, 1)),
    "cases": Writer(
        write_some_cases,
        lambda folder: next(read_cases(folder / "out" / "cases.jsonl.gz")).question.question,
        InputError,
    ),
    "attention": Writer(
        write_some_attention, lambda folder: read_attended(folder / "out" / "kept.jsonl.gz")[0].question_id, InputError
    ),
    "conversion": Writer(write_conversion, read_conversion, ModelError, keeps=False),
}


def leftovers(folder: Path) -> list[str]:
    """Hidden files and folders below a folder, and what safetensors was writing."""
    return [str(path) for path in folder.rglob("*") if path.name.startswith(".") and path.name != ".lock"]


def one_line(error: BaseException, folder: Path, code: int) -> None:
    line = str(error)
    assert "\n" not in line
    assert len(line) < 600
    assert os.strerror(code) in line
    assert str(folder) in line
    assert "free space there" in line or "read_only" in line


@pytest.mark.parametrize("code", ERRORS, ids=errno.errorcode.get)
@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("has_old", [True, False])
def test_a_disk_that_fails_at_any_change_leaves_the_old_whole(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, code: int, has_old: bool
) -> None:
    writer = WRITERS[name]
    folder = tmp_path / "disk"
    folder.mkdir()
    if has_old:
        writer.write(folder, "old")
        assert writer.read(folder) == writer.states[0]
    nth = 0
    while True:
        nth += 1
        caplog.clear()
        raised: Exception | None = None
        with caplog.at_level(logging.WARNING, "finch_rag"), faulty(folder, nth, code) as faults:
            try:
                writer.write(folder, "new")
            except (FinchError, OSError) as error:
                raised = error
        if raised is None:
            assert not faults.failed or "again next time" in caplog.text
        elif name == "text":  # its callers say it
            assert isinstance(raised, OSError)
        else:
            assert type(raised) is writer.error
            one_line(raised, folder, code)
        if not faults.failed:
            break
        assert leftovers(folder) == [], faults.done
        if has_old:
            assert writer.read(folder) in (writer.states[0], *([] if writer.keeps else [None])), faults.done
    assert nth > 3
    assert any(change.startswith("fsync") for change in faults.done) == writer.keeps  # it is on the disk, then in place
    assert writer.read(folder) == writer.states[1]
    assert leftovers(folder) == []


def test_results_that_cannot_be_written_leave_those_before(tmp_path: Path) -> None:
    write_results(tmp_path, "old")
    for code in ERRORS:
        for nth in (1, 2):
            with pytest.raises(InputError) as caught, faulty(tmp_path, nth, code) as faults:
                write_results(tmp_path, "new")
            one_line(caught.value, tmp_path, code)
            assert faults.failed
            assert read_all_results(tmp_path) == ["old"]
    write_results(tmp_path, "new")
    assert read_all_results(tmp_path) == ["old", "new"]


def test_a_result_that_does_not_fit_can_be_stored_again(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    with appending(file) as store:
        store({"state": "old"})
        for size in (file.stat().st_size, file.stat().st_size + 5):
            with full_after(size), pytest.raises(InputError, match="a result cannot be written"):
                store({"state": "new"})
        assert read_all_results(tmp_path) == ["old"]
        store({"state": "new"})
    assert read_all_results(tmp_path) == ["old", "new"]


def test_a_plot_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    write_plot(tmp_path, "old")
    old = read_plot(tmp_path)
    for nth in (1, 2, 3, 4):
        with pytest.raises(InputError, match="the plot cannot be written") as caught, faulty(tmp_path, nth):
            write_plot(tmp_path, "another")
        one_line(caught.value, tmp_path, errno.ENOSPC)
        assert read_plot(tmp_path) == old
        assert leftovers(tmp_path) == []
    write_plot(tmp_path, "another")


# Stores


@pytest.fixture(scope="module")
def finch() -> Finch:
    return new_finch()


def state_of(store: PassageStore) -> tuple[Any, ...]:
    found = [(cited.passage_id, round(cited.share, 4)) for cited in store.search(QUESTION, 100)]
    return sorted(store._index.ids()), found, store.verify()


def check_segments(store: PassageStore, folder: Path) -> None:
    """The files are those that the index knows."""
    known = [f"keys-{number:08}.safetensors" for number in store._index.segment_numbers()]
    assert sorted(path.name for path in segment_files(folder)) == known


CHANGES: dict[str, Callable[[PassageStore], Any]] = {
    "add": lambda store: store.add(named(9)),
    "remove": lambda store: store.remove([f"p{n}" for n in range(4)]),
    "clear": lambda store: store.clear(),
}


@pytest.mark.parametrize("code", ERRORS, ids=errno.errorcode.get)
@pytest.mark.parametrize("name", CHANGES)
def test_a_store_on_a_disk_that_fails_at_any_change_loses_nothing(
    finch: Finch, tmp_path: Path, name: str, code: int
) -> None:
    """Segments; SQLite, which writes in C, has the next test."""
    nth = 0
    failed = True
    while failed:
        nth += 1
        with finch.open_store(tmp_path / str(nth), heads=HEADS) as store:
            store.add(named(5))
            before = state_of(store)
            with faulty(tmp_path, nth, code) as faults:
                try:
                    CHANGES[name](store)
                except StoreError as error:
                    one_line(error, tmp_path, code)
                    assert faults.failed
            failed = faults.failed
            assert leftovers(tmp_path) == []
            check_segments(store, tmp_path / str(nth))
            if failed and name == "add":
                assert state_of(store) == before
            ids, found, damaged = state_of(store)
            assert {own for own, _ in found} == set(ids) <= {f"p{n}" for n in range(9)}
            assert damaged == []
            store.add(named(9))
            assert len(state_of(store)[1]) == 9
        with finch.open_store(tmp_path / str(nth), heads=HEADS) as again:
            assert len(state_of(again)[1]) == 9
    assert nth > 3 or name == "clear"


@pytest.mark.parametrize("code", ERRORS, ids=errno.errorcode.get)
def test_a_store_that_cannot_be_made_is_one_line(finch: Finch, tmp_path: Path, code: int) -> None:
    for nth in (1, 2):
        with pytest.raises(StoreError) as caught, faulty(tmp_path, nth, code):
            finch.open_store(tmp_path / "s", heads=HEADS)
        assert "\n" not in str(caught.value)
        assert str(tmp_path) in str(caught.value)
    finch.open_store(tmp_path / "s", heads=HEADS).close()  # and its lock is free


def test_an_index_that_does_not_fit_on_the_disk_loses_nothing(finch: Finch, tmp_path: Path) -> None:
    made = 0
    with finch.open_store(tmp_path, heads=HEADS) as store:
        store.add(named(5))
        before = state_of(store)
        for size in range(0, 200_000, 4096):
            try:
                with full_after(size):
                    store.add(named(60))
            except StoreError as error:
                assert "\n" not in str(error)  # noqa: PT017
                assert str(tmp_path) in str(error)  # noqa: PT017
                made += 1
                assert set(before[0]) <= set(state_of(store)[0])
                assert store.verify() == []
                check_segments(store, tmp_path)
            else:
                break
        assert made > 2
        store.add(named(60))
        assert len(store) == 60
    with finch.open_store(tmp_path, heads=HEADS) as again:
        assert len(again.search(QUESTION, 100)) == 60
        assert again.verify() == []


def test_a_segment_that_the_index_cannot_take_is_removed(
    finch: Finch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise StoreError("the index cannot be written")

    with finch.open_store(tmp_path, heads=HEADS) as store:
        store.add(named(5))
        monkeypatch.setattr(StoreIndex, "add_segment", full)
        with pytest.raises(StoreError, match="the index"):
            store.add(named(9))
        check_segments(store, tmp_path)
        monkeypatch.undo()
        assert store.add(named(9)).known_tokens > 0


def test_a_transaction_that_fails_is_undone_and_the_next_one_works(tmp_path: Path) -> None:
    index = StoreIndex(tmp_path / "index", {}, writes=True)
    insert = "INSERT INTO segments (tokens, bytes, checksum) VALUES (1, 1, 'x')"

    def fail() -> None:
        with index.transaction() as connection:
            connection.execute(insert)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    with index.transaction() as connection:
        connection.execute(insert)
    assert len(index.segments()) == 1
    index.close()


def test_a_new_index_that_does_not_fit_on_the_disk_is_one_line(finch: Finch, tmp_path: Path) -> None:
    for size in (0, 1000, 4096, 8192, 20000):
        with pytest.raises(StoreError) as caught, full_after(size):
            finch.open_store(tmp_path / str(size), heads=HEADS).add(named(30))
        assert "\n" not in str(caught.value)
        with finch.open_store(tmp_path / str(size), heads=HEADS) as store:
            assert store.add(named(5)).read_tokens > 0


def test_a_folder_of_stores_that_cannot_be_made_is_one_line(finch: Finch, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="No space left") as caught, faulty(tmp_path, 1):
        Shelf(finch, tmp_path / "stores")
    assert "\n" not in str(caught.value)


READS = """
import os, sys
from pathlib import Path
from finch_rag.store.folder import StoreFolder
folder = Path(sys.argv[1])
os.setuid(65534)  # the interpreter may be in a folder that is root's alone
try:
    (folder / "x").write_text("x")
except OSError:
    pass
else:
    raise SystemExit("it can be written")
with StoreFolder(folder) as store:
    print(store.info().passages, store.verify())
try:
    StoreFolder(folder, writes=True)
except Exception as error:
    print(type(error).__name__, error)
"""


def test_a_store_on_a_read_only_disk_is_read(finch: Finch) -> None:
    if sys.platform == "win32" or os.getuid() != 0:
        pytest.skip("only root can become another user")
    with tempfile.TemporaryDirectory() as temporary:  # pytest's own folder is its user's alone
        folder = Path(temporary) / "s"
        with finch.open_store(folder, heads=HEADS) as store:
            store.add(named(5))
        for path in (folder.parent, folder, *folder.iterdir()):
            path.chmod(0o755 if path.is_dir() else 0o644)
        command = [sys.executable, "-c", READS, str(folder)]
        ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        assert ran.stdout.splitlines()[:1] == ["5 []"], ran.stderr[-2000:]
        assert ran.stdout.splitlines()[1].startswith("StoreError")
        assert "read_only=True" in ran.stdout
        folder.parent.chmod(0o700)
        ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        assert ran.stderr.splitlines()[-1].startswith("finch_rag.errors.StoreError: the store in"), ran.stderr[-2000:]
