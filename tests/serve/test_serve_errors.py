"""What goes wrong, as clients see it: always in OpenAI's shape, never a raw 500."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finch_rag import (
    Answer,
    DeviceMemoryError,
    Finch,
    FinchError,
    InputError,
    MissingExtraError,
    ModelError,
    NumericsError,
    StoreError,
    WindowError,
)
from finch_rag.serve.answers import BusyError

from .support import ASKED, CHAT, HeldAnswers, client_of, error_in, eventually

JSON = {"Content-Type": "application/json"}
SENT = json.dumps({"messages": ASKED})


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "required"),
        (b"{", "not JSON"),
        (b"[]", "the body"),
        (b"null", "the body"),
        (b'{"messages": 7}', "messages"),
        (b'{"messages": [7]}', "messages.0"),
        (b'{"messages": [{"content": "x"}]}', "messages.0.role"),
        (b"\xff\xfe{", "UTF-8"),
        (SENT[:-1].encode() + b', "temperature": NaN}', "NaN"),
        (SENT[:-1].encode() + b', "temperature": -Infinity}', "Infinity"),
        (SENT[:-1].encode() + b', "temperature": 1e999}', "largest float"),
        (SENT[:-1].encode() + b', "seed": ' + b"9" * 5000 + b"}", "digits"),
        (SENT[:-1].encode() + b', "seed": ' + b"9" * 30 + b"}", "seed"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "surrogate"),
        (b'{"messages": [{"role": "user", "content": "x", "\\uDC00": 1}]}', "surrogate"),
        (b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested"),
        (SENT[:-1].encode() + b', "finch": {"json_schema": ' + b'{"a":' * 900 + b"1" + b"}" * 900 + b"}}", ""),
        (SENT[:-1].encode() + b', "finch": []}', "finch"),
        (SENT[:-1].encode() + b', "documents": {"a": 1}}', "documents"),
        (SENT[:-1].encode() + b', "documents": [[1]]}', "documents.0"),
        (SENT[:-1].encode() + b', "stream_options": 1}', "stream_options"),
    ],
)
def test_bad_bodies_are_refused(client: TestClient, body: bytes, said: str) -> None:
    response = client.post(CHAT, content=body, headers=JSON)
    assert said in error_in(response, 400)["message"]


def test_an_emoji_of_two_escapes_is_fine(client: TestClient) -> None:
    body = b'{"messages": [{"role": "user", "content": "\\ud83d\\ude00?"}]}'
    assert client.post(CHAT, content=body, headers=JSON).status_code == 200


def test_a_body_must_say_that_it_is_json(client: TestClient) -> None:
    for headers in ({"Content-Type": "text/plain"}, {}):
        assert "Content-Type" in error_in(client.post(CHAT, content=SENT, headers=headers), 415)["message"]


def test_unknown_paths_and_methods_have_the_shape_too(client: TestClient) -> None:
    error_in(client.get("/v1/nonsense"), 404)
    error_in(client.get(CHAT), 405)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
NAMES = ("messages", "documents", "finch", "store", "stop", "response_format", "stream_options", "n", "model", "tools")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(NAMES), values, max_size=3), st.sampled_from(("chat", "rerank", "completions")))
def test_whatever_is_sent_is_answered_in_order(held: TestClient, sent: dict[str, Any], endpoint: str) -> None:
    path = {"chat": CHAT, "rerank": "/v1/rerank", "completions": "/v1/completions"}[endpoint]
    base: dict[str, Any] = {"messages": ASKED} if endpoint == "chat" else {"prompt": "x"}
    base = {"query": "x", "documents": ["y"]} if endpoint == "rerank" else base
    response = held.post(path, json={**base, **sent})
    assert response.status_code in (200, 400, 404)
    if response.status_code != 200:
        error_in(response, response.status_code)


@pytest.fixture(scope="module")
def held(engine: Finch, answer: Answer) -> Iterator[TestClient]:
    with client_of(engine, answers=HeldAnswers(answer, free_pieces=10**9)) as client:
        yield client


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (InputError("no"), 400, None),
        (WindowError("no"), 400, "context_length_exceeded"),
        (StoreError("no"), 409, "store_error"),
        (DeviceMemoryError("no"), 503, "out_of_memory"),
        (MissingExtraError.of("llguidance", "json"), 501, "not_installed"),
        (NumericsError("no"), 500, "model_error"),
        (ModelError("no"), 500, "model_error"),
        (FinchError("no"), 400, None),
        (BusyError("no", 7), 429, "queue_full"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_the_engines_errors_have_a_status(
    engine: Finch, answer: Answer, error: FinchError, status: int, code: str | None, stream: bool
) -> None:
    held = HeldAnswers(answer, free_pieces=9, fails=error)
    with client_of(engine, answers=held) as client:
        response = client.post(CHAT, json={"messages": ASKED, "stream": stream})
        found = error_in(response, status)
        assert (found["message"], found["code"]) == (str(error), code)
        assert response.headers.get("Retry-After") == ("7" if status == 429 else None)
        held.fails = None
        assert client.post(CHAT, json={"messages": ASKED}).status_code == 200  # the server lives on
        assert eventually(lambda: held.running == 0)


@pytest.mark.parametrize(
    ("error", "code"), [(DeviceMemoryError("full"), "out_of_memory"), (LookupError("secret"), "internal_error")]
)
def test_an_error_on_the_way_ends_a_stream(engine: Finch, answer: Answer, error: Exception, code: str) -> None:
    held = HeldAnswers(answer, free_pieces=9, breaks=error)
    with client_of(engine, answers=held) as client:
        response = client.post(CHAT, json={"messages": ASKED, "stream": True})
        assert response.status_code == 200
        *pieces, last = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
        assert len(pieces) == 3
        assert json.loads(last)["error"]["code"] == code
        assert "secret" not in response.text
        assert eventually(lambda: held.running == 0)


@pytest.mark.parametrize("shown", [False, True])
def test_what_nobody_expected_is_a_500_without_details(
    engine: Finch, answer: Answer, caplog: pytest.LogCaptureFixture, shown: bool
) -> None:
    held = HeldAnswers(answer, fails=LookupError("the user's secret"))
    with caplog.at_level(logging.INFO, "finch_rag.serve"), client_of(engine, answers=held, log_prompts=shown) as client:
        response = client.post(CHAT, json={"messages": ASKED})
    error = error_in(response, 500)
    assert error["code"] == "internal_error"
    assert "secret" not in response.text
    assert "LookupError" in caplog.text
    assert "support.py" in caplog.text  # where it was raised
    assert ("secret" in caplog.text) is shown


@pytest.mark.parametrize("shown", [False, True])
def test_prompts_are_logged_only_where_that_is_asked_for(
    engine: Finch, answer: Answer, caplog: pytest.LogCaptureFixture, shown: bool
) -> None:
    held = HeldAnswers(answer, free_pieces=9)
    with caplog.at_level(logging.DEBUG), client_of(engine, answers=held, log_prompts=shown) as client:
        client.post(CHAT, json={"messages": [{"role": "user", "content": "my secret"}], "documents": ["my secret"]})
        client.get("/v1/stores/secret")
    assert "POST /v1/chat/completions 200" in caplog.text
    own = "\n".join(record.getMessage() for record in caplog.records if record.name.startswith("finch_rag"))
    assert ("secret" in own) is shown


def test_a_body_is_measured_while_it_arrives(engine: Finch) -> None:
    with client_of(engine, max_body_bytes=1000) as client:
        large = json.dumps({"messages": ASKED, "documents": ["x" * 2000]}).encode()
        assert error_in(client.post(CHAT, content=large, headers=JSON), 413)["code"] == "body_too_large"
        announced = error_in(client.post(CHAT, content=large, headers=JSON), 413)["message"]
        assert announced.startswith(f"the body has {len(large):,} bytes, the most is 1,000")
        pieces = iter([large[:600], large[600:]])  # which announces no length
        response = client.post(CHAT, content=pieces, headers=JSON)
        assert "content-length" not in response.request.headers
        assert error_in(response, 413)["code"] == "body_too_large"
        assert client.post(CHAT, json={"messages": ASKED}).status_code == 200
