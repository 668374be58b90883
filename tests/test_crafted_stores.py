"""Folders of stores that somebody has changed: each is refused in one line, or found whole again after a repair."""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch

from finch_rag import Finch, PassageStore, StoreError
from finch_rag.store import storage
from finch_rag.store.folder import StoreFolder

from .crafted import DEEP, Change, opened, written
from .test_store import HEADS, QUESTION, named, new_finch, segment_files

Harm = Callable[[Path], object]


@pytest.fixture(scope="module")
def finch() -> Finch:
    return new_finch()


@pytest.fixture(scope="module", params=["bfloat16", "int8"])
def good(request: pytest.FixtureRequest, finch: Finch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of several segments."""
    folder = tmp_path_factory.mktemp("good") / str(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("finch_rag.store.store._SEGMENT_TOKENS", 60)
        patch.setattr(storage, "SMALL_SEGMENT", 0)
        with finch.open_store(folder, heads=HEADS, precision=request.param) as store:
            store.add(named(12))
    assert len(segment_files(folder)) > 2
    return folder


def sql(*statements: str) -> Harm:
    def harm(folder: Path) -> None:
        with closing(sqlite3.connect(folder / "index.sqlite3")) as connection:
            for statement in statements:
                connection.execute(statement)
            connection.commit()

    return harm


def metadata(text: str) -> Harm:
    def harm(folder: Path) -> None:
        with closing(sqlite3.connect(folder / "index.sqlite3")) as connection:
            connection.execute("UPDATE passages SET metadata = ? WHERE number = 2", (text,))
            connection.commit()

    return harm


def segment(change: Change) -> Harm:
    """Another second segment, whose checksum and size in the index are right."""

    def harm(folder: Path) -> None:
        file = segment_files(folder)[1]
        content = opened(file)
        change(content)
        written(file, content)
        with closing(sqlite3.connect(folder / "index.sqlite3")) as connection:
            from finch_rag.models.checksums import checksum

            connection.execute(
                "UPDATE segments SET checksum = ?, bytes = ? WHERE number = 2",
                (checksum(content.tensors), sum(tensor.nbytes for tensor in content.tensors.values())),
            )
            connection.commit()

    return harm


def keys(make: Callable[[torch.Tensor], torch.Tensor], name: str = "keys") -> Harm:
    def change(content: object) -> None:
        tensors = content.tensors  # type: ignore[attr-defined]
        if name in tensors:
            tensors[name] = make(tensors[name])
        else:  # a store without scales: one that has too many
            tensors["scales"] = torch.full(tensors["keys"].shape[:2], float("nan"))

    return segment(change)


def set_first(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def make(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone() if tensor.is_floating_point() else tensor.bfloat16()
        tensor.view(-1)[0] = value
        return tensor

    return make


def in_file(change: Callable[[bytes], bytes], name: str = "keys-00000002.safetensors") -> Harm:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def as_folder(folder: Path) -> None:
    (folder / "keys-00000002.safetensors").unlink()
    (folder / "keys-00000002.safetensors").mkdir()


def harms() -> Iterator[tuple[str, Harm]]:
    yield "keys with a token less", keys(lambda tensor: tensor[:, 1:])
    yield "keys with a token more", keys(lambda tensor: torch.cat((tensor, tensor[:, :1]), 1))
    yield "keys without a token", keys(lambda tensor: tensor[:, :0])
    yield "keys of a group less", keys(lambda tensor: tensor[:1])
    yield "keys of a group more", keys(lambda tensor: torch.cat((tensor, tensor[:1])))
    yield "narrower keys", keys(lambda tensor: tensor[..., 1:])
    yield "wider keys", keys(lambda tensor: torch.cat((tensor, tensor), -1))
    yield "keys of rank 2", keys(lambda tensor: tensor[0])
    yield "keys of rank 4", keys(lambda tensor: tensor[None])
    yield "keys of rank 0", keys(lambda tensor: tensor.flatten()[0])
    for dtype in (torch.float32, torch.int64, torch.bool, torch.uint8, torch.complex64, torch.float8_e4m3fn):
        yield f"keys in {dtype}", keys(lambda tensor, dtype=dtype: tensor.float().to(dtype))  # type: ignore[misc]
    yield "keys that are NaN", keys(set_first(float("nan")))
    yield "keys that are infinite", keys(set_first(float("inf")))
    yield "scales that are NaN", keys(set_first(float("nan")), "scales")
    yield "scales that are infinite", keys(set_first(float("inf")), "scales")
    yield "scales in float64", keys(lambda tensor: tensor.double(), "scales")
    yield "scales of rank 1", keys(lambda tensor: tensor[0], "scales")
    yield "scales with a token less", keys(lambda tensor: tensor[:, 1:], "scales")
    yield "keys by another name", segment(lambda content: content.tensors.update(k=content.tensors.pop("keys")))
    yield "an empty file", in_file(lambda content: b"")
    yield "a text", in_file(lambda content: b"no segment" * 99)
    for tenth in (1, 5, 9):
        yield (
            f"cut at {tenth}/10",
            in_file(
                lambda content, tenth=tenth: content[: len(content) * tenth // 10]  # type: ignore[misc]
            ),
        )
    yield "a file that is gone", lambda folder: (folder / "keys-00000002.safetensors").unlink()
    yield (
        "a folder in place of a file",
        as_folder,
    )
    for column, value in (
        ("tokens", "'many'"),
        ("tokens", "-1"),
        ("tokens", "0"),
        ("tokens", "1e300"),
        ("tokens", "x'00ff'"),
        ("tokens", "1"),
        ("bytes", "'many'"),
        ("bytes", "-1"),
        ("bytes", "3"),
        ("checksum", "x'00ff'"),
        ("number", "-5"),
        ("number", "9223372036854775807"),
    ):
        yield f"a segment's {column} {value}", sql(f"UPDATE segments SET {column} = {value} WHERE number = 2")
    yield "no segments", sql("DELETE FROM segments")
    for column, value in (
        ("start", "-3"),
        ("start", "4611686018427387904"),
        ("start", "'x'"),
        ("start", "x'00'"),
        ("tokens", "0"),
        ("tokens", "-1"),
        ("tokens", "1e300"),
        ("tokens", "9223372036854775807"),
        ("tokens", "'x'"),
        ("segment", "99"),
        ("segment", "-1"),
        ("segment", "'x'"),
        ("hash", "x'00ff'"),
        ("hash", "''"),
    ):
        yield (
            f"a reading's {column} {value}",
            sql(f"UPDATE readings SET {column} = {value} WHERE rowid = (SELECT MIN(rowid) FROM readings)"),
        )
    yield "no readings", sql("DELETE FROM readings")
    for column, value in (
        ("title", "x'00ff'"),
        ("text", "x'00ff'"),
        ("id", "x'00ff'"),
        ("hash", "'unknown'"),
        ("hash", "x'00ff'"),
    ):
        yield f"a passage's {column} {value}", sql(f"UPDATE passages SET {column} = {value} WHERE number = 2")
    for text in ("", "{", "[]", "null", "7", '{"a": ' + DEEP + "}"):
        yield f"metadata {text[:10]!r}", metadata(text)


HARMS = dict(harms())


def used(finch: Finch, folder: Path, precision: str) -> None:
    """All that a store's users do with it."""
    with StoreFolder(folder) as looked_at:
        looked_at.info()
    with finch.open_store(folder, heads=HEADS, precision=precision) as store:  # type: ignore[arg-type]
        found = store.search(QUESTION, 12)
        assert len(found) == 12
        assert sorted(store.passages(), key=lambda passage: int(str(passage.id)[1:])) == named(12)
        assert store.add(named(13)).known_tokens > 0
        store.remove([f"p{n}" for n in range(11)])
        store.info()


@pytest.fixture
def copy(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / good.name))


