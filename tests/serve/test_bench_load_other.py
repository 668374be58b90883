"""``finch-rag bench load --against``: another server is asked the same questions, whatever its streams look like."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from typer.testing import CliRunner, Result

from finch_rag.bench.load_client import Asked, _ask
from finch_rag.bench.load_other import Other, other_server
from finch_rag.bench.shapes import random_finch
from finch_rag.cli.app import app
from finch_rag.errors import FinchError, InputError

from .support import PATIENCE, Live

WORDS = ("One", " two\u2028", " three")
USAGE = {"prompt_tokens": 9, "completion_tokens": 7, "total_tokens": 16}


def event(choices: list[dict[str, Any]] | None, **more: Any) -> str:
    return f"data: {json.dumps({'choices': choices, **more}, ensure_ascii=False)}\n\n"


def delta(**said: Any) -> dict[str, Any]:
    return {"index": 0, "delta": said}


ROLE = event([delta(role="assistant")])
TEXT = "".join(event([delta(content=word)]) for word in WORDS)
LENGTH = event([{**delta(), "finish_reason": "length"}])
DONE = "data: [DONE]\n\n"


def asked(answer: Callable[[httpx.Request], httpx.Response]) -> Asked:
    """What a client makes of a response."""

    async def ask() -> Asked:
        async with httpx.AsyncClient(transport=httpx.MockTransport(answer)) as http:
            return await _ask(http, "http://other/v1/chat/completions", 3, {"max_tokens": 4})

    return asyncio.run(ask())


def streamed(text: str, status: int = 200) -> Asked:
    return asked(lambda request: httpx.Response(status, content=text.encode()))


@pytest.mark.parametrize(
    ("stream", "tokens"),
    [
        pytest.param(ROLE + TEXT + event([{**delta(), "finish_reason": "length"}], usage=USAGE), 7, id="transformers"),
        pytest.param(
            event([delta(role="assistant", content="")], usage=None) + TEXT + LENGTH + event([], usage=USAGE) + DONE,
            7,
            id="vllm",
        ),
        pytest.param(event([delta(role="assistant", content=None)]) + TEXT + LENGTH + DONE, 3, id="no usage"),
        pytest.param(TEXT + event(None, usage={}) + event([{"index": 0}]) + DONE, 3, id="no delta"),
        pytest.param(f": ping\r\n\r\n{TEXT}{DONE}".replace("data: ", "data:").replace("\n", "\r\n"), 3, id="crlf"),
    ],
)
def test_streams_of_all_servers_are_read(stream: str, tokens: int) -> None:
    found = streamed(stream)
    assert (found.number, found.status, found.text, found.error) == (3, 200, "".join(WORDS), "")
    assert found.new_tokens == tokens


def test_thoughts_are_tokens_too() -> None:
    assert streamed(event([delta(reasoning_content="Hm")]) + event([delta(reasoning=" so")]) + DONE).text == "Hm so"


@pytest.mark.parametrize(
    ("stream", "error"),
    [
        (TEXT + event(None, error={"message": "no memory"}), '{"message": "no memory"}'),
        ('data: {"error": "No "model""}\n\n', '{\\"error\\": \\"No \\"model\\"\\"}'),
        (ROLE + TEXT, "the stream ended before the answer"),
        ("{}", "the stream ended before the answer"),
    ],
)
def test_a_stream_without_a_whole_answer_is_an_error(stream: str, error: str) -> None:
    assert error in streamed(stream).error


def test_a_refusal_is_told_in_one_line() -> None:
    found = streamed('{"detail":\n"too long"}', 422)
    assert (found.status, found.error) == (422, 'status 422: {"detail": "too long"}')


def test_a_server_that_goes_away_is_an_error() -> None:
    def gone(request: httpx.Request) -> httpx.Response:
        raise httpx.RemoteProtocolError("peer closed connection", request=request)

    found = asked(gone)
    assert (found.status, found.error) == (0, "RemoteProtocolError peer closed connection")


class Fake:
    """A server that streams as transformers serve does, and keeps what it was sent.

    Attributes:
        url: What its endpoints' addresses begin with.
        sent: The bodies of requests, in their order.
        models: What it lists.
        refuses_from: The first request that it refuses, if any.
    """

    def __init__(self) -> None:
        self.url, self.models, self.refuses_from = "", ["only"], 10_000
        self.sent: list[dict[str, Any]] = []

    def app(self) -> FastAPI:
        app = FastAPI()

        @app.get("/v1/models")
        async def models() -> dict[str, Any]:
            return {"data": [{"id": name} for name in self.models]}

        @app.post("/v1/chat/completions")
        async def complete(request: Request) -> Response:
            self.sent.append(await request.json())
            if len(self.sent) > self.refuses_from:
                return JSONResponse({"detail": "the prompt is too long"}, 400)
            return StreamingResponse(self.events(), media_type="text/event-stream")

        return app

    async def events(self) -> AsyncIterator[str]:
        yield ROLE
        for word in WORDS:
            yield event([delta(content=word)])
        yield LENGTH
        yield event([], usage=USAGE)


@pytest.fixture
def fake() -> Iterator[Fake]:
    fake = Fake()
    with listening(fake.app()) as url:
        fake.url = f"{url}/v1"
        yield fake


@contextmanager
def listening(app: FastAPI) -> Iterator[str]:
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    waited = threading.Event()
    assert any(server.started or waited.wait(0.01) for _ in range(int(PATIENCE / 0.01)))
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(PATIENCE)
    assert not thread.is_alive()


def load(*options: str) -> Result:
    command = ["bench", "load", "--shape", "tiny", "--requests", "2", "--new-tokens", "5", *options]
    return CliRunner().invoke(app, command)


def last_line(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def test_another_server_gets_the_same_questions_with_their_passages(fake: Fake) -> None:
    result = load("--tokens", "300", "--clients", "1,3", "--against", f"{fake.url}/", "--against-model", "name")
    found = last_line(result)["against"]
    assert (found["url"], found["model"]) == (fake.url, "name")
    assert {number: row["requests"] for number, row in found["clients"].items()} == {"1": 2, "3": 3}
    assert [row["new_tokens"] for row in found["clients"].values()] == [7, 7]
    assert "finch-rag's" in result.stdout
    assert len(fake.sent) == 1 + 2 + 3  # the first one warms it
    for body in fake.sent:
        assert sorted(body) == ["max_tokens", "messages", "model", "stream", "stream_options", "temperature"]
        assert (body["model"], body["max_tokens"], body["temperature"], body["stream"]) == ("name", 5, 0, True)
        assert [message["role"] for message in body["messages"]] == ["system", "user"]
    prompts = [body["messages"][-1]["content"] for body in fake.sent]
    marks, texts = zip(*(prompt.split("\n\n", 1) for prompt in prompts), strict=True)
    assert len(set(texts[3:])) == 3
    assert texts[0] == texts[1]  # one client asks them in their order
    assert set(texts[1:3]) < set(texts[3:])
    assert len({marks[0], marks[1], marks[3]}) == 3  # nothing that was asked before is asked again
    assert (marks[1], marks[3]) == (marks[2], marks[5])
    instructions, *passages, question = texts[0].split("\n\n")
    assert instructions.startswith("Answer the question")
    assert all(passage.startswith("0 ") for passage in passages)
    assert 300 <= sum(map(len, passages)) <= 310  # a letter is a token of the shape
    assert question == "Question: What do the passages say about number 0?"


def test_the_whole_store_is_in_each_prompt(fake: Fake) -> None:
    last_line(load("--store-tokens", "900", "--clients", "2", "--against", fake.url))
    assert {body["model"] for body in fake.sent} == {"only"}
    stores = [body["messages"][-1]["content"].split("\n\n")[1:-1] for body in fake.sent]
    assert stores[1:] == [stores[0], stores[0]]
    assert sum(len(passage) + 2 for passage in stores[0]) == 900


def test_a_server_of_ours_can_be_the_other_one() -> None:
    finch = random_finch("tiny")
    finch.runtime.prompts.decode = lambda token_ids: "x" * len(token_ids)  # type: ignore[method-assign]
    with Live(finch) as live:
        found = last_line(load("--tokens", "200", "--clients", "2", "--against", f"{live.url}/v1"))["against"]
    assert found["model"] == "tiny"
    assert found["clients"]["2"]["new_tokens"] == 5
    assert 0 < found["clients"]["2"]["first_p50"] < found["clients"]["2"]["last_p50"]


def test_a_request_that_the_other_server_refuses_is_one_line_behind_the_first_table(fake: Fake) -> None:
    fake.refuses_from = 2
    result = load("--tokens", "200", "--clients", "2", "--against", fake.url)
    assert result.exit_code == 2
    assert "requests/s" in result.stdout
    assert "finch-rag's" not in result.stdout
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error")]
    told = '1 of 2 requests failed, the first with status 400: {"detail":"the prompt is too long"}'
    assert line == f"Error: {fake.url}: {told}"


def test_a_model_is_found_where_there_is_one(fake: Fake) -> None:
    assert other_server(f"{fake.url}/", None) == Other(fake.url, "only")
    fake.models = [f"m{number}" for number in range(7)]
    with pytest.raises(InputError, match=r"names 7 models \(m0, m1, m2, m3, m4, ...\): name one by --against-model"):
        other_server(fake.url, None)
    with pytest.raises(InputError, match="status 404: name a model by --against-model"):
        other_server(f"{fake.url}/wrong", None)
    assert other_server(f"{fake.url}/wrong", "mine").model == "mine"  # a server need not list its models


@pytest.mark.parametrize("url", ["127.0.0.1:8000/v1", "localhost", "ftp://localhost/v1", "http://localhost:port/v1"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(InputError, match="use an address such as http://127"):
        other_server(url, "name")


def test_nobody_there_is_told_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finch_rag.bench.load._random", None)
    with listening(FastAPI()) as url:
        pass
    with pytest.raises(FinchError, match=f"no server answers at {url}"):
        other_server(url, "name")
    assert f"no server answers at {url}" in load("--against", url).stderr


def test_a_model_without_a_server_is_refused() -> None:
    assert "--against-model is 'name', and no server is named" in load("--against-model", "name").stderr
