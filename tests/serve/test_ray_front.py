"""What stands before the engines of Ray Serve, with engines that a test steers. Skipped where Ray is not installed."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Message

from finch_rag.serve.settings import ServeSettings

from .support import CHAT

pytest.importorskip("ray.serve")

from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError

from finch_rag.serve.ray_app import Front


def said(status: int, *pieces: bytes, kind: bytes = b"application/json") -> list[Message]:
    """A response in messages."""
    start: Message = {"type": "http.response.start", "status": status, "headers": [(b"content-type", kind)]}
    bodies = [{"body": piece, "more_body": place + 1 < len(pieces)} for place, piece in enumerate(pieces)]
    return [start, *bodies]


class Turn:
    """One try: messages, and an error behind them."""

    def __init__(self, *steps: Any) -> None:
        self._steps = list(steps)
        self.cancelled = False

    def __aiter__(self) -> Turn:
        return self

    async def __anext__(self) -> Message:
        if not self._steps:
            raise StopAsyncIteration
        step = self._steps.pop(0)
        if isinstance(step, Exception):
            raise step
        return dict(step)

    def cancel(self) -> None:
        self.cancelled = True


class Engines:
    """A handle of engines that have these turns."""

    def __init__(self, *turns: Turn) -> None:
        self.turns, self.asked = list(turns), list[tuple[str, int]]()

    def options(self, **options: Any) -> Engines:
        assert options == {"method_name": "answer", "stream": True}
        return self

    def remote(self, scope: dict[str, Any], body: bytes, *, key: str, turn: int) -> Turn:
        self.asked.append((key, turn))
        return self.turns[turn]


async def answered(
    engines: Engines,
    method: str = "POST",
    path: str = CHAT,
    body: bytes = b"{}",
    headers: list[tuple[bytes, bytes]] | None = None,
    **settings: Any,
) -> Response:
    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    front = Front(engines, ServeSettings(**settings))  # type: ignore[arg-type,unused-ignore]
    scope = {"type": "http", "method": method, "path": path, "query_string": b"", "headers": headers or []}
    return await front(Request(scope, receive))


async def pieces(response: Response) -> list[bytes]:
    assert isinstance(response, StreamingResponse)
    found: AsyncIterator[Any] = response.body_iterator.__aiter__()
    return [bytes(piece) async for piece in found]


async def test_a_request_is_made_again_where_a_replica_is_lost() -> None:
    engines = Engines(Turn(RayActorError()), Turn(*said(200, b"x")[:1], RayActorError()), Turn(*said(200, b"{}")))
    response = await answered(engines)
    assert (response.status_code, response.body) == (200, b"{}")
    assert engines.asked == [("", 0), ("", 1), ("", 2)]


@pytest.mark.parametrize(
    ("method", "path", "tries"),
    [
        ("POST", CHAT, 3),
        ("POST", "/v1/stores/a/passages", 3),
        ("GET", "/v1/stores/a", 3),
        ("POST", "/v1/stores", 1),
        ("DELETE", "/v1/stores/a/passages", 1),
        ("DELETE", "/v1/stores/a", 1),
    ],
)
async def test_what_must_not_happen_twice_is_not_made_again(method: str, path: str, tries: int) -> None:
    engines = Engines(*(Turn(RayActorError()) for _ in range(3)))
    response = await answered(engines, method, path)
    assert response.status_code == 503
    assert b"replica_lost" in response.body
    assert len(engines.asked) == tries


async def test_a_store_that_another_replica_holds_is_looked_for() -> None:
    held = Turn(*said(409, b"held"))
    engines = Engines(held, Turn(*said(200, b"{}")))
    response = await answered(engines, path="/v1/stores/a/search")
    assert response.status_code == 200
    assert engines.asked == [("store a", 0), ("store a", 1)]
    everywhere = Engines(*(Turn(*said(409, b"held")) for _ in range(3)))
    assert (await answered(everywhere, path="/v1/stores/a/search")).status_code == 409
    other = Engines(Turn(*said(409, b"no store")))
    assert (await answered(other)).status_code == 409


async def test_too_many_are_told_to_wait() -> None:
    full = BackPressureError(num_queued_requests=3, max_queued_requests=3)
    response = await answered(Engines(Turn(full)))
    assert response.status_code == 429
    assert response.headers["retry-after"] == "1"


async def test_a_stream_is_handed_on_and_let_go() -> None:
    turn = Turn(*said(200, b"a", b"b", b"", kind=b"text/event-stream"))
    assert await pieces(await answered(Engines(turn))) == [b"a", b"b", b""]
    broken = Turn(*said(200, b"a", b"b", kind=b"text/event-stream")[:2], RayActorError())
    first, last = await pieces(await answered(Engines(broken)))
    assert first == b"a"
    assert last.startswith(b"data: {")
    assert b"replica_lost" in last
    assert turn.cancelled
    assert broken.cancelled
    cut = Turn(*said(200, b"a", b"b")[:2], RayActorError())  # half a JSON must not look whole
    with pytest.raises(RayActorError):
        await pieces(await answered(Engines(cut)))


async def test_a_key_and_a_size_are_looked_at_before_an_engine_is() -> None:
    engines = Engines(Turn(*said(200, b"{}")))
    assert (await answered(engines, api_keys=("secret",))).status_code == 401
    assert (await answered(engines, max_body_bytes=1)).status_code == 413
    assert engines.asked == []
    key = [(b"authorization", b"Bearer secret")]
    assert (await answered(engines, api_keys=("secret",), headers=key)).status_code == 200
    well = Engines(Turn(*said(200, b"{}")))
    assert (await answered(well, "GET", "/health", b"", api_keys=("secret",))).status_code == 200


@pytest.mark.parametrize("steps", [(), (ValueError("private"),)])
async def test_what_nobody_expects_has_the_shape_of_errors(steps: tuple[Exception, ...]) -> None:
    response = await answered(Engines(Turn(*steps)))
    assert response.status_code == 500
    assert b"internal_error" in response.body
    assert b"private" not in response.body
