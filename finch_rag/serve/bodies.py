"""Bodies of requests: JSON in its strict form, so that nothing behind it meets what it cannot write."""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

from .errors import ApiError, refused

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # escaped: UTF-8 itself has none
_JSON_TYPE = re.compile(r"application/([\w.-]+\+)?json\b", re.IGNORECASE)


def check_content_type(value: str) -> None:
    """Raises where a body does not say that it is JSON.

    Args:
        value: Of the header.

    Raises:
        ApiError: 415.
    """
    if not _JSON_TYPE.match(value.strip()):
        shown = value.split(";")[0][:60] or "missing"
        raise ApiError(415, f"the Content-Type is {shown}: send JSON, with Content-Type: application/json")


def parsed(body: bytes) -> Any:
    """What a body says.

    Args:
        body: JSON as UTF-8.

    Raises:
        ApiError: 400, if it is none, has NaN, an infinite number or half a surrogate pair, or is nested too deeply.
    """
    try:
        text = body.decode("utf-8")
        value = json.loads(text, parse_constant=_no_constant, parse_float=_finite)
    except UnicodeDecodeError as error:
        raise refused(f"the body is not UTF-8: byte {error.start} cannot be read") from None
    except json.JSONDecodeError as error:
        raise refused(f"the body is not JSON: {error.msg} at character {error.pos}") from None
    except RecursionError:
        raise refused("the body is nested too deeply: send flat JSON") from None
    except ValueError:  # Python reads no number of so many digits
        raise refused("the body has a number with too many digits: send a smaller one") from None
    if _SURROGATE.search(text):
        _check_surrogates(value)
    return value


def _no_constant(name: str) -> NoReturn:
    raise refused(f"the body has {name}, which is no JSON: send a finite number, or null")


def _finite(written: str) -> float:
    value = float(written)
    if not math.isfinite(value):
        raise refused("the body has a number that is beyond the largest float: send a smaller one")
    return value


def _check_surrogates(value: Any) -> None:
    waiting = [value]
    while waiting:
        found = waiting.pop()
        if isinstance(found, dict):
            waiting += [*found, *found.values()]
        elif isinstance(found, list):
            waiting += found
        elif isinstance(found, str):
            try:
                found.encode()
            except UnicodeEncodeError:
                raise refused("the body has half a surrogate pair, which is no character: leave it out") from None
