"""Folders of stores with damage: each opens and can be searched, or is refused in one line; repair leaves none."""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any

from finch_rag import Finch, Passage, PassageStore
from finch_rag.store.folder import StoreFolder
from tests.small import small_finch

from .support import Choices, holds, only

HEADS = [(0, 1), (1, 2)]
_TABLES = {
    "about": ("name", "value"),
    "segments": ("number", "tokens", "bytes", "checksum"),
    "readings": ("hash", "segment", "start", "tokens", "used"),
    "passages": ("number", "id", "hash", "own_id", "title", "text", "metadata"),
}
_VALUES: tuple[Any, ...] = (
    *(
        None,
        0,
        1,
        -1,
        2,
        3,
        9,
        2**31,
        2**62,
        0.5,
        1e300,
        "",
        "a",
        "x",
        "\U0001f600",
        b"",
        b"\xff\xfe",
        "{}",
        "[]",
        "{",
    ),
    *("null", '{"a": 1}', "1", "finch-store-1", "finch-store-2", "p0", "p1", "bfloat16", "int8", "0.1 1.2", "0.1 x"),
)
_BYTES, _ROWS, _SQL = 0, 1, 2
_STATEMENTS = (
    "DROP TABLE passages",
    "DROP TABLE readings",
    "DROP TABLE segments",
    "DROP TABLE about",
    "DELETE FROM readings",
    "DELETE FROM passages",
    "DELETE FROM segments",
    "DELETE FROM about",
    "DELETE FROM sqlite_sequence",
    "UPDATE sqlite_sequence SET seq = 0",
    "INSERT INTO readings SELECT hash || 'x', segment, start, tokens, used FROM readings",
    "INSERT INTO passages (id, hash, own_id, title, text, metadata) "
    "SELECT id || 'x', hash, 0, NULL, '', '{}' FROM passages",
    "ALTER TABLE passages DROP COLUMN title",
    "ALTER TABLE readings RENAME COLUMN start TO begin",
    "UPDATE sqlite_sequence SET seq = 'x'",
)


@cache
def _finch() -> Finch:
    return small_finch(max_new_tokens=1)


@cache
def _whole() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="finch-fuzz-"))
    with _finch().open_store(folder, heads=HEADS) as store:
        store.add([Passage(f"The bridge {number} is old.", f"p{number}") for number in range(3)])
        store.add(["The museum opened in 1931."])
    return folder


def seeds() -> list[bytes]:
    """Damage of each kind."""
    rows = [bytes((_ROWS, table, 0, 0, 0)) for table in range(len(_TABLES))]
    statements = [bytes((_SQL, 0, 0, 0, 0, number)) for number in range(len(_STATEMENTS) - 1)]
    return [b"", bytes((_BYTES, 0, 0, 0, 1)), bytes((_BYTES, 1, 5, 0, 2)), *rows, *statements]


def check(data: bytes) -> None:
    """Damage, one after another."""
    choices = Choices(data)
    folder = _whole().with_name(f"{_whole().name}-damaged")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(_whole(), folder)
    while choices.left:
        _damage(folder, choices)
    with only(), StoreFolder(folder) as found:
        found.info()
        found.verify()
    with only(), _finch().open_store(folder, heads=HEADS, read_only=True) as read:
        _use(read)
    with only(), _finch().open_store(folder, heads=HEADS) as store:
        with only():
            _use(store)
        with only():
            store.verify(repair=True)
            holds(not store.verify(), "repaired, and still damaged")
            _use(store)
            store.add(["The harbour was built in 1874."])
            store.remove(next(iter(store._index.ids())))


def _use(store: PassageStore) -> None:
    """All that reads it; each part raises by itself."""
    for part in (store.passages, store.info, store.verify, lambda: store.search("who built the bridge?")):
        with only():
            part()
    with only():
        _finch().ask("who?", store=store)


def _damage(folder: Path, choices: Choices) -> None:
    kind = choices.number(3)
    if kind == _BYTES:
        file = choices.one_of(sorted(path for path in folder.iterdir() if path.stat().st_size))
        content = bytearray(file.read_bytes())
        place, how = choices.number(1 << 16) % len(content), choices.number(256)
        if how < 16:
            content = content[:place] if how < 8 else content[:place] + content[place + how :]
        else:
            content[place] ^= how
        file.write_bytes(content or b"\0")
        return
    table = choices.one_of(tuple(_TABLES))
    column, row, value = choices.one_of(_TABLES[table]), choices.number(5), choices.one_of(_VALUES)
    statement = f"UPDATE {table} SET {column} = ? WHERE rowid = (SELECT rowid FROM {table} LIMIT 1 OFFSET {row})"
    try:
        with closing(sqlite3.connect(folder / "index.sqlite3", isolation_level=None)) as connection:
            if kind == _SQL:
                connection.execute(choices.one_of(_STATEMENTS))
            else:
                connection.execute(statement, (value,))
    except sqlite3.Error:
        pass  # the damage before this one, or a rule of the table
