"""Errors as clients of OpenAI's interface read them: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from ..errors import (
    DeviceMemoryError,
    FinchError,
    InputError,
    MissingExtraError,
    ModelError,
    SettingsError,
    StoreError,
    WindowError,
)
from .answers import BusyError

log = logging.getLogger("finch_rag.serve")

_STATUS: Sequence[tuple[type[FinchError], int, str | None]] = (  # the first that fits
    (WindowError, 400, "context_length_exceeded"),
    (InputError, 400, None),
    (SettingsError, 400, None),
    (StoreError, 409, "store_error"),
    (DeviceMemoryError, 503, "out_of_memory"),
    (MissingExtraError, 501, "not_installed"),
    (ModelError, 500, "model_error"),
)
_GONE = 499  # nobody reads it; the log and the metrics do


class ApiError(HTTPException):
    """An answer that says what is wrong with a request.

    Args:
        status: Of HTTP.
        message: The line for the user.
        param: Which part of the request it is about.
        code: A word for programs.
        headers: Of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.message, self.param, self.code = message, param, code

    @property
    def body(self) -> dict[str, Any]:
        """What the client reads."""
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status_code, "invalid_request_error")
        kind = "server_error" if self.status_code >= 500 else kind
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def response(self) -> Response:
        """The same as a response."""
        return JSONResponse(self.body, self.status_code, self.headers)


def refused(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A 400.

    Args:
        message: The line for the user.
        param: Which part of the request it is about.
        code: A word for programs.
    """
    return ApiError(400, message, param=param, code=code)


def not_found(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A 404.

    Args:
        message: The line for the user.
        param: Which part of the request it is about.
        code: A word for programs.
    """
    return ApiError(404, message, param=param, code=code)


def too_late(what: str, seconds: float | None) -> ApiError:
    """A 504.

    Args:
        what: Is not there yet.
        seconds: After which it should have been.
    """
    cure = "pass fewer documents, or start the server with a larger --timeout"
    return ApiError(504, f"{what} was not there after {seconds:g} s: {cure}", code="timeout")


def stopping() -> ApiError:
    """A 503: the server takes nothing new."""
    return ApiError(503, "the server is stopping: ask another one", code="stopping", headers={"Retry-After": "5"})


def client_gone() -> ApiError:
    """What ends a request that nobody waits for any more."""
    return ApiError(_GONE, "the client has gone", code="client_gone")


def error_of(error: Exception, show_messages: bool = False) -> ApiError:
    """Any error as the client may see it; what nobody expected is written to the log.

    Args:
        error: The error.
        show_messages: Whether the log may have an unknown error's message, which may quote a prompt.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestValidationError):
        return _of_validation(error)
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail), headers=error.headers)
    if isinstance(error, BusyError):
        return ApiError(429, str(error), code="queue_full", headers={"Retry-After": str(error.retry_after)})
    for kind, status, code in _STATUS:
        if isinstance(error, kind):
            return ApiError(status, str(error), code=code)
    if isinstance(error, FinchError):
        return refused(str(error))
    frames = "".join(traceback.format_tb(error.__traceback__))
    log.error("%s%s\n%s", type(error).__name__, f": {error}" if show_messages else "", frames)
    return ApiError(500, "the server met an error of its own; its log has it", code="internal_error")


def _of_validation(error: RequestValidationError) -> ApiError:
    """Of all that is wrong with a body, what lies deepest: where one of several shapes is meant, that is its flaw."""
    flaws = list(error.errors())
    worst = max(flaws, key=lambda flaw: len(flaw["loc"]))
    place = ".".join(str(part) for part in worst["loc"] if part != "body") or None
    more = f" (and {len(flaws) - 1} more)" if len(flaws) > 1 else ""
    return refused(f"{place or 'the body'}: {worst['msg']}{more}", place)
