"""A chat template is a program of strangers: it is tried out in a process of its own, before it may run in this one.

There it has little memory and time. What never ends, or fills the memory, ends that process and no other. It takes
about a tenth of a second, once for each template.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from importlib import resources
from pathlib import Path

SECONDS = 1  # of work; a template takes about a millisecond
_WAITS = 2.5  # seconds for them, where others work too
_STARTS = 30.0  # seconds; a process that has not started by then says nothing of the template
_BYTES = 1 << 30
_CHARACTERS = 1_000_000
_TURNS = ("user", "assistant")
_CONVERSATIONS = [
    [*system, *({"role": _TURNS[turn % 2], "content": f"FinchMessage{turn}GoesHere"} for turn in range(turns))]
    for turns in (1, 3, 9)
    for system in ([], [{"role": "system", "content": "Be brief."}])
]

_log = logging.getLogger(__name__)


@lru_cache(maxsize=256)
def what_is_wrong(template: str, special_tokens: tuple[tuple[str, str], ...] = ()) -> str:
    """Why a chat template cannot be rendered here; empty where it can, where it only fails, or where it is not known.

    Args:
        template: Its text.
        special_tokens: Names and texts of the tokenizer's, which templates use as variables.
    """
    if getattr(sys, "frozen", False) or "python" not in Path(sys.executable or "").name.lower():
        return ""  # this program is no Python that could be started once more
    told = {
        "path": sys.path,
        "template": template,
        "conversations": _CONVERSATIONS,
        "variables": {**_variables(special_tokens), "add_generation_prompt": True, "enable_thinking": False},
        "most_bytes": _BYTES,
        "most_seconds": SECONDS,
        "most_characters": _CHARACTERS,
    }
    try:
        return _tried(json.dumps(told))
    except (OSError, ValueError) as error:  # no further process may be started here
        _log.info("a chat template could not be tried out: %s", error)
        return ""


def _variables(special_tokens: tuple[tuple[str, str], ...]) -> Mapping[str, object]:
    return {**dict(special_tokens), "tools": None, "documents": None}


def _tried(told: str) -> str:
    source = resources.files(__package__).joinpath("trial_process.py").read_text(encoding="utf-8")
    with subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", source],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        encoding="utf-8",
    ) as process:
        if process.stdin is None or process.stdout is None:  # they are pipes
            return ""
        with _killed_after(_STARTS, process):
            process.stdin.write(told + "\n")
            process.stdin.flush()
            if process.stdout.readline() != "ready\n":
                return ""
        with _killed_after(_WAITS, process):
            said = process.stdout.readline()  # nothing where a limit has ended it
        return said.strip() if said else f"it takes more than {SECONDS} s, or breaks Python"


@contextmanager
def _killed_after(seconds: float, process: subprocess.Popen[str]) -> Iterator[None]:
    late = threading.Timer(seconds, process.kill)
    late.daemon = True
    late.start()
    try:
        yield
    except BaseException:
        process.kill()
        raise
    finally:
        late.cancel()
