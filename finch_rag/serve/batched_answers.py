"""Answers of an engine, generated in one running batch by a scheduler."""

from __future__ import annotations

import asyncio
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence

from ..answer import Answer
from ..engine import Finch
from ..errors import InputError
from ..prompts.chat_template import Message
from ..prompts.passages import Passage
from ..request import Cancelled, Request
from ..settings import CallOptions
from ..streaming import in_thread
from .places import Place, Places
from .scheduler import Scheduler

_Piece = str | Answer | BaseException

_LAST_STEP = 5.0  # seconds that cancelled answers get to end their step


class BatchedAnswers:
    """Generates answers side by side; see `finch_rag.serve.answers.Answers`.

    Args:
        finch: The engine.
        running: The most answers at once.
        waiting: The most requests that wait.
    """

    def __init__(self, finch: Finch, *, running: int, waiting: int) -> None:
        self._finch = finch
        self._places = Places(running, waiting, "answers")
        self._scheduler = Scheduler(finch.runtime, running=running)
        self._alive: weakref.WeakSet[BatchedPieces] = weakref.WeakSet()
        self._mail: _Mail | None = None

    @property
    def running(self) -> int:
        """Answers that are being made."""
        return self._places.running

    @property
    def waiting(self) -> int:
        """Requests that wait for their turn."""
        return self._places.waiting

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values of the answers that are being made."""
        return self._scheduler.cache_bytes

    def ask(self, question: str, passages: Sequence[Passage], options: CallOptions) -> BatchedPieces:
        """The answer to a question.

        Args:
            question: The question.
            passages: What is read.
            options: Of the call.

        Raises:
            BusyError: If too many wait.
        """
        return self._pieces(lambda: self._finch.stream(question, passages, **options).request)

    def chat(
        self, messages: str | Sequence[Message], passages: Sequence[Passage], options: CallOptions
    ) -> BatchedPieces:
        """The answer to a conversation.

        Args:
            messages: The conversation, or a prompt.
            passages: What is read.
            options: Of the call.

        Raises:
            BusyError: If too many wait.
        """
        return self._pieces(lambda: self._finch.stream_chat(messages, passages, **options).request)

    def _pieces(self, resolve: Callable[[], Request]) -> BatchedPieces:
        loop = asyncio.get_running_loop()
        if self._mail is None or self._mail.loop is not loop:
            self._mail = _Mail(loop)
        pieces = BatchedPieces(self._places.admit(), resolve, self._scheduler, self._mail)
        self._alive.add(pieces)
        return pieces

    async def close(self, timeout: float) -> None:
        """Finishes what runs and waits, and cancels what is left of it then.

        Args:
            timeout: The most seconds to wait.
        """
        for seconds in (timeout, _LAST_STEP):
            try:
                async with asyncio.timeout(seconds):
                    await self._places.emptied()
                break
            except TimeoutError:
                for pieces in list(self._alive):
                    pieces.cancel()
        await asyncio.get_running_loop().run_in_executor(None, self._scheduler.close)


class BatchedPieces(AsyncIterator[str]):
    """An answer that begins when its turn comes; see `finch_rag.serve.answers.AnswerPieces`.

    Args:
        place: Where it waits and runs.
        resolve: Makes the request, which takes a thread: long texts become tokens, a store may be searched.
        scheduler: Executes it.
        mail: From the scheduler's thread to the event loop that awaits the answer.
    """

    def __init__(self, place: Place, resolve: Callable[[], Request], scheduler: Scheduler, mail: _Mail) -> None:
        self._place, self._resolve, self._scheduler, self._mail = place, resolve, scheduler, mail
        self._request: Request | None = None
        self._told: _Told | None = None
        self._cancelled = False
        self._answer: Answer | None = None

    async def __anext__(self) -> str:
        if self._told is None and not (await self._place.turn() and await self._begin()):
            raise StopAsyncIteration
        try:
            return await self._next_piece()
        except asyncio.CancelledError:
            self.cancel()
            raise

    async def _begin(self) -> bool:
        """Hands the request to the scheduler; False if nobody wants it any more."""
        self._request = await in_thread(self._resolve, self.cancel)
        if self._cancelled:
            return False
        self._told = _Told(self._mail)
        self._scheduler.submit(self._request, self._told)
        return True

    async def _next_piece(self) -> str:
        if self._told is None or self._cancelled or self._answer is not None:
            raise StopAsyncIteration
        piece = await self._told.pieces.get()
        if isinstance(piece, str):
            return piece
        self._told.pieces.put_nowait(piece)  # whoever asks again hears the same
        if isinstance(piece, Answer):
            self._answer = piece
        if isinstance(piece, (Answer, Cancelled)):
            raise StopAsyncIteration
        raise piece

    @property
    def answer(self) -> Answer:
        """The whole answer.

        Raises:
            InputError: If it has not come to its end.
        """
        if self._answer is None:
            raise InputError("the answer has not come to its end: iterate it first")
        return self._answer

    def cancel(self) -> None:
        """Ends it within one step; at once where it waits."""
        self._cancelled = True
        if self._request is not None:
            self._request.cancellation.cancel()
        if self._place.started is None:
            self._place.leave()

    async def aclose(self) -> None:
        """Ends it, and leaves its place once the step under way is over."""
        try:
            self.cancel()
            if self._told is not None:
                await self._told.over.wait()
        finally:
            self._place.leave()


class _Mail:
    """Takes pieces of answers from the scheduler's thread to an event loop.

    However many come at once wake it up once: each time the two threads would wait for each other.

    Args:
        loop: The event loop.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._pieces: deque[tuple[_Told, _Piece]] = deque()
        self._under_way = False

    def send(self, told: _Told, piece: _Piece) -> None:
        """Hands a piece over, in any thread.

        Args:
            told: Who gets it, in the event loop.
            piece: The piece.
        """
        self._pieces.append((told, piece))
        if self._under_way:
            return
        self._under_way = True
        try:
            self.loop.call_soon_threadsafe(self._deliver)
        except RuntimeError:  # the loop is closed: nobody listens any more
            return

    def _deliver(self) -> None:
        self._under_way = False  # first: what comes from now on wakes it up again
        while self._pieces:
            told, piece = self._pieces.popleft()
            told.put(piece)


class _Told:
    """Hears the scheduler's thread, and tells an event loop.

    Args:
        mail: To the event loop.

    Attributes:
        pieces: Of the answer; last the answer itself, or what ended it.
        over: Whether the scheduler is done with it.
    """

    def __init__(self, mail: _Mail) -> None:
        self._mail = mail
        self.pieces: asyncio.Queue[_Piece] = asyncio.Queue()
        self.over = asyncio.Event()

    def on_delta(self, text: str) -> None:
        """See `finch_rag.serve.scheduler.Listener`."""
        self._mail.send(self, text)

    def on_answer(self, answer: Answer) -> None:
        """See `finch_rag.serve.scheduler.Listener`."""
        self._mail.send(self, answer)

    def on_error(self, error: BaseException) -> None:
        """See `finch_rag.serve.scheduler.Listener`."""
        self._mail.send(self, error)

    def put(self, piece: _Piece) -> None:
        """Takes a piece, in the event loop.

        Args:
            piece: The piece.
        """
        self.pieces.put_nowait(piece)
        if not isinstance(piece, str):
            self.over.set()