def test_a_good_store_is_used(finch: Finch, copy: Path) -> None:
    used(finch, copy, copy.name)


@pytest.mark.parametrize("name", HARMS)
def test_a_store_with_damaged_parts_is_told_in_one_line_and_repaired(finch: Finch, copy: Path, name: str) -> None:
    HARMS[name](copy)
    with pytest.raises(StoreError) as caught:
        used(finch, copy, copy.name)
    line = str(caught.value)
    assert "\n" not in line
    assert len(line) < 700
    with StoreFolder(copy) as looked_at:
        damaged = looked_at.verify()
        assert damaged
    with StoreFolder(copy, writes=True) as repaired:
        assert repaired.verify(repair=True) == damaged
        assert repaired.verify() == []
        repaired.info()
    with finch.open_store(copy, heads=HEADS, precision=copy.name) as store:  # type: ignore[arg-type]
        assert {cited.passage_id for cited in store.search(QUESTION, 12)} == set(store._index.ids())
        store.add(named(12))
    used(finch, copy, copy.name)


def replaced(content: bytes) -> Harm:
    def harm(folder: Path) -> None:
        for name in ("index.sqlite3-wal", "index.sqlite3-shm"):
            (folder / name).unlink(missing_ok=True)
        (folder / "index.sqlite3").write_bytes(content)

    return harm


