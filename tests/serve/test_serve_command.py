"""``finch-rag serve``."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from finch_rag.cli import serve as command

from ..command_line import one_error, run
from .support import ASKED, CHAT, DOCUMENTS, PATIENCE

MAIN = "from finch_rag.cli import main; main()"


def test_it_serves_until_it_is_told_to_stop(model_folder: str, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("secret\n")
    arguments = ["--port", "0", "--store", str(tmp_path / "stores"), "--api-key-file", str(keys), "--name", "mine"]
    process = subprocess.Popen(
        [sys.executable, "-c", MAIN, "serve", "--model", model_folder, *arguments, "--budget", "60"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")},
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("finch-rag listens at http://127.0.0.1:"), process.communicate(timeout=PATIENCE)
        url = line.split()[-1]
        assert httpx.get(url + "/health").json() == {"status": "ok"}
        assert httpx.post(url + CHAT, json={}).status_code == 401
        headers = {"Authorization": "Bearer secret"}
        sent = {"model": "mine", "messages": ASKED, "max_tokens": 3, "finch": {"report": True, "strategy": "loop"}}
        with httpx.Client(headers=headers, timeout=3 * PATIENCE) as client:
            body = client.post(url + CHAT, json={**sent, "documents": [*DOCUMENTS, "Beside\x1b[2J them."]}).json()
            assert body["usage"]["finch"]["report"]["budget"] == 60
            assert client.get(url + "/v1/stores").json()["data"] == []
        process.send_signal(signal.SIGTERM)
        rest, log = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert rest == ""
    assert "POST /v1/chat/completions 200" in log
    assert "lighthouse" not in log
    assert "Traceback" not in log


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--running", 0, "--running is 0"),
        ("--waiting", -1, "waiting is -1"),
        ("--timeout", 0, "timeout is 0"),
        ("--max-body-mib", 0, "--max-body-mib is 0"),
        ("--api-key-file", "/nowhere/keys", "cannot be read"),
    ],
)
def test_bad_options_are_refused_before_a_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, option: str, value: Any, said: str
) -> None:
    monkeypatch.setattr(command, "load_finch", lambda *_, **__: pytest.fail("loaded"))
    assert said in one_error(run("serve", option, value))


def test_options_of_the_reading_reach_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    class LoadedError(Exception):
        """The engine would be there now."""

    seen: dict[str, Any] = {}

    def load(model: str, bars: Any, **options: Any) -> None:
        seen.update(options, model=model)
        raise LoadedError

    monkeypatch.setattr(command, "load_finch", load)
    with pytest.raises(LoadedError):
        command.serve(model="some/model", budget=512, rounds=1, compile_layers=True)
    assert seen == {"model": "some/model", "budget": 512, "rounds": 1, "compile_layers": True}


@pytest.mark.parametrize("missing", ["fastapi", "uvicorn", "prometheus_client"])
def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == missing else object())
    error = one_error(run("serve"))
    assert "pip install 'finch-rag[serve]'" in error
    assert missing.replace("_", "-") in error


def test_the_command_imports_no_server_and_no_torch_before_it_is_asked() -> None:
    code = (
        "import json, sys, finch_rag.cli.serve\n"
        "print(json.dumps([m for m in ('fastapi', 'uvicorn', 'prometheus_client', 'torch') if m in sys.modules]))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert json.loads(out) == []
