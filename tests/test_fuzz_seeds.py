"""What the fuzzer begins with, and what it once found, without the fuzzer: each input is taken, or refused in one line.

A file of `tests/fuzz/seeds/TARGET` whose name begins with ``open-`` is not dealt with yet: rename it once it is.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from .fuzz.support import Finding, dictionary, only, text_of, tried
from .fuzz.targets import TARGETS

ROOT = Path(__file__).parent.parent
NEEDS = {"gguf_files": "gguf", "json_schemas": "llguidance", "server_bodies": "fastapi"}
ALL = [(target, name) for target in TARGETS for name in TARGETS[target].seeds()]


def marked(target: str, name: str) -> object:
    missing = find_spec(NEEDS.get(target, "torch")) is None
    reason = "not dealt with yet; if it passes, take open- out of its name"
    marks = [pytest.mark.skipif(missing, reason=f"{NEEDS.get(target)} is not installed")]
    if name.startswith("open-"):
        marks.append(pytest.mark.xfail(strict=True, reason=reason))
    return pytest.param(target, name, id=f"{target}-{name}".replace(" ", "-"), marks=marks)


@pytest.mark.skipif(sys.platform == "win32", reason="needs the clock of a process")
@pytest.mark.parametrize(("target", "name"), [marked(target, name) for target, name in ALL])
def test_an_input_is_taken_or_refused(target: str, name: str) -> None:
    check = TARGETS[target].check
    tried(check, TARGETS[target].seeds()[name])


def test_every_target_has_inputs_to_begin_with_and_a_dictionary_of_its_words() -> None:
    for target in TARGETS.values():
        assert target.seeds()
        assert all(len(data) <= target.size for data in target.seeds().values()), target.name
        assert all(0 < len(word) <= 64 for word in target.words)


def test_words_stand_for_themselves() -> None:
    assert text_of(b"a\x01\x03b\x01\x00\xff", ("one", "two")) == "atwobone\ufffd"
    assert text_of(b"a\x01", ("one",)) == "a"
    words = [str(number) for number in range(300)]
    assert [text_of(entry, words) for entry in dictionary(words)] == words


def test_a_slow_input_and_a_stuck_one_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def computes(data: bytes) -> None:
        sum(n * n for n in range(10**8 if data else 10**6))

    monkeypatch.setattr("tests.fuzz.support.MOST_SECONDS", 0.001)
    with pytest.raises(Finding, match="0 bytes took"):
        tried(computes, b"")
    monkeypatch.setattr("tests.fuzz.support._STUCK", 0.2)
    with pytest.raises(Finding, match=r"not done after 0\.2 s, at\n(?s:.*)range"):
        tried(computes, b"x")


def test_a_large_input_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.fuzz.support._memory", iter((0, 300 << 20)).__next__)
    with pytest.raises(Finding, match="took 300 MiB"):
        tried(lambda data: None, b"x")


def test_errors_for_users_pass() -> None:
    from finch_rag import InputError

    with only():
        raise InputError("one line")
    with only():
        raise InputError("two\nlines")  # which it shows as one
    with pytest.raises(KeyError), only(ValueError):
        raise KeyError("no user's")


def test_without_atheris_one_line_says_what_to_install() -> None:
    if find_spec("atheris") is not None:
        pytest.skip("atheris is installed")
    run = [sys.executable, "-m", "tests.fuzz", "flat_prompts"]
    done = subprocess.run(
        run, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": "."}, timeout=60
    )
    assert done.returncode != 0
    assert done.stderr.startswith("atheris is not installed: pip install atheris")
    assert done.stderr.count("\n") == 1
