"""The server as an ASGI application."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

from .. import __version__
from ..engine import Finch
from ..errors import SettingsError
from . import chat, completions, health, models, rerank, responses, stores
from .answers import Answers
from .batched_answers import BatchedAnswers
from .errands import Errands
from .errors import error_of
from .keys import KeyRing
from .limits import BodyLimit, KeyGuard
from .metrics import Meter, Metrics
from .service import Service
from .settings import ServeSettings
from .shelf import Shelf

_SPARE_THREADS = 4  # for steps of cancelled work that are not over yet


def make_app(finch: Finch, settings: ServeSettings | None = None, answers: Answers | None = None) -> FastAPI:
    """The application; ``app.state.service`` has its parts.

    Args:
        finch: The engine.
        settings: How it is run.
        answers: Who answers; the engine, in one running batch, when None.

    Raises:
        SettingsError: If the folder of stores cannot be made, or the model is shared by several processes.
    """
    if finch.runtime.shared is not None:
        raise SettingsError(
            f"the model is shared by {finch.runtime.shared.processes} processes, and a request reaches one of them: a "
            "server is not supported under tensor parallelism, use device_map in place of tp_plan"
        )
    settings = ServeSettings() if settings is None else settings
    if answers is None:
        answers = BatchedAnswers(finch, running=settings.running, waiting=settings.waiting)
    errands = Errands(running=settings.running, waiting=settings.waiting)
    service = Service(
        finch,
        settings,
        answers,
        errands,
        Shelf(finch, settings.stores),
        Metrics(answers, errands.places),
        created=int(time.time()),
    )

    @asynccontextmanager
    async def closed_at_the_end(app: FastAPI) -> AsyncIterator[None]:
        # Answers and errands each hold a thread while they compute; asyncio's own pool has as many as there are cores.
        workers = ThreadPoolExecutor(2 * settings.running + _SPARE_THREADS, thread_name_prefix="finch-rag")
        asyncio.get_running_loop().set_default_executor(workers)
        yield
        await service.close(settings.stop_timeout)

    app = FastAPI(title="finch-rag", version=__version__, lifespan=closed_at_the_end)
    app.state.service = service
    for part in (chat, completions, responses, rerank, stores, models, health):
        app.include_router(part.routes)
    app.add_exception_handler(HTTPException, _no_route)
    app.add_middleware(BodyLimit, most=settings.max_body_bytes)
    app.add_middleware(KeyGuard, keys=KeyRing(settings.api_keys))
    app.add_middleware(Meter, metrics=service.metrics)  # the last one stands first
    return app


async def _no_route(request: Request, error: Exception) -> Response:
    return error_of(error).response
