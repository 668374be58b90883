"""What a store knows: which passages it has, and where their head keys are. One SQLite database.

A passage's head keys depend on its token ids alone, so a *reading* is known by their hash; passages with the same text
share it. SQLite keeps the index whole when a process dies at any moment, and lets others read while one writes.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..errors import StoreError
from ..prompts.passages import Passage

_FORMAT = "finch-store-1"
_MOST_VALUES = 500  # in a query; SQLite has a limit
_WAITS = 30.0  # seconds for another process's transaction

_TABLES = """
CREATE TABLE IF NOT EXISTS about (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS segments (
    number INTEGER PRIMARY KEY AUTOINCREMENT, tokens INTEGER NOT NULL, bytes INTEGER NOT NULL, checksum TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS readings (
    hash TEXT PRIMARY KEY, segment INTEGER NOT NULL, start INTEGER NOT NULL, tokens INTEGER NOT NULL, used REAL NOT NULL
);
CREATE INDEX IF NOT EXISTS by_segment ON readings (segment, start);
CREATE TABLE IF NOT EXISTS passages (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, hash TEXT NOT NULL, own_id INTEGER NOT NULL,
    title TEXT, text TEXT NOT NULL, metadata TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS by_hash ON passages (hash);
"""


@dataclass(frozen=True, slots=True)
class Reading:
    """Where a passage's head keys are.

    Attributes:
        hash: Of its token ids.
        segment: Number of its segment.
        start: Its first token's place there.
        tokens: How many tokens it has.
    """

    hash: str
    segment: int
    start: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Segment:
    """Head keys that were written together.

    Attributes:
        number: Names it; never given twice.
        tokens: Tokens in it, those of removed passages included.
        bytes: Its size.
        checksum: Of its keys.
    """

    number: int
    tokens: int
    bytes: int
    checksum: str


class StoreIndex:
    """The index. Safe to share between threads.

    Args:
        file: The database; None keeps it in memory.
        about: What all head keys in it depend on (model, heads, prefix, precision), by name; None takes them as they
            are.
        writes: Whether it may be changed; a new one is made then.

    Raises:
        StoreError: If the file is no index, or of another kind than ``about`` says.
    """

    def __init__(self, file: Path | None, about: Mapping[str, str] | None, *, writes: bool) -> None:
        self.file, self._lock = file, threading.RLock()
        try:
            if file is None:
                self._connection = sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None)
            else:
                mode = "rwc" if writes else "ro"
                self._connection = sqlite3.connect(
                    f"{file.absolute().as_uri()}?mode={mode}",
                    uri=True,
                    timeout=_WAITS,
                    check_same_thread=False,
                    isolation_level=None,
                )
            if writes:
                if file is not None:
                    self._connection.execute("PRAGMA journal_mode=WAL")
                    self._connection.execute("PRAGMA synchronous=FULL")
                if about is not None:
                    self._connection.executescript(_TABLES)
            self._check(about, writes)
        except sqlite3.Error as error:
            raise StoreError(f"{file} cannot be opened as a store's index: {error}") from error

    def about(self) -> dict[str, str]:
        """What all head keys in it depend on, by name, and the format of the index."""
        return {str(name): str(value) for name, value in self._rows("SELECT name, value FROM about")}

    def _check(self, about: Mapping[str, str] | None, writes: bool) -> None:
        found = self.about()
        wanted = {"format": _FORMAT, **(about or {})}
        if not found and writes and about is not None:
            with self.transaction() as connection:
                connection.executemany("INSERT INTO about VALUES (?, ?)", wanted.items())
            return
        for name, value in wanted.items():
            if found.get(name) != value:
                raise StoreError(
                    f"the store {self.file} was made for another {name} ({found.get(name)}, not {value}): open another "
                    "folder, or delete this one"
                )

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All that is written in it is kept together, or not at all.

        Raises:
            StoreError: If it cannot be written.
        """
        with self._lock:
            try:
                self._connection.execute("BEGIN IMMEDIATE")
                try:
                    yield self._connection
                except BaseException:
                    self._connection.execute("ROLLBACK")
                    raise
                self._connection.execute("COMMIT")
            except sqlite3.Error as error:
                raise StoreError(f"the store's index {self.file or 'in memory'} cannot be written: {error}") from error

    def _rows(self, query: str, values: Sequence[object] = ()) -> list[tuple[object, ...]]:
        with self._lock:
            try:
                return self._connection.execute(query, values).fetchall()
            except sqlite3.Error as error:
                raise StoreError(f"the store's index {self.file or 'in memory'} cannot be read: {error}") from error

    def version(self) -> int:
        """Changes when another process has written."""
        return int(str(self._rows("PRAGMA data_version")[0][0]))

    def readings(self) -> list[Reading]:
        """All readings, segment by segment, in their order there."""
        rows = self._rows("SELECT hash, segment, start, tokens FROM readings ORDER BY segment, start")
        return [Reading(*row) for row in rows]  # type: ignore[arg-type]  # as the tables say

    def known(self, hashes: Iterable[str]) -> set[str]:
        """Which of some readings are there.

        Args:
            hashes: Of the readings.
        """
        found: set[str] = set()
        for some in _parts(list(dict.fromkeys(hashes)), _MOST_VALUES):
            marks = ",".join("?" * len(some))
            found.update(
                str(known) for (known,) in self._rows(f"SELECT hash FROM readings WHERE hash IN ({marks})", some)
            )
        return found

    def segments(self) -> list[Segment]:
        """All segments, by number."""
        rows = self._rows("SELECT number, tokens, bytes, checksum FROM segments ORDER BY number")
        return [Segment(*row) for row in rows]  # type: ignore[arg-type]

    def all_passages(self) -> list[Passage]:
        """All passages, in the order in which they were added."""
        rows = self._rows("SELECT id, own_id, title, text, metadata FROM passages ORDER BY number")
        return [_passage(*row) for row in rows]

    def passages(self, hashes: Iterable[str]) -> dict[str, tuple[int, Passage]]:
        """The first passage of each reading, with its number.

        Args:
            hashes: Of the readings.
        """
        found: dict[str, tuple[int, Passage]] = {}
        for some in _parts(list(dict.fromkeys(hashes)), _MOST_VALUES):
            marks = ",".join("?" * len(some))
            rows = self._rows(
                "SELECT hash, MIN(number), id, own_id, title, text, metadata FROM passages "
                f"WHERE hash IN ({marks}) GROUP BY hash",
                some,
            )
            for known, number, *columns in rows:
                found[str(known)] = (int(str(number)), _passage(*columns))
        return found

    def ids(self) -> dict[str, str]:
        """The hash of each passage by its id, in the order in which they were added."""
        return {str(own): str(known) for own, known in self._rows("SELECT id, hash FROM passages ORDER BY number")}

    def numbers(self) -> list[int]:
        """The numbers of all passages, ascending."""
        return [int(str(number)) for (number,) in self._rows("SELECT number FROM passages ORDER BY number")]

    def count(self) -> int:
        """How many passages there are."""
        return int(str(self._rows("SELECT COUNT(*) FROM passages")[0][0]))

    def has_passages(self, passages: Iterable[tuple[Passage, str]]) -> bool:
        """Whether all passages are there as they are, so that nothing is to be written.

        Args:
            passages: With their hashes.
        """
        wanted = {str(p.id or known): (known, p.title, p.text, _as_json(p)) for p, known in passages}
        for some in _parts(list(wanted), _MOST_VALUES):
            marks = ",".join("?" * len(some))
            rows = self._rows(f"SELECT id, hash, title, text, metadata FROM passages WHERE id IN ({marks})", some)
            if len(rows) < len(some):
                return False
            for own, *rest in rows:
                *same, metadata = wanted[str(own)]
                if same != rest[:-1] or metadata not in ("{}", rest[-1]):
                    return False
        return True

    def add_passages(self, passages: Iterable[tuple[Passage, str]]) -> None:
        """Names passages whose readings are there; one whose id is known takes its place.

        One without metadata leaves those of the same text: what asks about a passage need not know all of it.

        Args:
            passages: With their hashes.
        """
        with self.transaction() as connection:
            connection.executemany(
                "INSERT INTO passages (id, hash, own_id, title, text, metadata) VALUES (?, ?, ?, ?, ?, ?) "
                "ON CONFLICT (id) DO UPDATE SET title = excluded.title, text = excluded.text, metadata = CASE WHEN "
                "excluded.metadata = '{}' AND excluded.hash = hash THEN metadata ELSE excluded.metadata END, "
                "hash = excluded.hash",
                [(p.id or known, known, int(p.id is not None), p.title, p.text, _as_json(p)) for p, known in passages],
            )

    def add_segment(self, segment: Segment, readings: Iterable[Reading]) -> None:
        """Takes note of a segment that is written, and of what is in it; readings that are known move there.

        Args:
            segment: The segment.
            readings: What is in it.
        """
        now = time.time()
        with self.transaction() as connection:
            connection.execute(
                "INSERT INTO segments VALUES (?, ?, ?, ?)",
                (segment.number, segment.tokens, segment.bytes, segment.checksum),
            )
            connection.executemany(
                "INSERT INTO readings VALUES (?, ?, ?, ?, ?) ON CONFLICT (hash) DO UPDATE SET "
                "segment = excluded.segment, start = excluded.start",
                [(r.hash, r.segment, r.start, r.tokens, now) for r in readings],
            )

    def remove_segments(self, numbers: Iterable[int]) -> None:
        """Forgets segments; their readings have moved or are removed.

        Args:
            numbers: Of the segments.
        """
        with self.transaction() as connection:
            connection.executemany("DELETE FROM segments WHERE number = ?", [(number,) for number in numbers])

    def remove_passages(self, ids: Iterable[str]) -> None:
        """Removes passages, and the readings that no other passage has.

        Args:
            ids: Of the passages.
        """
        with self.transaction() as connection:
            connection.executemany("DELETE FROM passages WHERE id = ?", [(own,) for own in ids])
            self._drop_unnamed(connection)

    def remove_readings(self, hashes: Iterable[str]) -> None:
        """Removes readings with their passages.

        Args:
            hashes: Of the readings.
        """
        with self.transaction() as connection:
            connection.executemany("DELETE FROM passages WHERE hash = ?", [(known,) for known in hashes])
            self._drop_unnamed(connection)

    def drop_unnamed(self) -> None:
        """Removes readings that no passage has: their passages' texts have changed."""
        with self.transaction() as connection:
            self._drop_unnamed(connection)

    def _drop_unnamed(self, connection: sqlite3.Connection) -> None:
        connection.execute("DELETE FROM readings WHERE hash NOT IN (SELECT hash FROM passages)")

    def touch(self, used: Mapping[str, float]) -> None:
        """Takes note of when readings were used.

        Args:
            used: Seconds since the epoch, by the readings' hashes.
        """
        with self.transaction() as connection:
            connection.executemany(
                "UPDATE readings SET used = ? WHERE hash = ?", [(when, known) for known, when in used.items()]
            )

    def least_recently_used(self) -> Iterator[tuple[str, int]]:
        """Hashes and tokens of all readings, the one that was not used for longest first."""
        for known, tokens in self._rows("SELECT hash, tokens FROM readings ORDER BY used, segment, start"):
            yield str(known), int(str(tokens))

    def next_segment(self) -> int:
        """A number for a new segment, greater than all before."""
        rows = self._rows("SELECT seq FROM sqlite_sequence WHERE name = 'segments'")
        return int(str(rows[0][0])) + 1 if rows else 1

    def close(self) -> None:
        """Closes the database."""
        with self._lock:
            self._connection.close()


def _parts(items: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _passage(own: object, is_own: object, title: object, text: object, metadata: object) -> Passage:
    return Passage(
        str(text), str(own) if is_own else None, None if title is None else str(title), json.loads(str(metadata))
    )


def _as_json(passage: Passage) -> str:
    try:
        written = json.dumps(dict(passage.metadata), ensure_ascii=False, default=str, skipkeys=True)
        written.encode()  # half a surrogate pair is JSON, and nothing that SQLite takes
        return written
    except (TypeError, ValueError, RecursionError) as error:
        named = passage.id or passage.text[:40]
        raise StoreError(f"the metadata of {named!r} cannot be stored: {error}; use plain values") from error
