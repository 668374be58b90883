"""What stands before the endpoints: the API key, and the size of a body while it arrives."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError
from .keys import KeyRing

OPEN_PATHS = frozenset({"/health"})


def wrong_key() -> ApiError:
    """A 401."""
    return ApiError(
        401,
        "the API key is missing or wrong: send Authorization: Bearer KEY",
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )


def too_large(size: str, most: int) -> ApiError:
    """A 413.

    Args:
        size: Bytes of the body, in words.
        most: The most bytes.
    """
    return ApiError(
        413,
        f"the body has {size} bytes, the most is {most:,}: pass fewer documents, keep them in a store, or start the "
        "server with a larger --max-body-mib",
        code="body_too_large",
    )


class KeyGuard:
    """Lets only requests in that bring an API key.

    Args:
        app: What it guards.
        keys: The keys.
    """

    def __init__(self, app: ASGIApp, keys: KeyRing) -> None:
        self._app, self._keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or refuses it."""
        guarded = scope["type"] == "http" and scope["path"] not in OPEN_PATHS
        if guarded and not self._keys.opens(dict(scope["headers"]).get(b"authorization", b"")):
            return await wrong_key().response(scope, receive, send)
        return await self._app(scope, receive, send)


class BodyLimit:
    """Refuses bodies that are too large: by what they announce, and by what arrives.

    Args:
        app: What reads them.
        most: The most bytes.
    """

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app, self._most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or refuses it."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        announced = Headers(scope=scope).get("content-length", "")
        if announced.isdecimal() and int(announced[:20]) > self._most:
            return await too_large(f"{int(announced[:20]):,}", self._most).response(scope, receive, send)
        arrived = 0

        async def limited() -> Message:
            nonlocal arrived
            message = await receive()
            arrived += len(message.get("body", b""))
            if arrived > self._most:
                raise too_large(f"more than {self._most:,}", self._most)
            return message

        return await self._app(scope, limited, send)
