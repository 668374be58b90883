"""What came out of an attack."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from finch_rag.errors import FinchError

RECOVERED, CLEAR, WRONG, RAW = "recovered", "one clear line", "wrong", "raw"
OUTCOMES = (RECOVERED, CLEAR, WRONG, RAW)
_EXAMPLES = 5


@dataclass
class Tally:
    """How often something was tried, and what came out.

    Attributes:
        what: Was injected.
        counts: How often each of `OUTCOMES` came out: right all the same; one line of a FinchError; a wrong or missing
            result; any other error, or a hang.
        examples: Of what is not right.
    """

    what: str
    counts: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    @property
    def tried(self) -> int:
        """How often."""
        return self.counts.total()

    @property
    def bad(self) -> int:
        """How often the outcome was wrong or raw."""
        return self.counts[WRONG] + self.counts[RAW]

    def note(self, outcome: str, example: object = "") -> None:
        """Counts an outcome.

        Args:
            outcome: One of `OUTCOMES`.
            example: What it was.
        """
        self.counts[outcome] += 1
        if outcome in (WRONG, RAW) and len(self.examples) < _EXAMPLES:
            self.examples.append(f"{outcome}: {example}")

    def expect(self, tried: Callable[[], object], right: object) -> None:
        """Tries something, and counts what comes out.

        Args:
            tried: What to do.
            right: Its right result.
        """
        with self.judged():
            found = tried()
            self.note(RECOVERED if found == right else WRONG, f"{found!r} in place of {right!r}")

    @contextmanager
    def judged(self) -> Iterator[None]:
        """Counts an error of the block: a FinchError, which is one line always, is clear, any other is raw."""
        try:
            yield
        except FinchError:
            self.note(CLEAR)
        except Exception as error:
            self.note(RAW, f"{type(error).__name__}: {error}")

    def row(self, last: str) -> str:
        """A row of a table: what, how often, each outcome, and a last cell."""
        return f"| {self.what} | {self.tried:,} | {' | '.join(f'{self.counts[o]:,}' for o in OUTCOMES)} | {last} |"
