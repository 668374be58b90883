"""What the fuzz targets share: bytes as texts and choices, and what counts as a finding."""

from __future__ import annotations

import importlib
import resource
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from finch_rag.errors import FinchError

MOST_BYTES = 4096  # of an input
MOST_SECONDS = 1.0  # of computing for one input
MOST_MEMORY = 256 << 20  # bytes that one input may add to the most that the process ever had
SEEDS = Path(__file__).parent / "seeds"

_STUCK = 10.0  # seconds of computing after which an input is given up
_MARK = "\x01"  # what a word's number follows

Item = TypeVar("Item")


class Finding(AssertionError):  # noqa: N818 - it is what is looked for
    """What must not be: a wrong result, or one that took too long or too much."""


class _StuckError(BaseException):
    """An input is not done with; no ``except Exception`` takes it for something else."""


def text_of(data: bytes, words: Sequence[str] = ()) -> str:
    """Bytes as a text: UTF-8, in which a mark and one more character stand for a word.

    Args:
        data: Any bytes.
        words: What a format is made of, so that it is found sooner than letter by letter.
    """
    first, *rest = data.decode("utf-8", errors="replace").split(_MARK)
    return first + "".join(words[ord(part[0]) % len(words)] + part[1:] if part and words else part for part in rest)


def dictionary(words: Sequence[str]) -> list[bytes]:
    """What a fuzzer puts in for words, see `text_of`.

    Args:
        words: As there.
    """
    numbers = (len(words) + 1 if chr(number) == _MARK else number for number in range(len(words)))
    return [f"{_MARK}{chr(number)}".encode() for number in numbers]


class Choices:
    """Bytes as a row of choices; zeros follow where they end.

    Args:
        data: Any bytes.
    """

    def __init__(self, data: bytes) -> None:
        self._data, self._place = data, 0

    @property
    def left(self) -> bool:
        """Whether there are bytes left."""
        return self._place < len(self._data)

    def number(self, below: int) -> int:
        """A number from 0, of as few bytes as it needs."""
        size = max(1, ((below - 1).bit_length() + 7) // 8)
        return int.from_bytes(self.take(size).ljust(size, b"\0"), "little") % below

    def one_of(self, items: Sequence[Item]) -> Item:
        """One of some things."""
        return items[self.number(len(items))]

    def take(self, size: int) -> bytes:
        """The next bytes, as many as there are."""
        taken = self._data[self._place : self._place + size]
        self._place += size
        return taken

    def rest(self) -> bytes:
        """All that is left."""
        return self.take(max(0, len(self._data) - self._place))


@contextmanager
def only(*allowed: type[Exception]) -> Iterator[None]:
    """Lets errors pass that are meant for users; each of Finch's is one line.

    Args:
        allowed: Beside Finch's own.
    """
    try:
        yield
    except FinchError as error:
        if not str(error).strip() or "\n" in str(error):
            raise Finding(f"{type(error).__name__} is not one line: {str(error)!r}") from error
    except allowed:
        pass


def holds(condition: bool, what: str) -> None:
    """Raises a `Finding` where something is not so.

    Args:
        condition: Whether it is.
        what: Is not.
    """
    if not condition:
        raise Finding(what)


def tried(check: Callable[[bytes], None], data: bytes) -> None:
    """Tries one input.

    Args:
        check: Of a target.
        data: The input.

    Raises:
        Finding: If it took too long, or too much memory, or something is wrong.
        Exception: Whatever a user would have seen.
    """
    before, started = _memory(), time.process_time()

    def stuck(number: int, frame: FrameType | None) -> None:
        where = "".join(traceback.format_stack(frame, 4)) if frame else ""
        raise _StuckError(f"not done after {_STUCK:g} s, at\n{where}")

    earlier = signal.signal(signal.SIGPROF, stuck)
    signal.setitimer(signal.ITIMER_PROF, _STUCK)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check(data)
    except _StuckError as error:
        raise Finding(str(error)) from None
    except (Exception, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of a Rust library
        raise Finding(f"{type(error).__name__}: {error}") from error
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, earlier)
    seconds, grown = time.process_time() - started, _memory() - before
    most = MOST_SECONDS * max(1.0, len(data) / MOST_BYTES)
    holds(seconds <= most, f"{len(data)} bytes took {seconds:.1f} s, the most is {most:.1f} s")
    holds(grown <= MOST_MEMORY, f"{len(data)} bytes took {grown >> 20} MiB, the most is {MOST_MEMORY >> 20} MiB")


def _memory() -> int:
    """Bytes that the process had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@dataclass(frozen=True, slots=True)
class Target:
    """What is fuzzed.

    Attributes:
        name: Its module here.
        covers: Modules whose branches steer the fuzzer.
        size: The most bytes of an input.
    """

    name: str
    covers: tuple[str, ...]
    size: int = MOST_BYTES

    @property
    def check(self) -> Callable[[bytes], None]:
        """Tries an input; any error is a finding."""
        check: Callable[[bytes], None] = self._module.check
        return check

    @property
    def words(self) -> Sequence[bytes]:
        """What the fuzzer may put in."""
        words: Sequence[bytes] = getattr(self._module, "DICTIONARY", ())
        return words

    def seeds(self) -> dict[str, bytes]:
        """Inputs to begin with, by name: those that are made, and those that once found something."""
        made: list[bytes] = self._module.seeds()
        kept = sorted((SEEDS / self.name).glob("*"))
        return {f"made {n}": data for n, data in enumerate(made)} | {file.name: file.read_bytes() for file in kept}

    @property
    def _module(self) -> Any:
        return importlib.import_module(f"tests.fuzz.{self.name}")
