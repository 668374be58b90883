"""The server under Ray Serve: replicas that each have an engine, on any number of machines. Needs the extra ``ray``.

    serve run finch_rag.serve.ray_app:build model=Qwen/Qwen2.5-7B-Instruct num_replicas=2

A front, which has no model, takes the requests and hands each to an engine: the one that has its store open, or that
has read its documents before (`finch_rag.serve.affinity`).
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Message

from ..engine import Finch
from ..errors import MissingExtraError, SettingsError
from ..models.embedded import EMBEDDED
from .affinity import names_store, routing_key
from .app import make_app
from .errors import ApiError, error_of
from .events import event
from .keys import KeyRing, read_keys
from .limits import OPEN_PATHS, too_large, wrong_key
from .settings import ServeSettings

try:
    from ray import serve
    from ray.exceptions import RayActorError
    from ray.serve.config import RequestRouterConfig
    from ray.serve.exceptions import BackPressureError
    from ray.serve.handle import DeploymentHandle
except ImportError as error:
    raise MissingExtraError.of("ray[serve]", "ray") from error

log = logging.getLogger("finch_rag.serve")

REPLICA_HEADER = "x-finch-replica"
_ROUTER = "finch_rag.serve.ray_router.AffinityRouter"
_TURNS = 3  # replicas that a request is tried on
_PAUSE = 0.2  # seconds before another replica is tried, so that Ray learns of the lost one
_STORE_HELD = 409
_MIB = 2**20


class RayOptions(BaseModel):
    """What ``serve run`` and a configuration file may say.

    Attributes:
        model: As for `Finch.from_pretrained`.
        name: What requests call the model; its own name when None.
        engine: Keyword arguments of `Finch.from_pretrained`, such as ``{"store": true}``, by which documents that came
            before are not read again.
        stores: A folder of stores that all machines see.
        api_key_file: API keys, one a line, that all machines see.
        running: The most answers at once, of each replica.
        waiting: The most requests that wait in each front; others get a 429.
        timeout: See `ServeSettings`.
        first_token_timeout: See `ServeSettings`.
        max_body_mib: The largest request.
        log_prompts: See `ServeSettings`.
        num_replicas: Engines.
        autoscaling_config: Ray's, such as ``{"min_replicas": 1, "max_replicas": 8}``, in place of ``num_replicas``.
        ray_actor_options: Ray's options of each engine, such as ``{"num_gpus": 0.5}``.
        num_fronts: Fronts, which read requests and hand them on.
    """

    model_config = ConfigDict(extra="forbid")

    model: str = EMBEDDED
    name: str | None = None
    engine: dict[str, Any] = Field(default_factory=dict)
    stores: Path | None = None
    api_key_file: Path | None = None
    running: int = 16
    waiting: int = 64
    timeout: float | None = 600.0
    first_token_timeout: float | None = None
    max_body_mib: int = 64
    log_prompts: bool = False
    num_replicas: int = Field(default=1, ge=1)
    autoscaling_config: dict[str, Any] | None = None
    ray_actor_options: dict[str, Any] = Field(default_factory=dict)
    num_fronts: int = Field(default=1, ge=1)

    @field_validator("engine", "autoscaling_config", "ray_actor_options", mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        """The command line has texts only: JSON there."""
        return json.loads(value) if isinstance(value, str) else value

    def settings(self) -> ServeSettings:
        """How each server is run."""
        return ServeSettings(
            name=self.name,
            stores=self.stores,
            api_keys=read_keys(self.api_key_file),
            running=self.running,
            waiting=self.waiting,
            timeout=self.timeout,
            first_token_timeout=self.first_token_timeout,
            max_body_bytes=self.max_body_mib * _MIB,
            log_prompts=self.log_prompts,
        )


def build(arguments: Mapping[str, Any]) -> serve.Application:
    """The application that ``serve run`` deploys.

    Args:
        arguments: See `RayOptions`.

    Raises:
        SettingsError: If one of them is unknown, or cannot work.
    """
    try:
        options = RayOptions.model_validate(dict(arguments))
    except ValidationError as error:
        flaw = error.errors()[0]
        place = ".".join(map(str, flaw["loc"]))
        known = ", ".join(RayOptions.model_fields)
        raise SettingsError(f"{place}: {flaw['msg']}; what can be said: {known}") from None
    settings = options.settings()
    scale: dict[str, Any] = (
        {"num_replicas": options.num_replicas}
        if options.autoscaling_config is None
        else {"autoscaling_config": options.autoscaling_config}
    )
    engine = serve.deployment(Engine).options(
        name="engine",
        max_ongoing_requests=settings.running,
        max_queued_requests=settings.waiting,
        ray_actor_options=options.ray_actor_options,
        request_router_config=RequestRouterConfig(request_router_class=_ROUTER),
        graceful_shutdown_timeout_s=settings.stop_timeout,
        **scale,
    )
    front = serve.deployment(Front).options(
        name="front",
        num_replicas=options.num_fronts,
        max_ongoing_requests=_open_requests(options),
        ray_actor_options={"num_cpus": 0},
    )
    return front.bind(engine.bind(options.model, options.engine, settings), settings)


def _open_requests(options: RayOptions) -> int:
    """Requests that a front may have open: all that engines answer, all that wait, and some that are refused."""
    most = (options.autoscaling_config or {}).get("max_replicas", options.num_replicas)
    return 2 * (int(most) * options.running + options.waiting)


class Engine:
    """A replica: an engine, and the application on it, which is spoken to in pieces of ASGI.

    Args:
        model: See `RayOptions`.
        engine: See `RayOptions`.
        settings: How the application is run.
    """

    def __init__(self, model: str, engine: Mapping[str, Any], settings: ServeSettings) -> None:
        finch = Finch.from_pretrained(model, **engine)
        self._app: FastAPI = make_app(finch, settings)
        self._name: str = serve.get_replica_context().replica_id.unique_id
        self._lifespan: Any = None
        self._beginning = asyncio.Lock()

    async def answer(self, request: Mapping[str, Any], body: bytes, *, key: str, turn: int) -> AsyncIterator[Message]:
        """The messages of a response.

        Args:
            request: Of ASGI: method, path, query string, headers.
            body: Of the request.
            key: What the router has chosen this replica by.
            turn: How often the request was tried before.
        """
        await self._begun()
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        gone = asyncio.Event()
        unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            if unread:
                return unread.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(raw=message["headers"])[REPLICA_HEADER] = self._name
            await messages.put({**message, "headers": list(message["headers"])} if "headers" in message else message)

        async def run() -> None:
            try:
                await self._app({"type": "http", "asgi": {"version": "3.0"}, **request}, receive, send)
            finally:
                await messages.put(None)

        task = asyncio.create_task(run())
        try:
            while (message := await messages.get()) is not None:
                yield message
            await task
        finally:
            gone.set()  # the application ends what nobody waits for
            if not task.done():
                with suppress(Exception):
                    await asyncio.shield(task)

    async def check_health(self) -> None:
        """Raises where no requests are taken any more; Ray then starts another replica."""
        if self._app.state.service.stopping:
            raise RuntimeError("the server is stopping")

    async def __del__(self) -> None:
        """Finishes what runs, and closes the stores; Ray calls it."""
        if self._lifespan is not None:
            lifespan, self._lifespan = self._lifespan, None
            await lifespan.__aexit__(None, None, None)

    async def _begun(self) -> None:
        """Begins the application's life in the event loop that it answers in."""
        async with self._beginning:
            if self._lifespan is None:
                lifespan = self._app.router.lifespan_context(self._app)
                await lifespan.__aenter__()
                self._lifespan = lifespan


