"""A server in this process, and clients in a process of their own, over loopback."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from typing import Any

from ..engine import Finch
from ..errors import FinchError
from ..serve.app import make_app
from ..serve.server import Server
from ..serve.settings import ServeSettings

_STARTS = 60  # seconds that a server may take to listen
_ENDS = 10  # seconds that clients may take to end


@contextmanager
def served(finch: Finch, settings: ServeSettings) -> Iterator[Server]:
    """A server in a thread, until the block ends.

    Args:
        finch: The engine.
        settings: How it is run.

    Raises:
        FinchError: If it does not listen.
    """
    ready = threading.Event()
    server = Server(make_app(finch, settings), host="127.0.0.1", port=0, on_ready=lambda url: ready.set())
    thread = threading.Thread(target=server.run, name="finch-server", daemon=True)
    thread.start()
    if not ready.wait(_STARTS):
        raise FinchError(f"the server does not listen after {_STARTS} s")
    try:
        yield server
    finally:
        server.should_exit = True
        thread.join()


class Clients:
    """A process that carries orders out.

    Args:
        orders: The pipe to it.
    """

    def __init__(self, orders: Connection) -> None:
        self._orders = orders

    def __call__(self, order: Any, seconds: float | None = None) -> Any:
        """What comes of an order.

        Args:
            order: What its target takes.
            seconds: The most that it may take; None for no limit.

        Raises:
            FinchError: If nothing comes of it.
        """
        self._orders.send(order)
        if not self._orders.poll(seconds):
            raise FinchError(f"the clients have not come to an end after {seconds:g} s")
        try:
            return self._orders.recv()
        except EOFError:
            raise FinchError("the process of the clients has ended; what it wrote stands above") from None


@contextmanager
def clients(target: Callable[[Connection, str], None], url: str) -> Iterator[Clients]:
    """A process of clients, until the block ends.

    Args:
        target: Takes orders from a pipe until None comes, see `finch_rag.bench.load_client.take_orders`.
        url: The server's.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(theirs, url), daemon=True)
    process.start()
    theirs.close()  # so that its end shows here
    try:
        yield Clients(ours)
    finally:
        with suppress(OSError):  # it has ended already
            ours.send(None)
        process.join(_ENDS)
        process.kill()
