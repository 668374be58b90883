"""Requests of many callers on one model: what waits is read together, and all answers are generated in one batch.

One thread has the model; where nothing is asked for a minute it goes. Each turn it reads the passages of some of the
waiting requests, as many as there are free places and as a bounded number of tokens allows, so that those that run
already wait for a moment only; then it generates a token of every running answer. A request that fails, or is not
wanted any more, leaves the others alone.
"""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from ..answer import Answer
from ..answering import Begun, Written
from ..batch import read_together
from ..decode.detokenising import Stripped
from ..decode.running import RunningAnswer, RunningBatch
from ..errors import FinchError
from ..models.forward import memory_guard
from ..quotes.support import finished
from ..request import Cancellation, Cancelled, Request, no_progress
from ..runtime import Runtime

_IDLE = 60.0  # seconds; libraries keep buffers for each thread, so it is not a new one for every request
READ_TOKENS = 16_384  # of passages in one turn: a third of a second with 8 billion weights on one H100

_log = logging.getLogger(__name__)


class Listener(Protocol):
    """Is told what becomes of a request, in the scheduler's thread; must return soon."""

    def on_delta(self, text: str) -> None:
        """A piece of the answer."""

    def on_answer(self, answer: Answer) -> None:
        """The whole of it; the last call."""

    def on_error(self, error: BaseException) -> None:
        """What ended it early, `Cancelled` where it was not wanted any more; the last call."""


@dataclass(eq=False)
class _Job:
    """A request on its way.

    Attributes:
        request: What is asked.
        listener: Is told.
        begun: Its passages are read; None before.
        running: Takes part in the batch; None before.
        since: When its answer began, in seconds of the monotonic clock.
        text: Of the answer so far.
    """

    request: Request
    listener: Listener
    begun: Begun | None = None
    running: RunningAnswer | None = None
    since: float = 0.0
    stripped: Stripped = field(default_factory=Stripped)
    text: str = ""

    @property
    def cancelled(self) -> bool:
        return self.request.cancellation.is_cancelled()


class _NobodyWaits(Cancellation):
    """Of several requests that are read together: the reading ends when none of them is wanted any more."""

    def __init__(self, jobs: Sequence[_Job]) -> None:
        super().__init__()
        self._jobs = jobs

    def is_cancelled(self) -> bool:
        return all(job.cancelled for job in self._jobs)


