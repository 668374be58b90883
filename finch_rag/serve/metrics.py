"""Figures for Prometheus, and one line of the log a request."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..answer import CompressionReport

if TYPE_CHECKING:
    from .answers import Answers
    from .places import Places

log = logging.getLogger("finch_rag.serve")

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 600)


class Metrics:
    """What a server has done, and does now.

    Attributes:
        registry: Of all figures.
    """

    def __init__(self, answers: Answers, errands: Places) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._requests = Counter(
            "finch_requests", "Requests that were answered.", ["endpoint", "status"], registry=self.registry
        )
        self._first = Histogram(
            "finch_first_token_seconds",
            "Seconds from a request to the first piece of its answer, waiting included.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._seconds = Histogram(
            "finch_request_seconds",
            "Seconds of a request in all.",
            ["endpoint"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._tokens = Counter(
            "finch_tokens",
            "Tokens: read (of passages), cached (of these, known to a store), kept (of these), generated.",
            ["kind"],
            registry=self.registry,
        )
        for kind in ("read", "cached", "kept", "generated"):
            self._tokens.labels(kind)  # so that it is there from the start
        self._gauge("finch_running", "Answers that are being made.").set_function(lambda: answers.running)
        self._gauge("finch_waiting", "Requests that wait for their turn.").set_function(lambda: answers.waiting)
        self._gauge(
            "finch_cache_bytes", "Room for keys and values in the caches of answers that are being made."
        ).set_function(lambda: answers.cache_bytes)
        self._gauge("finch_errands", "Rankings and store requests that run or wait.").set_function(
            lambda: errands.running + errands.waiting
        )
        if torch.cuda.is_available():
            memory = self._gauge("finch_device_memory_bytes", "Memory of the device that torch has allocated.")
            memory.set_function(torch.cuda.memory_allocated)

    def _gauge(self, name: str, what: str) -> Gauge:
        return Gauge(name, what, registry=self.registry)

    def began(self, seconds: float) -> None:
        """Counts the first piece of an answer.

        Args:
            seconds: Since its request.
        """
        self._first.observe(seconds)

    def read(self, report: CompressionReport) -> None:
        """Counts the tokens of an answer.

        Args:
            report: Of the answer.
        """
        self._tokens.labels("read").inc(report.context_tokens)
        self._tokens.labels("cached").inc(report.known_tokens)
        self._tokens.labels("kept").inc(report.kept_tokens)
        self._tokens.labels("generated").inc(report.new_tokens)

    def answered(self, endpoint: str, status: int, seconds: float) -> None:
        """Counts a request.

        Args:
            endpoint: The pattern of its path.
            status: Of HTTP.
            seconds: That it took.
        """
        self._requests.labels(endpoint, str(status)).inc()
        self._seconds.labels(endpoint).observe(seconds)


class Meter:
    """Counts and logs requests. A log line has method, pattern of the path, status and seconds, and no user's text.

    Args:
        app: What answers.
        metrics: Where they are counted.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        started, status = time.perf_counter(), 500

        async def seen(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, seen)
        finally:
            seconds = time.perf_counter() - started
            endpoint = getattr(scope.get("route"), "path", "other")
            self._metrics.answered(endpoint, status, seconds)
            log.info("%s %s %d %.3f s", scope["method"], endpoint, status, seconds)
