"""Servers in tests: in process, or behind uvicorn on loopback; and answers that a test steers."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastapi.testclient import TestClient

from finch_rag import Answer, Finch, Passage
from finch_rag.serve.answers import Answers
from finch_rag.serve.app import make_app
from finch_rag.serve.server import Server
from finch_rag.serve.settings import ServeSettings
from finch_rag.settings import CallOptions

from ..small import small_finch

QUESTION = "When was the lighthouse built?"
ASKED = [{"role": "user", "content": QUESTION}]
DOCUMENTS = [
    {"id": "light", "title": "Lighthouse", "text": "The lighthouse was lit in 1902. It stands on a rock."},
    {"id": "harbour", "text": "The harbour was built in 1874.", "url": "https://example.org/harbour"},
    {"id": "museum", "text": "The museum opened in 1931."},
]
PASSAGES = [
    Passage(DOCUMENTS[0]["text"], "light", "Lighthouse"),
    Passage(DOCUMENTS[1]["text"], "harbour", metadata={"url": DOCUMENTS[1]["url"]}),
    Passage(DOCUMENTS[2]["text"], "museum"),
]
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
PATIENCE = 20.0  # seconds for what takes a moment; a test that needs them fails


def served_finch(**settings: Any) -> Finch:
    """A small engine that opens stores without looking for heads."""
    return small_finch(**{"alone_heads": [(0, 1), (1, 2)], **settings})


@contextmanager
def client_of(
    finch: Finch, stores: Path | None = None, answers: Answers | None = None, **settings: Any
) -> Iterator[TestClient]:
    """A client of a server in this process."""
    with TestClient(make_app(finch, ServeSettings(stores=stores, **settings), answers)) as client:
        yield client


class Live:
    """A server behind uvicorn, in a thread.

    Attributes:
        server: The server.
        url: Where it listens.
    """

    def __init__(self, finch: Finch, answers: Answers | None = None, **settings: Any) -> None:
        self._ready = threading.Event()
        app = make_app(finch, ServeSettings(**settings), answers)
        self.server = Server(app, host="127.0.0.1", port=0, on_ready=self._listens)
        self.service = app.state.service
        self.url = ""
        self._thread = threading.Thread(target=self.server.run, daemon=True)

    def _listens(self, url: str) -> None:
        self.url = url
        self._ready.set()

    def __enter__(self) -> Live:
        self._thread.start()
        assert self._ready.wait(PATIENCE)
        return self

    def stop(self) -> None:
        """Asks it to stop, as a signal does."""
        self.server.should_exit = True

    def ended(self) -> bool:
        """Whether it has stopped, soon."""
        self._thread.join(PATIENCE)
        return not self._thread.is_alive()

    def __exit__(self, *raised: object) -> None:
        self.stop()
        assert self.ended()


class HeldPieces:
    """Pieces that wait until the test lets them go."""

    def __init__(self, held: HeldAnswers, answer: Answer, pieces: Sequence[str]) -> None:
        self._held, self.answer = held, answer
        self._left = list(pieces)
        self.cancelled = asyncio.Event()
        self.closed = False

    def __aiter__(self) -> AsyncIterator[str]:
        return self

    async def __anext__(self) -> str:
        if self._held.fails is not None:
            raise self._held.fails
        waits = [asyncio.create_task(event.wait()) for event in (self._held.let_go, self.cancelled)]
        try:
            if self._held.free_pieces <= 0:
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            self._held.free_pieces -= 1
        finally:
            for wait in waits:
                wait.cancel()
        if self.cancelled.is_set() or not self._left:
            raise self._held.breaks or StopAsyncIteration
        return self._left.pop(0)

    def cancel(self) -> None:
        self.cancelled.set()

    async def aclose(self) -> None:
        self.closed = True
        self._held.running -= 1


class HeldAnswers:
    """Answers that are what an engine has answered, handed out when the test says so; an `Answers` of its own."""

    def __init__(
        self,
        answer: Answer,
        free_pieces: int = 0,
        fails: Exception | None = None,
        breaks: Exception | None = None,
    ) -> None:
        self._answer, self.free_pieces = answer, free_pieces
        self.fails, self.breaks = fails, breaks  # at the first piece, and behind the last
        self.let_go = asyncio.Event()
        self.asked: list[tuple[Any, Sequence[Passage], CallOptions]] = []
        self.pieces: list[HeldPieces] = []
        self.running = self.waiting = self.cache_bytes = 0

    def ask(self, question: str, passages: Sequence[Passage], options: CallOptions) -> HeldPieces:
        return self._made(question, passages, options)

    def chat(self, messages: Any, passages: Sequence[Passage], options: CallOptions) -> HeldPieces:
        return self._made(messages, passages, options)

    def _made(self, asked: Any, passages: Sequence[Passage], options: CallOptions) -> HeldPieces:
        self.asked.append((asked, passages, options))
        self.running += 1
        text = self._answer.text
        self.pieces.append(HeldPieces(self, self._answer, [text[:3], text[3:]]))
        return self.pieces[-1]

    async def close(self, timeout: float) -> None:
        async with asyncio.timeout(timeout):
            while self.running:
                await asyncio.sleep(0.01)


def eventually(holds: Callable[[], object]) -> bool:
    """Whether something is so, soon."""
    waited = threading.Event()
    return any(holds() or waited.wait(0.01) for _ in range(int(PATIENCE / 0.01)))


def events_of(text: str) -> list[dict[str, Any]]:
    """What the events of a stream say; the last one, which is no JSON, must be there."""
    *events, done = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert done == "[DONE]"
    return [json.loads(event) for event in events]


def error_in(response: Any, status: int) -> dict[str, Any]:
    """The error of a response, whose shape is OpenAI's."""
    assert response.status_code == status, response.text
    body = response.json()
    assert list(body) == ["error"]
    assert list(body["error"]) == ["message", "type", "param", "code"]
    assert "\n" not in body["error"]["message"]
    error: dict[str, Any] = body["error"]
    return error
