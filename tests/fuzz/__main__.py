"""Runs a fuzz target by atheris: ``python -m tests.fuzz TARGET --seconds 600``.

It goes on behind a finding; of each kind the shortest input is kept.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import tempfile
import traceback
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def main() -> None:
    """Parses the command line, and fuzzes."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("target", help="a target of tests/fuzz/targets.py, or 'list'")
    parser.add_argument("--seconds", type=int, default=60, help="how long to fuzz")
    parser.add_argument("--found", type=Path, default=Path("fuzz-found"), help="folder for inputs that found something")
    parser.add_argument("--corpus", type=Path, help="folder that keeps inputs which reach more of the code")
    parser.add_argument("--seed", type=int, default=0, help="of the fuzzer's choices; 0 takes the clock")
    options = parser.parse_args()
    if find_spec("atheris") is None:
        sys.exit("atheris is not installed: pip install atheris (it has wheels for Python 3.11 to 3.13 on Linux)")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    _fuzz(options.target, options.seconds, options.found, options.corpus, options.seed)


def _fuzz(name: str, seconds: int, found: Path, kept: Path | None, seed: int) -> None:
    atheris: Any = importlib.import_module("atheris")
    from .targets import TARGETS  # imports errors alone, so that the rest is imported under atheris

    if name not in TARGETS:
        sys.exit(f"there is no target {name!r}: use {', '.join(TARGETS)}")
    target = TARGETS[name]
    atheris.enabled_hooks.add("str")  # its hook of regular expressions knows no position to begin at
    import torch  # not instrumented: most of it is not Python

    torch.set_num_threads(1)
    with atheris.instrument_imports(include=list(target.covers)):
        check = target.check
    found = found / name
    findings = _Findings(found)
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) if kept is None else kept / name
        corpus.mkdir(parents=True, exist_ok=True)
        for number, data in enumerate(target.seeds().values()):
            (corpus / f"seed-{number}").write_bytes(data)
        words = Path(f"{folder}.dict")
        words.write_text("".join(f'"{_escaped(word)}"\n' for word in target.words))
        arguments = [
            f"-max_total_time={seconds}",
            f"-max_len={target.size}",
            "-timeout=60",
            "-rss_limit_mb=8192",
            "-print_final_stats=1",
            f"-artifact_prefix={folder}/",  # what is worth keeping goes into ``found``
            "-len_control=10",  # long inputs soon
            f"-seed={seed}",
            *([f"-dict={words}"] if target.words else []),
            str(corpus),
        ]
        atheris.Setup([sys.argv[0], *arguments], lambda data: findings.try_one(check, data), internal_libfuzzer=True)
        atheris.Fuzz()


def _escaped(word: bytes) -> str:
    """A word as libFuzzer's dictionaries have it."""
    return "".join(f"\\x{byte:02x}" for byte in word)


class _Findings:
    """What was found, each kind once.

    Args:
        folder: For the inputs, and what each did.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._shortest: dict[str, int] = {}

    def try_one(self, check: Any, data: bytes) -> None:
        """Tries an input, and keeps it if it found something."""
        from .support import tried

        try:
            tried(check, data)
        except Exception as error:
            kind = _kind(error)
            if len(data) >= self._shortest.get(kind, len(data) + 1):
                return
            if kind not in self._shortest:
                sys.stderr.write(f"FOUND {kind}: {' '.join(str(error).split())[:200]}\n")
            self._shortest[kind] = len(data)
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / kind).write_bytes(data)
            (self._folder / f"{kind}.txt").write_text(traceback.format_exc(), errors="replace")


def _kind(error: Exception) -> str:
    """What tells findings apart: the error's class, and where it came from."""
    files = [(Path(frame.filename), frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    own = [(file.stem, line) for file, line in files if {"finch_rag", "fuzz"} & {*file.parts}]
    stem, line = next((place for place in reversed(own) if place[0] != "support"), own[-1])
    return f"{type(error).__name__}-{stem}-{line}"


if __name__ == "__main__":
    main()
