"""The application behind uvicorn: says where it listens, and finishes what runs before it stops."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI

from .service import Service

_LAST = 10  # seconds for responses whose work is done, or cancelled
_TICK = 0.1  # seconds between looks at a second Ctrl-C


class Server(uvicorn.Server):
    """A server that goes on listening while it stops, so that new requests learn why they are refused.

    Args:
        app: Made by `finch_rag.serve.app.make_app`.
        host: Address to listen at.
        port: Port to listen at; 0 takes a free one.
        on_ready: Called with the address, as a URL, when requests are taken.

    Attributes:
        service: The application's parts.
    """

    def __init__(
        self, app: FastAPI, *, host: str, port: int, on_ready: Callable[[str], None] = lambda url: None
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app, host=host, port=port, log_config=None, access_log=False, timeout_graceful_shutdown=_LAST
            )
        )
        self.service: Service = app.state.service
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begins to listen."""
        await super().startup(sockets)
        if self.started:
            self._on_ready(self.url)

    @property
    def url(self) -> str:
        """Where it listens."""
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Finishes what runs, then stops listening. A second Ctrl-C ends it at once."""
        closing = asyncio.create_task(self.service.close(self.service.settings.stop_timeout))
        while not closing.done() and not self.force_exit:
            await asyncio.wait([closing], timeout=_TICK)
        closing.cancel()
        await super().shutdown(sockets)
