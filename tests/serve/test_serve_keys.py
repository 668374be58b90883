"""API keys, settings, and figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from finch_rag import Answer, Finch, SettingsError
from finch_rag.serve.keys import KeyRing, read_keys
from finch_rag.serve.settings import ServeSettings

from .support import ASKED, CHAT, DOCUMENTS, HeldAnswers, client_of, error_in


@pytest.mark.parametrize(
    "headers",
    [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer "}, {"Authorization": "Basic one"}, {"X": "one"}],
)
def test_a_request_needs_a_key(engine: Finch, headers: dict[str, str]) -> None:
    with client_of(engine, api_keys=("one", "two")) as client:
        for path in ("/v1/models", "/metrics", "/docs", "/nonsense"):
            response = client.get(path, headers=headers)
            assert error_in(response, 401)["code"] == "invalid_api_key"
            assert response.headers["WWW-Authenticate"] == "Bearer"
        assert client.get("/health", headers=headers).status_code == 200


@pytest.mark.parametrize("key", ["one", "two"])
def test_each_key_opens(engine: Finch, key: str) -> None:
    with client_of(engine, api_keys=("one", "two")) as client:
        assert client.get("/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == 200
        assert client.get("/v1/models", headers={"authorization": f"bearer  {key}"}).status_code == 200


def test_without_keys_all_may_ask() -> None:
    assert KeyRing(()).opens(b"")
    assert not KeyRing(("a",)).opens(b"Bearer \xff\xfe")


def test_keys_come_from_a_file_and_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FINCH_API_KEY", raising=False)
    assert read_keys(None) == ()
    file = tmp_path / "keys"
    file.write_text("# ours\none\n\n  two  \n")
    assert read_keys(file) == ("one", "two")
    monkeypatch.setenv("FINCH_API_KEY", "three")
    assert read_keys(file) == ("three", "one", "two")
    assert read_keys(None) == ("three",)
    file.write_text("# none\n")
    with pytest.raises(SettingsError, match="no API key"):
        read_keys(file)
    with pytest.raises(SettingsError, match="cannot be read"):
        read_keys(tmp_path / "missing")


@pytest.mark.parametrize(
    "settings",
    [
        {"running": 0},
        {"waiting": -1},
        {"timeout": 0},
        {"timeout": float("nan")},
        {"first_token_timeout": -1},
        {"max_body_bytes": 0},
        {"api_keys": ("a b",)},
        {"api_keys": ("",)},
    ],
)
def test_settings_are_checked(settings: dict[str, Any]) -> None:
    with pytest.raises(SettingsError):
        ServeSettings(**settings)


def figures(client: TestClient) -> dict[tuple[str, ...], float]:
    families = text_string_to_metric_families(client.get("/metrics").text)
    return {(s.name, *sorted(s.labels.values())): s.value for family in families for s in family.samples}


def test_figures_are_counted(engine: Finch) -> None:
    with client_of(engine) as client:
        before = figures(client)
        assert before["finch_tokens_total", "read"] == 0
        usage = client.post(CHAT, json={"messages": ASKED, "documents": DOCUMENTS}).json()["usage"]
        client.post(CHAT, json={"messages": ASKED, "documents": DOCUMENTS, "stream": True})
        client.post(CHAT, json={"messages": []})
        client.get("/nonsense/secret")
        client.get("/v1/models/secret")
        found = figures(client)
    assert found["finch_requests_total", "/v1/chat/completions", "200"] == 2
    assert found["finch_requests_total", "/v1/chat/completions", "400"] == 1
    assert found["finch_requests_total", "404", "other"] == 1
    assert not any("secret" in part for key in found for part in key)
    assert found["finch_tokens_total", "read"] == 2 * usage["finch"]["context_tokens"]
    assert found["finch_tokens_total", "kept"] == 2 * usage["finch"]["kept_tokens"]
    assert found["finch_tokens_total", "generated"] == 2 * usage["completion_tokens"]
    assert found["finch_first_token_seconds_count",] == 2
    assert found["finch_request_seconds_count", "/v1/chat/completions"] == 3
    assert found["process_resident_memory_bytes",] > 0
    assert (found["finch_running",], found["finch_waiting",]) == (0, 0)


def test_what_runs_and_waits_is_that_of_the_answers(engine: Finch, answer: Answer) -> None:
    held = HeldAnswers(answer)
    with client_of(engine, answers=held) as client:
        held.running, held.waiting = 3, 4
        found = figures(client)
        held.running = 0
    assert (found["finch_running",], found["finch_waiting",]) == (3, 4)
