"""API keys: where they come from, and whether a request brings one."""

from __future__ import annotations

import hmac
import os
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path

from ..errors import SettingsError

KEY_VARIABLE = "FINCH_API_KEY"


def read_keys(file: Path | None) -> tuple[str, ...]:
    """The keys of a file, one a line, and of the environment.

    Args:
        file: Blank lines, and those that begin with ``#``, are skipped; None reads none.

    Raises:
        SettingsError: If the file cannot be read or has no key: nobody shall believe that it guards the server.
    """
    found = [key] if (key := os.environ.get(KEY_VARIABLE, "").strip()) else []
    if file is None:
        return tuple(found)
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"the API keys in {file} cannot be read: {error}") from error
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise SettingsError(f"{file} has no API key: write one a line, or leave --api-key-file out")
    return (*found, *keys)


class KeyRing:
    """The keys that open the server; compared in a time that does not tell how much of one was right.

    Args:
        keys: Without any, every request is let in.
    """

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [_digest(key.encode()) for key in keys]

    def opens(self, authorization: bytes) -> bool:
        """Whether a request's header brings one of the keys.

        Args:
            authorization: Value of the header, "Bearer KEY".
        """
        if not self._digests:
            return True
        scheme, _, key = authorization.partition(b" ")
        given = _digest(key.strip())
        matches = [hmac.compare_digest(given, known) for known in self._digests]  # all of them, always
        return scheme.lower() == b"bearer" and any(matches)


def _digest(key: bytes) -> bytes:
    return sha256(key).digest()