class Scheduler:
    """Executes requests as they come. Safe to share between threads.

    Args:
        runtime: The model.
        running: The most answers that are generated side by side.
        read_tokens: The most tokens of passages that are read in one turn, if more than one request waits.
    """

    def __init__(self, runtime: Runtime, *, running: int = 16, read_tokens: int = READ_TOKENS) -> None:
        self._runtime = runtime
        self._most, self._read_tokens = running, read_tokens
        self._batch = RunningBatch(runtime.model, runtime.graphs, most=running, chunk_size=runtime.prompt_chunk_size)
        self._waiting: deque[_Job] = deque()
        self._taken: list[_Job] = []  # those that are read now
        self._jobs: dict[RunningAnswer, _Job] = {}
        self._untold: list[tuple[Listener, str]] = []  # pieces of answers
        self._changed = threading.Condition()
        self._has_thread = self._ending = False

    @property
    def waiting(self) -> int:
        """Requests of which nothing is read yet."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests that are read or answered."""
        return sum(job.running is None for job in self._taken) + len(self._jobs)

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values that the caches of running answers have room for."""
        jobs = list(self._jobs.values())
        return sum(job.begun.cache.bytes_per_token * job.running.tokens for job in jobs if job.begun and job.running)

    def submit(self, request: Request, listener: Listener) -> None:
        """Puts a request behind those that wait.

        Args:
            request: What is asked.
            listener: Is told of the answer.
        """
        with self._changed:
            self._waiting.append(_Job(request, listener))
            self._changed.notify_all()
            if not self._has_thread:
                self._has_thread = True
                atexit.register(self.close)  # torch aborts where Python ends while a thread computes
                threading.Thread(target=self._work, name="finch-scheduler", daemon=True).start()

    def close(self) -> None:
        """Cancels all requests, and waits for the end of the step under way."""
        with self._changed:
            for job in (*self._waiting, *self._taken, *self._jobs.values()):
                job.request.cancellation.cancel()
            self._ending = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._has_thread)
            self._ending = False

    def _work(self) -> None:
        while True:
            with self._changed:
                if not self._jobs:
                    self._changed.wait_for(lambda: self._waiting or self._ending, _IDLE)
                if not self._waiting and not self._jobs:
                    self._has_thread = False
                    atexit.unregister(self.close)
                    self._changed.notify_all()
                    return
                self._taken = self._next_to_read()
            try:
                self._read(self._taken)
                self._taken = []
                self._advance()
            except Exception as error:  # ours: every caller must hear of it, and the next ones be served
                _log.exception("a turn of the scheduler failed")
                self._give_up(error)

    def _next_to_read(self) -> list[_Job]:
        """Takes what is read in this turn from those that wait; those that are not wanted any more leave, too."""
        taken = [job for job in self._waiting if job.cancelled]
        for job in taken:
            self._waiting.remove(job)
        tokens = 0
        free = self._most - len(self._jobs)
        while self._waiting and free:
            tokens += _tokens_to_read(self._waiting[0].request)
            if tokens > self._read_tokens and free < self._most - len(self._jobs):
                break
            free -= 1
            taken.append(self._waiting.popleft())
        return taken

    def _read(self, jobs: Sequence[_Job]) -> None:
        """Reads passages, and lets the answers begin."""
        if jobs:
            self._tell()  # it takes long
        wanted: dict[int, list[_Job]] = {}
        for job in jobs:
            if job.cancelled:
                job.listener.on_error(Cancelled())
            else:
                wanted.setdefault(id(job.request.store), []).append(job)
        for together in wanted.values():
            self._read_together(together)

    def _read_together(self, jobs: Sequence[_Job]) -> None:
        """Reads for some requests; where that fails, for each alone, so that only those that fail by themselves do."""
        nobody_waits = _NobodyWaits(jobs)
        try:
            caches = read_together(
                self._runtime,
                [replace(job.request, cancellation=nobody_waits, on_progress=no_progress) for job in jobs],
            )
            with memory_guard(self._runtime.model, f"the answers to {len(jobs)} questions"):
                for job in jobs:
                    self._begin(job, Begun.of(job.request, caches.pop(0)))
        except Cancelled:
            for job in jobs:
                if job.begun is None:
                    job.listener.on_error(Cancelled())  # a new one: this one's frames hold what was read
        except Exception as error:  # of whatever kind: the others must be read
            rest = [job for job in jobs if job.begun is None]
            if len(jobs) > 1:
                for job in rest:
                    self._read_together([job])
                return
            if not isinstance(error, FinchError):
                _log.exception("a request failed")
            for job in rest:
                job.listener.on_error(error)

    def _begin(self, job: _Job, begun: Begun) -> None:
        request = job.request
        writer = self._runtime.writer(request.sampling)
        running = RunningAnswer(begun.cache, request.answer_prompt, writer, request.sampling.max_new_tokens)
        job.begun, job.running, job.since = begun, running, time.perf_counter()
        self._jobs[running] = job
        self._batch.join(running)

    def _advance(self) -> None:
        """Generates a token of each answer."""
        for running, job in list(self._jobs.items()):
            if job.cancelled:
                self._batch.leave(running)
                self._end(job, Cancelled())
        ended = []
        # A GPU computes while listeners take up what they are told; without one nothing would be gained by waiting.
        overlapped = self._runtime.graphs.enabled
        meanwhile = self._tell if overlapped else _nothing
        for running, delta in self._batch.step(meanwhile) if self._jobs else ():
            job = self._jobs[running]
            if running.error is not None:
                self._end(job, running.error)
                continue
            if shown := job.stripped.push(delta):
                job.text += shown
                if job.request.min_support is None:  # else it may have to be withheld
                    self._untold.append((job.listener, shown))
            if running.ended:
                ended.append(job)
        if ended or not overlapped:
            self._tell()
        self._finish(ended)

    def _tell(self) -> None:
        """Tells the listeners of the pieces that they do not know yet."""
        untold, self._untold = self._untold, []
        for listener, piece in untold:
            listener.on_delta(piece)

    def _finish(self, jobs: Sequence[_Job]) -> None:
        """Tells answers that have ended, with what they rest on."""
        now = time.perf_counter()
        written = [
            job.begun.written(job.text, job.running.writer, now - job.since)
            for job in jobs
            if job.begun is not None and job.running is not None
        ]
        for job, result in zip(jobs, self._finished(written), strict=True):
            if isinstance(result, Answer) and job.request.min_support is not None and result.text:
                job.listener.on_delta(result.text)
            self._end(job, result)

    def _finished(self, written: Sequence[Written]) -> list[Answer | FinchError]:
        """Answers with what they rest on, looked at together; where that fails, each alone."""
        try:
            return [*finished(self._runtime, written)] if written else []
        except FinchError as error:
            return [error] if len(written) == 1 else [found for each in written for found in self._finished([each])]

    def _end(self, job: _Job, result: Answer | BaseException) -> None:
        self._tell()  # its last piece, before its end
        if job.running is not None:
            self._jobs.pop(job.running, None)
        if isinstance(result, Answer):
            job.listener.on_answer(result)
        else:
            job.listener.on_error(result)

    def _give_up(self, error: Exception) -> None:
        """Fails all that is under way."""
        for job in [job for job in self._taken if job.running is None]:
            job.listener.on_error(error)
        self._taken = []
        self._batch.close()
        for job in list(self._jobs.values()):
            self._end(job, error)


def _nothing() -> None:
    """There is nothing to do meanwhile."""


def _tokens_to_read(request: Request) -> int:
    """Tokens of passages that a request makes the model read; what a store knows is not read again."""
    tokens = sum(request.passage_tokens)
    budget = tokens if request.plan is None else request.plan.budget
    return min(tokens, budget) if request.store is not None else tokens
