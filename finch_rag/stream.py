"""An answer that arrives in pieces."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING

from .errors import InputError
from .report import Answer, citations, report

if TYPE_CHECKING:
    from .cache import CompressedCache
    from .decode import Decoder


class AnswerStream(Iterator[str]):
    """Text deltas of an answer; afterwards ``answer`` has the whole of it with citations and report.

    Closing it, leaving its ``with`` block or dropping it ends the generation and frees the cache.

    Args:
        open_cache: Gives the cache that holds the passages; called when the first delta is asked for.
        decoder: Starts the generation on a copy of that cache.
        prompt_tokens: Tokens that the decoder reads before the answer.
        max_new_tokens: The most tokens of the answer.
    """

    def __init__(
        self,
        open_cache: Callable[[], CompressedCache],
        decoder: Callable[[CompressedCache], Decoder],
        prompt_tokens: int,
        max_new_tokens: int,
    ) -> None:
        self._answer: Answer | None = None
        self._deltas = self._run(open_cache, decoder, prompt_tokens, max_new_tokens)

    def _run(
        self,
        open_cache: Callable[[], CompressedCache],
        decoder: Callable[[CompressedCache], Decoder],
        prompt_tokens: int,
        max_new_tokens: int,
    ) -> Generator[str, None, None]:
        cache = open_cache()
        cited, read = citations(cache, kept_only=True), report(cache, prompt_tokens)
        started = time.perf_counter()
        seconds = 0.0
        cache = cache.fork(prompt_tokens + max_new_tokens)  # frees the room that reading needed
        running = decoder(cache)
        text = ""
        for delta in running:
            text += delta
            seconds += time.perf_counter() - started  # not the reader's own time between two deltas
            yield delta
            started = time.perf_counter()
        seconds += time.perf_counter() - started
        self._answer = Answer(
            text,
            cited,
            replace(read, decode_seconds=seconds, new_tokens=len(running.token_ids), stop_reason=running.stop_reason),
        )

    def __next__(self) -> str:
        return next(self._deltas)

    def read(self) -> Answer:
        """Runs to the end and returns the answer."""
        for _ in self._deltas:
            pass
        return self.answer

    @property
    def answer(self) -> Answer:
        """The whole answer.

        Raises:
            InputError: If the stream has not come to its end.
        """
        if self._answer is None:
            raise InputError("the stream has no answer yet: iterate it to its end first")
        return self._answer

    def close(self) -> None:
        """Ends the generation and frees the cache."""
        self._deltas.close()

    def __enter__(self) -> AnswerStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