class Front:
    """Takes requests, and hands each to the engine that should answer it; tries another one where that one is lost.

    Args:
        engines: Ray's handle of the engines.
        settings: How the application is run.
    """

    def __init__(self, engines: DeploymentHandle[Any], settings: ServeSettings) -> None:
        self._answers = engines.options(method_name="answer", stream=True)
        self._keys = KeyRing(settings.api_keys)
        self._most = settings.max_body_bytes

    async def __call__(self, request: Request) -> Response:
        """Answers a request.

        Args:
            request: Of any endpoint.
        """
        try:
            self._check_key(request)
            body = await self._body(request)
            return await self._answered(request, body, routing_key(request.scope["path"], body))
        except Exception as error:
            return error_of(error).response

    def _check_key(self, request: Request) -> None:
        if request.scope["path"] not in OPEN_PATHS and not self._keys.opens(
            request.headers.get("authorization", "").encode("latin-1")
        ):
            raise wrong_key()

    async def _body(self, request: Request) -> bytes:
        pieces, arrived = [], 0
        async for piece in request.stream():
            arrived += len(piece)
            if arrived > self._most:
                raise too_large(f"more than {self._most:,}", self._most)
            pieces.append(piece)
        return b"".join(pieces)

    async def _answered(self, request: Request, body: bytes, key: str) -> Response:
        """The response of the first engine that is not lost before it has something to say."""
        scope = {
            "method": request.method,
            "path": request.scope["path"],
            "raw_path": request.scope.get("raw_path", b""),
            "query_string": request.scope["query_string"],
            "headers": list(request.scope["headers"]),
            "http_version": "1.1",
            "scheme": request.scope.get("scheme", "http"),
            "client": request.scope.get("client"),
            "server": request.scope.get("server"),
            "root_path": "",
        }
        for turn in range(_TURNS):
            messages = self._answers.remote(scope, body, key=key, turn=turn)
            try:
                start = await anext(messages)
                first = await anext(messages)  # so that a stream, too, can be begun again until it has a piece
            except BackPressureError:
                raise ApiError(
                    429,
                    "all replicas are busy and enough requests wait: try again, or start more replicas",
                    code="queue_full",
                    headers={"Retry-After": "1"},
                ) from None
            except RayActorError as error:
                log.warning("a replica was lost with a request (turn %d): %s", turn + 1, type(error).__name__)
                if not _may_repeat(request):
                    break
                await asyncio.sleep(_PAUSE)
                continue
            if start["status"] == _STORE_HELD and names_store(key) and turn + 1 < _TURNS:
                messages.cancel()  # another replica may have the store open, from before there were as many
                continue
            return _response(start, first, messages)
        raise ApiError(
            503,
            "the replica was lost that answered this request: send it again",
            code="replica_lost",
            headers={"Retry-After": "5"},
        )


def _may_repeat(request: Request) -> bool:
    """Whether a request changes nothing, or the same when it is made twice: passages are known by their ids."""
    path = request.scope["path"]
    if not path.startswith("/v1/stores") or request.method == "GET":
        return True
    return request.method == "POST" and path.endswith(("/passages", "/search"))


def _response(start: Message, first: Message, messages: Any) -> Response:
    headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in start["headers"]}
    streams = headers.get("content-type", "").startswith("text/event-stream")
    if not first.get("more_body", False):
        return Response(first.get("body", b""), start["status"], headers)

    async def body() -> AsyncIterator[bytes]:
        try:
            yield first.get("body", b"")
            async for message in messages:
                yield message.get("body", b"")
        except RayActorError:
            if not streams:
                raise
            lost = ApiError(503, "the replica was lost in the middle of this answer: ask again", code="replica_lost")
            yield event(lost.body)
        finally:
            messages.cancel()

    return StreamingResponse(body(), start["status"], headers)
