"""What a store knows: which passages it has, and where their head keys are. One SQLite database.

A passage's head keys depend on its token ids alone, so a *reading* is known by their hash; passages with the same text
share it. SQLite keeps the index whole when a process dies at any moment, and lets others read while one writes.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ..errors import StoreError
from ..jsonl import parsed
from ..prompts.passages import Passage

_FORMAT = "finch-store-1"
_MOST_VALUES = 500  # in a query; SQLite has a limit
_MOST_SEGMENTS = 2**62
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

# SQLite keeps values of any type in a column: what a row must be, so that nothing else is computed with.
_SOUND_SEGMENT = """(
    s.number > 0 AND typeof(s.tokens) = 'integer' AND s.tokens > 0 AND typeof(s.bytes) = 'integer' AND s.bytes > 0
    AND typeof(s.checksum) = 'text'
)"""
_SOUND_READING = f"""(
    typeof(r.hash) = 'text' AND r.hash <> '' AND typeof(r.segment) = 'integer' AND typeof(r.start) = 'integer'
    AND typeof(r.tokens) = 'integer' AND typeof(r.used) = 'real' AND r.start >= 0 AND r.tokens > 0
    AND r.start <= s.tokens - r.tokens AND {_SOUND_SEGMENT}
)"""
_WITH_SEGMENTS = "FROM readings r LEFT JOIN segments s ON s.number = r.segment"


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
        self.file, self._lock, self._process = file, threading.RLock(), os.getpid()
        self._is_sound = False
        try:
            if file is None:
                self._connection = sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None)
            else:
                self._connection = _connected(file, "mode=rwc" if writes else "mode=ro")
                if not writes:
                    self._connection = _readable(file, self._connection)
            try:
                self._check_tables()
                if writes:
                    if file is not None:
                        self._connection.execute("PRAGMA journal_mode=WAL")
                        self._connection.execute("PRAGMA synchronous=FULL")
                    if about is not None:
                        self._connection.executescript(_TABLES)
                self._check(about, writes)
            except BaseException:
                self._connection.close()
                raise
        except sqlite3.Error as error:
            cure = "free space there" if writes else "open it where it can be written, or another folder"
            raise StoreError(f"{file} cannot be opened as a store's index: {error}; {cure}") from error

    def _check_tables(self) -> None:
        """Raises a StoreError where the database has other tables, or anything that computes on its own."""
        query = "SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL AND name <> 'sqlite_sequence'"
        with closing(sqlite3.connect(":memory:")) as empty:
            empty.executescript(_TABLES)
            expected = {name: sql.split() for name, sql in empty.execute(query)}
        for name, sql in self._connection.execute(query):
            if str(sql).split() != expected.get(name):
                raise StoreError(f"{self.file} is no store's index, it has {name!r}: open another folder")

    def check_rows(self) -> None:
        """Raises a StoreError where what tells where head keys are cannot be; rows are looked at once."""
        if not self._is_sound:
            wrong = len(self._rows(f"SELECT 1 {_WITH_SEGMENTS} WHERE {_SOUND_READING} IS NOT TRUE"))
            wrong += len(self._rows("SELECT 1 FROM passages WHERE hash NOT IN (SELECT hash FROM readings)"))
            if wrong:
                raise StoreError(
                    f"{wrong} rows of the store's index {self.file} are damaged; `verify(repair=True)` removes what is "
                    "damaged"
                )
            self._is_sound = True

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
        self._check_process()
        with self._lock:
            try:
                if self._connection.in_transaction:  # the last one was interrupted between two of these lines
                    self._connection.execute("ROLLBACK")
                self._connection.execute("BEGIN IMMEDIATE")
                try:
                    yield self._connection
                    self._connection.execute("COMMIT")
                except BaseException:
                    if self._connection.in_transaction:  # SQLite ends it itself where the disk is full
                        self._connection.execute("ROLLBACK")
                    raise
            except sqlite3.Error as error:
                raise StoreError(
                    f"the store's index {self.file or 'in memory'} cannot be written: {error}; free space there, or "
                    "set max_bytes"
                ) from error

    def _rows(self, query: str, values: Sequence[object] = ()) -> list[tuple[object, ...]]:
        self._check_process()
        with self._lock:
            try:
                return self._connection.execute(query, values).fetchall()
            except sqlite3.Error as error:
                raise StoreError(f"the store's index {self.file or 'in memory'} cannot be read: {error}") from error

    def _check_process(self) -> None:
        """Raises in a process that was forked since: SQLite must not be used there, and two would write."""
        if self.file is not None and os.getpid() != self._process:
            raise StoreError(
                f"the store in {self.file.parent} was opened by process {self._process}, of which this process "
                f"{os.getpid()} is a fork: open it here, with read_only=True while that one writes"
            )

    def version(self) -> int:
        """Changes when another process has written."""
        return int(str(self._rows("PRAGMA data_version")[0][0]))

    def readings(self) -> list[Reading]:
        """All readings, segment by segment, in their order there.

        Raises:
            StoreError: If rows are damaged.
        """
        self.check_rows()
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
        """All segments, by number; those whose rows are damaged are none."""
        rows = self._rows(
            f"SELECT number, tokens, bytes, checksum FROM segments s WHERE {_SOUND_SEGMENT} ORDER BY number"
        )
        return [Segment(*row) for row in rows]  # type: ignore[arg-type]

    def damaged(self, segments: Iterable[int]) -> dict[int, str]:
        """Passages that are damaged, or whose head keys are or are missing: their ids, by their numbers.

        Args:
            segments: Numbers of those that are damaged.
        """
        bad = set(segments)
        where = {
            known: int(str(segment))
            for known, segment in self._rows(f"SELECT r.hash, r.segment {_WITH_SEGMENTS} WHERE {_SOUND_READING}")
        }
        found: dict[int, str] = {}
        for number, known, *columns in self._rows(
            "SELECT number, hash, id, own_id, title, text, metadata FROM passages"
        ):
            try:
                _passage(*columns)
                is_damaged = known not in where or where[known] in bad
            except StoreError:
                is_damaged = True
            if is_damaged:
                found[int(str(number))] = str(columns[0])
        return found

    def remove_damaged(self, passages: Iterable[int], segments: Iterable[int]) -> None:
        """Removes passages, and readings that no other passage has, whose rows are damaged or segments are.

        Args:
            passages: Their numbers.
            segments: Numbers of those that are damaged; they are forgotten.
        """
        with self.transaction() as connection:
            connection.executemany("DELETE FROM passages WHERE number = ?", [(number,) for number in passages])
            connection.execute(
                "DELETE FROM readings WHERE rowid IN "
                f"(SELECT r.rowid {_WITH_SEGMENTS} WHERE {_SOUND_READING} IS NOT TRUE)"
            )
            connection.executemany("DELETE FROM readings WHERE segment = ?", [(number,) for number in segments])
            self._drop_unnamed(connection)
            connection.executemany("DELETE FROM segments WHERE number = ?", [(number,) for number in segments])
            connection.execute(f"DELETE FROM segments AS s WHERE {_SOUND_SEGMENT} IS NOT TRUE")

    def segment_numbers(self) -> list[int]:
        """The numbers of all segments, damaged rows included."""
        return [int(str(number)) for (number,) in self._rows("SELECT number FROM segments")]

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

    def add_passages(self, passages: Iterable[tuple[Passage, str]]) -> int:
        """Names passages whose readings are there; one whose id is known takes its place.

        One without metadata leaves those of the same text: what asks about a passage need not know all of it.

        Args:
            passages: With their hashes.

        Returns:
            How many readings were removed, as the texts of their passages changed.
        """
        with self.transaction() as connection:
            return self._add_passages(connection, passages)

    @staticmethod
    def _add_passages(connection: sqlite3.Connection, passages: Iterable[tuple[Passage, str]]) -> int:
        rows = [(p.id or known, known, int(p.id is not None), p.title, p.text, _as_json(p)) for p, known in passages]
        replaced: set[tuple[str]] = set()
        for some in _parts([str(row[0]) for row in rows], _MOST_VALUES):
            marks = ",".join("?" * len(some))
            replaced.update(connection.execute(f"SELECT hash FROM passages WHERE id IN ({marks})", some))
        connection.executemany(
            "INSERT INTO passages (id, hash, own_id, title, text, metadata) VALUES (?, ?, ?, ?, ?, ?) "
            "ON CONFLICT (id) DO UPDATE SET title = excluded.title, text = excluded.text, metadata = CASE WHEN "
            "excluded.metadata = '{}' AND excluded.hash = hash THEN metadata ELSE excluded.metadata END, "
            "hash = excluded.hash",
            rows,
        )
        removed = connection.executemany(
            "DELETE FROM readings WHERE hash = ? AND NOT EXISTS "
            "(SELECT 1 FROM passages WHERE passages.hash = readings.hash)",
            replaced,
        )
        return max(0, removed.rowcount)

    def add_segment(
        self, segment: Segment, readings: Iterable[Reading], passages: Iterable[tuple[Passage, str]] = ()
    ) -> None:
        """Takes note of a segment that is written, and of what is in it; readings that are known move there.

        Args:
            segment: The segment.
            readings: What is in it.
            passages: Named together with it, see `add_passages`: a search never meets a reading that no passage has.
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
            self._add_passages(connection, passages)

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

    def drop_unnamed(self) -> int:
        """Removes readings that no passage has, which an earlier finch-rag left; returns how many."""
        with self.transaction() as connection:
            return self._drop_unnamed(connection)

    def _drop_unnamed(self, connection: sqlite3.Connection) -> int:
        return connection.execute("DELETE FROM readings WHERE hash NOT IN (SELECT hash FROM passages)").rowcount

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
        rows = self._rows("SELECT MAX(seq) FROM sqlite_sequence WHERE name = 'segments' AND typeof(seq) = 'integer'")
        rows += self._rows("SELECT MAX(number) FROM segments")
        number = 1 + max((int(str(last)) for (last,) in rows if last is not None), default=0)
        if not 0 < number < _MOST_SEGMENTS:
            raise StoreError(f"the store's index {self.file} is damaged: its next segment would be {number}")
        return number

    def close(self) -> None:
        """Closes the database."""
        with self._lock:
            self._connection.close()


