"""What all endpoints share."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from ..engine import Finch
from .answers import Answers
from .errands import Errands
from .errors import not_found, stopping
from .metrics import Metrics
from .settings import ServeSettings
from .shelf import Shelf


@dataclass
class Service:
    """A server's parts.

    Attributes:
        finch: The engine.
        settings: How the server is run.
        answers: Who answers.
        errands: What ranks and keeps stores.
        shelf: The stores.
        metrics: What was done.
        created: When the server was made, in seconds since 1970.
        stopping: Whether nothing new is taken.
    """

    finch: Finch
    settings: ServeSettings
    answers: Answers
    errands: Errands
    shelf: Shelf
    metrics: Metrics
    created: int
    stopping: bool = False

    @property
    def name(self) -> str:
        """What the model is called."""
        return self.settings.name or self.finch.name

    def check(self, model: str | None) -> None:
        """Raises where a request cannot be taken.

        Args:
            model: The one that it asks for; None for whichever there is.

        Raises:
            ApiError: 503 if the server is stopping; 404 if it has another model.
        """
        self.check_open()
        if model is not None and model not in (self.name, self.finch.name):
            raise not_found(
                f"the model {model[:100]!r} does not exist: this server has {self.name!r}", "model", "model_not_found"
            )

    def check_open(self) -> None:
        """Raises where nothing new is taken.

        Raises:
            ApiError: 503.
        """
        if self.stopping:
            raise stopping()

    async def close(self, timeout: float) -> None:
        """Takes nothing new, finishes what runs, and closes the stores; again does no harm.

        Args:
            timeout: The most seconds to wait.
        """
        if self.stopping:
            return
        self.stopping = True
        await asyncio.gather(self.answers.close(timeout), self.errands.close(timeout))
        self.shelf.close()


def service_of(request: Request) -> Service:
    """The service that a request is for.

    Args:
        request: The request.
    """
    service: Service = request.app.state.service
    return service


ServiceOf = Annotated[Service, Depends(service_of)]
