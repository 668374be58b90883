"""Tokens -> text that is shown as it is made: half characters, stop strings and trailing white space wait."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing


class Stripped:
    """Deltas -> deltas whose sum is the stripped sum of theirs: white space waits until text follows it."""

    def __init__(self) -> None:
        self._held, self._started = "", False

    def push(self, delta: str) -> str:
        """What can be shown now, maybe nothing."""
        text = self._held + delta if self._started else delta.lstrip()
        shown = text.rstrip()
        self._held = text[len(shown) :]
        self._started = self._started or bool(shown)
        return shown


def strip_stream(deltas: Generator[str, None, None]) -> Generator[str, None, None]:
    """The deltas that `Stripped` makes of others, without empty ones. Closing it closes ``deltas``."""
    stripped = Stripped()
    with closing(deltas):  # by name: Python 3.12 keeps a closed generator's variables alive
        for delta in deltas:
            if shown := stripped.push(delta):
                yield shown


class TextStream:
    """Tokens -> text deltas whose sum is the decoded text.

    A delta is held back while its end may be half a character (a multi-byte character can be split over tokens).
    Only a short window of tokens is decoded at each step, so a long answer costs linear time.

    Args:
        detokenise: Token ids -> text.
    """

    def __init__(self, detokenise: Callable[[Sequence[int]], str]) -> None:
        self._detokenise = detokenise
        self._tokens: list[int] = []
        self._window = 0  # first token that is decoded again: a token's text can depend on the one before it
        self._shown = 0  # tokens whose text has been handed out

    def push(self, token: int) -> str:
        """The text that became certain with this token."""
        self._tokens.append(token)
        delta = self._delta()
        if not delta or delta.endswith("\ufffd"):
            return ""
        self._window, self._shown = self._shown, len(self._tokens)
        return delta

    def flush(self) -> str:
        """The text held back, at the end."""
        delta = self._delta()
        self._window = self._shown = len(self._tokens)
        return delta

    def _delta(self) -> str:
        known = self._detokenise(self._tokens[self._window : self._shown])
        return self._detokenise(self._tokens[self._window :])[len(known) :]


class StopStrings:
    """Ends a stream of text before the first stop string, also when it arrives in pieces.

    Args:
        stops: The stop strings.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""  # text that may be the start of a stop string
        self.stopped = False

    def push(self, text: str) -> str:
        """The part of the text so far that can be shown."""
        self._held += text
        found = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            shown, self._held = self._held[: min(found)], ""
            return shown
        hold = max((self._overlap(stop) for stop in self._stops), default=0)
        cut = len(self._held) - hold
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def flush(self) -> str:
        """The text held back, at the end."""
        shown, self._held = self._held, ""
        return shown

    def _overlap(self, stop: str) -> int:
        """Characters at the end of the held text that a stop string starts with."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if stop.startswith(self._held[-n:])), 0)