def _connected(file: Path, options: str) -> sqlite3.Connection:
    place = f"{file.absolute().as_uri()}?{options}"
    return sqlite3.connect(place, uri=True, timeout=_WAITS, check_same_thread=False, isolation_level=None)


def _readable(file: Path, connection: sqlite3.Connection) -> sqlite3.Connection:
    """A connection that reads also on a disk that cannot be written, where there can be no writer either.

    SQLite makes files beside the database, for its writer to see, unless it is told that nobody can change it.
    """
    try:
        connection.execute("SELECT 1 FROM sqlite_master").fetchall()
        return connection
    except sqlite3.OperationalError:
        written = file.with_name(f"{file.name}-wal")
        if os.access(file.parent, os.W_OK) or (written.exists() and written.stat().st_size):
            raise
    connection.close()
    return _connected(file, "mode=ro&immutable=1")


def _parts(items: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _passage(own: object, is_own: object, title: object, text: object, metadata: object) -> Passage:
    known = None
    if isinstance(metadata, str):
        with suppress(ValueError):
            known = parsed(metadata)
    if not (
        isinstance(own, str) and isinstance(text, str) and isinstance(title, str | None) and isinstance(known, dict)
    ):
        raise StoreError(f"the passage {str(own)[:60]!r} is damaged; `verify(repair=True)` removes what is damaged")
    return Passage(text, own if is_own else None, title, known)


def _as_json(passage: Passage) -> str:
    try:
        written = json.dumps(dict(passage.metadata), ensure_ascii=False, default=str, skipkeys=True)
        written.encode()  # half a surrogate pair is JSON, and nothing that SQLite takes
        return written
    except (TypeError, ValueError, RecursionError) as error:
        named = passage.id or passage.text[:40]
        raise StoreError(f"the metadata of {named!r} cannot be stored: {error}; use plain values") from error
