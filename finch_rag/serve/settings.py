"""How a server is run."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ..checks import checked, number, or_none, text, whole_number
from ..errors import SettingsError

_SECONDS = number(lambda value: value > 0, "it must be above 0 seconds")
_RULES = {
    "running": whole_number(unit=" request"),
    "waiting": whole_number(least=0, unit=" requests"),
    "timeout": or_none(_SECONDS),
    "first_token_timeout": or_none(_SECONDS),
    "stop_timeout": _SECONDS,
    "max_body_bytes": whole_number(unit=" byte"),
    "name": or_none(text),
}


@dataclass(frozen=True, slots=True)
class ServeSettings:
    """How a server is run.

    Attributes:
        name: What the model is called in requests; the engine's name when None.
        stores: A folder of stores, made if it is missing; None serves none.
        api_keys: A request must bring one of them; without any, all may ask.
        running: The most answers at once.
        waiting: The most requests that wait for their turn.
        timeout: The most seconds of a request, waiting included; None for no limit.
        first_token_timeout: The most seconds to the first piece of an answer, likewise.
        stop_timeout: Seconds that running requests get to finish when the server stops.
        max_body_bytes: The largest request.
        log_prompts: Whether questions and prompts are written to the log.

    Raises:
        SettingsError: If a value cannot work.
    """

    name: str | None = None
    stores: Path | None = None
    api_keys: tuple[str, ...] = ()
    running: int = 16
    waiting: int = 64
    timeout: float | None = 600.0
    first_token_timeout: float | None = None
    stop_timeout: float = 60.0
    max_body_bytes: int = 64 * 2**20
    log_prompts: bool = False

    def __post_init__(self) -> None:
        checked(_RULES, {name: getattr(self, name) for name in _RULES}, SettingsError)
        if any(not re.fullmatch(r"[\x21-\x7e]+", key) for key in self.api_keys):
            raise SettingsError("an API key is empty, or has white space or characters beyond ASCII: use another one")
