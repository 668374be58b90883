"""Routes that read strict JSON, and answer every error in one shape."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import APIRouter, Request
from fastapi.routing import APIRoute
from starlette.responses import Response

from .bodies import check_content_type, parsed
from .errors import ApiError, error_of
from .service import service_of


class StrictRequest(Request):
    """A request whose JSON is read by `finch_rag.serve.bodies`."""

    async def json(self) -> Any:
        """What the body says.

        Raises:
            ApiError: 400, if it is no strict JSON.
        """
        return parsed(await self.body())


class StrictRoute(APIRoute):
    """A route with `StrictRequest`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """What answers a request."""
        handler, reads_body = super().get_route_handler(), self.body_field is not None

        async def handle(request: Request) -> Response:
            service = service_of(request)
            strict = StrictRequest(request.scope, request.receive)
            try:
                if reads_body:
                    check_content_type(strict.headers.get("content-type", ""))
                    await _arrived(strict, service.settings.timeout)
                return await handler(strict)
            except Exception as error:
                return error_of(error, service.settings.log_prompts).response

        return handle


async def _arrived(request: Request, seconds: float | None) -> None:
    """Waits for a body, which the request then keeps."""
    try:
        async with asyncio.timeout(seconds):
            await request.body()
    except TimeoutError:
        raise ApiError(408, f"the body was not there after {seconds:g} s: send it faster", code="timeout") from None


def router() -> APIRouter:
    """A router of such routes."""
    return APIRouter(route_class=StrictRoute)
