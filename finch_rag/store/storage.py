"""Where a store keeps what it has read: head keys in segments, and the index of them, changed together."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from ..errors import StoreError
from ..prefill.head_keys import KeyBlock
from ..prompts.passages import Passage
from .index import Reading, Segment, StoreIndex
from .segments import FileSegments, Keys, MemorySegments, Segments, joined

INDEX = "index.sqlite3"  # in a store's folder
SMALL_SEGMENT = 4096  # tokens: a smaller one is joined to the next that is written

_DEVICE_SHARE = 0.25  # of a device's free memory that head keys of files may take there

Blocks = Mapping[int, tuple[list[Reading], KeyBlock]]  # a segment's number -> what it has


class Storage:
    """Segments and index, in a folder or in memory. One process writes a folder, any number reads it.

    A segment is written before the index names it, and dropped after the index has forgotten it. So a process that dies
    leaves at most a file that nobody knows, which the next writer drops.

    Args:
        folder: Made if it is missing; None keeps all in memory.
        about: What all head keys depend on, see `StoreIndex`; None takes a folder's as they are.
        writes: Whether it may be changed.
        layout: Groups and head_dim of its keys, where they are known.

    Attributes:
        index: What is known.

    Raises:
        StoreError: If the folder cannot be opened, has another writer, or holds another kind of keys.
    """

    def __init__(
        self,
        folder: Path | None,
        about: Mapping[str, str] | None,
        *,
        writes: bool,
        layout: tuple[int, int] | None = None,
    ) -> None:
        self._folder, self.writes, self._layout = folder, writes, layout
        self._writer: FileLock | None = None
        self._blocks: Blocks | None = None
        self._version = -1
        self._used: dict[str, float] = {}  # when
        self._segments: Segments
        if folder is None:
            self._segments = MemorySegments()
            self.index = StoreIndex(None, about, writes=True)
            return
        self.index = self._open_folder(folder, about)
        self._segments = FileSegments(folder)
        if writes:
            try:
                self._segments.keep_only(self.index.segment_numbers())
            except BaseException:
                self.close()
                raise

    def _open_folder(self, folder: Path, about: Mapping[str, str] | None) -> StoreIndex:
        file = folder / INDEX
        try:
            is_there = file.is_file()
        except OSError as error:  # a folder that may not be entered
            raise StoreError(f"the store in {folder} cannot be read: {error.strerror}; allow it") from error
        if (about is None or not self.writes) and not is_there:
            raise StoreError(
                f"there is no store in {folder}: `finch-rag index`, or open_store without read_only, makes one"
            )
        if not self.writes:
            return StoreIndex(file, about, writes=False)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._writer = FileLock(folder / "writer.lock", thread_local=False)  # any thread may close it
            self._writer.acquire(timeout=0)
        except Timeout as error:
            raise StoreError(
                f"another process or engine writes to the store in {folder}: close it there, or open it here with "
                "read_only=True"
            ) from error
        except OSError as error:
            raise StoreError(
                f"the store in {folder} cannot be written: {error.strerror or error}; open it with read_only=True"
            ) from error
        try:
            return StoreIndex(file, about, writes=True)
        except BaseException:
            self._writer.release()
            raise

    def write(
        self, hashes: Sequence[str], lengths: Sequence[int], keys: Keys, passages: Iterable[tuple[Passage, str]]
    ) -> None:
        """Keeps head keys as a segment, together with those of a small one before it, and names what has them.

        Args:
            hashes: Of the readings.
            lengths: Tokens of each.
            keys: Of all of them.
            passages: That have these readings, with their hashes.

        Raises:
            StoreError: If they cannot be written; then nothing has changed.
        """
        segments = self.index.segments()
        before = [segments[-1].number] if segments and segments[-1].tokens < SMALL_SEGMENT else []
        moved = [reading for reading in self.index.readings() if reading.segment in before]
        if moved:
            old = self._read(segments[-1])
            parts = [old.part(reading.start, reading.start + reading.tokens) for reading in moved]
            keys = joined([*(_on(part, keys.keys.device) for part in parts), keys])
        self._keep([*(r.hash for r in moved), *hashes], [*(r.tokens for r in moved), *lengths], keys, before, passages)

    def name(self, passages: Iterable[tuple[Passage, str]]) -> None:
        """Names passages whose readings are there, see `StoreIndex.add_passages`.

        Args:
            passages: With their hashes.

        Raises:
            StoreError: If they cannot be written; then nothing has changed.
        """
        before = self.change()
        if not self.index.add_passages(passages):
            self._blocks = before

    def drop_unnamed(self) -> None:
        """Removes readings that no passage has, so that no search meets them."""
        before = self.change()
        if not self.index.drop_unnamed():
            self._blocks = before

    def change(self) -> Blocks | None:
        """Called before a change, which may be interrupted right behind its commit: the next search looks anew.

        Returns:
            What searches have looked at.
        """
        before, self._blocks = self._blocks, None
        return before

    def _keep(
        self,
        hashes: Sequence[str],
        lengths: Sequence[int],
        keys: Keys,
        replaced: Sequence[int],
        passages: Iterable[tuple[Passage, str]] = (),
    ) -> None:
        number = self.index.next_segment()
        checksum = self._segments.write(number, keys)
        starts = [0]
        for length in lengths:
            starts.append(starts[-1] + length)
        readings = [
            Reading(key, number, start, length) for key, start, length in zip(hashes, starts, lengths, strict=False)
        ]
        self.change()
        try:
            self.index.add_segment(Segment(number, starts[-1], keys.nbytes, checksum), readings, passages)
        except StoreError:  # after Ctrl-C it may be committed; else the next writer drops the file
            self._segments.delete(number)
            raise
        self._forget(replaced)

    def _forget(self, numbers: Sequence[int]) -> None:
        if numbers:
            self.index.remove_segments(numbers)
            for number in numbers:
                self._segments.delete(number)

    def evict(self, most_tokens: int, keep: set[str]) -> None:
        """Removes the least recently used passages until the rest fits.

        Args:
            most_tokens: Tokens of all passages together.
            keep: Hashes of passages that stay in any case.
        """
        self.touch()
        over = sum(reading.tokens for reading in self.index.readings()) - most_tokens
        gone: list[str] = []
        for key, tokens in self.index.least_recently_used():
            if over <= 0:
                break
            if key not in keep:
                gone.append(key)
                over -= tokens
        if gone:
            self.change()
            self.index.remove_readings(gone)
            self.compact()

    def compact(self) -> None:
        """Writes segments anew of which less than half is left; drops those of which nothing is."""
        self.change()
        left: dict[int, list[Reading]] = {}
        for reading in self.index.readings():
            left.setdefault(reading.segment, []).append(reading)
        for segment in self.index.segments():
            readings = left.get(segment.number, [])
            tokens = sum(reading.tokens for reading in readings)
            if not readings:
                self._forget([segment.number])
            elif 2 * tokens < segment.tokens:
                old = self._read(segment)
                keys = joined([old.part(r.start, r.start + r.tokens) for r in readings])
                keys = Keys(keys.keys.clone(), None if keys.scales is None else keys.scales.clone())
                self._keep([r.hash for r in readings], [r.tokens for r in readings], keys, [segment.number])

    def clear(self) -> None:
        """Removes all passages."""
        self.check_writes()
        self.change()
        self.index.remove_passages(self.index.ids())
        self.compact()

    def use(self, hashes: Iterable[str]) -> None:
        """Takes note that readings are used; written down by `touch`.

        Args:
            hashes: Of the readings.
        """
        self._used.update(dict.fromkeys(hashes, time.time()))

    def touch(self) -> None:
        """Writes down what was used."""
        if self._used and self.writes:
            self.index.touch(self._used)
            self._used = {}

    def blocks(self, device: torch.device) -> Blocks:
        """All head keys, segment by segment, as they are now; another process may have written.

        Args:
            device: Where they are looked at; as many as fit well are kept there.

        Raises:
            StoreError: If they cannot be read.
        """
        version = self.index.version()
        if self._blocks is None or version != self._version:
            for attempt in range(3):
                try:
                    self._blocks = self._read_blocks(device)
                    break
                except StoreError:  # a segment that the writer has replaced since
                    if attempt == 2 or self.writes:
                        raise
            self._version = version
        return self._blocks or {}

    def _read_blocks(self, device: torch.device) -> Blocks:
        by_segment: dict[int, list[Reading]] = {}
        for reading in self.index.readings():
            by_segment.setdefault(reading.segment, []).append(reading)
        room = _room_on(device)
        segments = {segment.number: segment for segment in self.index.segments()}
        found = {}
        for number, readings in by_segment.items():
            if number not in segments:  # another process has just replaced it
                raise StoreError(f"the segment {number} of the store in {self._folder} is gone: ask again")
            keys = part_of(self._read(segments[number]), readings)
            if keys.keys.device != device and keys.nbytes <= room:
                room -= keys.nbytes
                keys = _on(keys, device)
            found[number] = readings, KeyBlock(keys.keys, keys.scales, [reading.tokens for reading in readings])
        return found

    def _read(self, segment: Segment) -> Keys:
        """A segment's keys, in the shape that the index says; their numbers are not looked at.

        Raises:
            StoreError: If they cannot be read, or are others.
        """
        keys = self._segments.read(segment.number)
        shape = tuple(keys.keys.shape)
        layout = self._layout or (shape[:1] + shape[2:])
        if not keys.is_sound or shape != (layout[0], segment.tokens, layout[1]) or keys.nbytes != segment.bytes:
            raise _damaged(segment, self._folder, f"its keys are {keys.keys.dtype} {list(shape)}")
        return keys

    def check_numbers(self) -> None:
        """Raises a StoreError if head keys are NaN or infinite; reads all of them."""
        for segment in self.index.segments():
            if not self._read(segment).is_finite:
                raise _damaged(segment, self._folder, "it holds NaN or infinity")

    def verify(self, repair: bool = False) -> list[str]:
        """Reads all head keys and compares them with their checksums.

        Args:
            repair: Remove passages whose keys are damaged, so that they are read again when they are added again.

        Returns:
            The ids of passages whose keys are damaged or missing; empty where all is well.
        """
        self._layout = self._layout or self._usual_layout()
        bad = {segment.number for segment in self.index.segments() if not self._is_whole(segment)}
        damaged = self.index.damaged(bad)
        if repair and (self.writes or bad or damaged):
            self.check_writes()
            self.change()
            self.index.remove_damaged(damaged, bad)
            for number in bad:
                self._segments.delete(number)
        return list(damaged.values())

    def _usual_layout(self) -> tuple[int, int] | None:
        """Groups and head_dim of most segments; None where there is none that can be read."""
        found: Counter[tuple[int, int]] = Counter()
        for segment in self.index.segments():
            with suppress(StoreError):
                keys = self._read(segment).keys
                found[keys.shape[0], keys.shape[2]] += 1
        return found.most_common(1)[0][0] if found else None

    def _is_whole(self, segment: Segment) -> bool:
        try:
            return self._read(segment).is_finite and self._segments.checksum(segment.number) == segment.checksum
        except StoreError:
            return False

    def check_writes(self) -> None:
        """Raises a StoreError if it is open to be read only."""
        if not self.writes:
            raise StoreError(f"the store in {self._folder} is open read-only: open it without read_only to change it")

    def close(self) -> None:
        """Writes down what was used, and lets go of the folder."""
        with suppress(StoreError):
            self.touch()
        self._blocks = None
        self.index.close()
        if self._writer is not None:
            self._writer.release()


def _damaged(segment: Segment, folder: Path | None, what: str) -> StoreError:
    return StoreError(
        f"the segment {segment.number} of the store in {folder} is damaged, {what}: `verify(repair=True)` removes what "
        "is damaged"
    )


def part_of(keys: Keys, readings: Sequence[Reading]) -> Keys:
    """Head keys of readings of one segment, without copying where they stand side by side.

    Args:
        keys: Of the segment.
        readings: With their places there, ascending.
    """
    runs: list[list[int]] = []
    for reading in readings:
        if runs and runs[-1][1] == reading.start:
            runs[-1][1] += reading.tokens
        else:
            runs.append([reading.start, reading.start + reading.tokens])
    return joined(keys.part(start, stop) for start, stop in runs)


def _on(keys: Keys, device: torch.device) -> Keys:
    return Keys(keys.keys.to(device), None if keys.scales is None else keys.scales.to(device))


def _room_on(device: torch.device) -> float:
    """Bytes of head keys that may be kept on a device."""
    return _DEVICE_SHARE * torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0.0