FOREIGN: dict[str, Harm] = {
    "an empty index": replaced(b""),
    "a text as index": replaced(b"this is no database, but a text that is long enough to look like one" * 99),
    "an index of zeros": replaced(bytes(8192)),
    "an index that is cut": in_file(lambda content: content[:5000], "index.sqlite3"),
    "an index with other bytes": in_file(lambda content: content[:200] + bytes(8000) + content[8200:], "index.sqlite3"),
    "another format": sql("UPDATE about SET value = 'finch-store-9' WHERE name = 'format'"),
    "no format": sql("DELETE FROM about WHERE name = 'format'"),
    "nothing about it": sql("DELETE FROM about"),
    "another model": sql("UPDATE about SET value = x'ff' WHERE name = 'model'"),
    "heads that are none": sql("UPDATE about SET value = 'x.y.z 1' WHERE name = 'heads'"),
    "heads that are huge": sql("UPDATE about SET value = hex(zeroblob(100000)) WHERE name = 'heads'"),
    "another precision": sql("UPDATE about SET value = 'float4' WHERE name = 'precision'"),
    "no table of readings": sql("DROP TABLE readings"),
    "no table of passages": sql("DROP TABLE passages"),
    "a column less": sql("ALTER TABLE passages DROP COLUMN title"),
    "a column more": sql("ALTER TABLE readings ADD COLUMN colour"),
    "a view that never ends": sql(
        "DROP TABLE readings",
        "CREATE VIEW readings AS WITH RECURSIVE n(hash) AS (SELECT 1 UNION ALL SELECT hash + 1 FROM n) "
        "SELECT hash, 1 AS segment, 0 AS start, 1 AS tokens, 0.0 AS used FROM n",
    ),
    "a trigger that deletes": sql(
        "CREATE TRIGGER gone AFTER INSERT ON readings BEGIN DELETE FROM passages; DELETE FROM readings; END"
    ),
    "another program's table": sql("CREATE TABLE songs (name TEXT)"),
    "text that is no text": sql("UPDATE passages SET text = CAST(x'ff' AS TEXT) WHERE number = 2"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_an_index_that_is_none_is_told_in_one_line(finch: Finch, copy: Path, name: str) -> None:
    FOREIGN[name](copy)
    with pytest.raises(StoreError) as caught:
        used(finch, copy, copy.name)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 900


def test_numbers_of_segments_that_are_used_up_are_told(finch: Finch, copy: Path) -> None:
    sql("UPDATE sqlite_sequence SET seq = 9223372036854775807 WHERE name = 'segments'")(copy)
    with finch.open_store(copy, heads=HEADS, precision=copy.name) as store:  # type: ignore[arg-type]
        with pytest.raises(StoreError, match="its next segment would be"):
            store.add(named(13))
        assert len(store.search(QUESTION, 20)) == 12


def test_a_last_write_that_was_torn_is_passed_over(finch: Finch, copy: Path) -> None:
    """What the code promises: a process that dies leaves at most files that nobody knows."""
    (copy / "keys-00000099.safetensors").write_bytes(b"half a segment")
    (copy / ".keys-00000100.part").write_bytes(b"half")
    (copy / ".tmpAb12Cd").write_bytes(b"half")
    (copy / "index.sqlite3-wal").write_bytes(os.urandom(3000))  # no whole frame: SQLite passes it over
    used(finch, copy, copy.name)
    assert not list(copy.glob(".keys-*"))
    assert not list(copy.glob(".tmp*"))
    assert not (copy / "keys-00000099.safetensors").exists()


def test_nan_is_told_by_its_segment_where_the_model_is_whole(finch: Finch, copy: Path) -> None:
    HARMS["scales that are NaN" if copy.name == "int8" else "keys that are NaN"](copy)
    opened_store: PassageStore
    with (
        finch.open_store(copy, heads=HEADS, precision=copy.name) as opened_store,  # type: ignore[arg-type]
        pytest.raises(StoreError, match=r"segment 2 .* holds NaN or infinity: `verify\(repair=True\)`"),
    ):
        opened_store.search(QUESTION)
