"""Many at once, too many at once, too slow, gone, and stopped."""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from finch_rag import Answer, Finch
from finch_rag.models.cache import CompressedCache
from finch_rag.serve.answers import Answers, BusyError
from finch_rag.serve.batched_answers import BatchedAnswers
from finch_rag.serve.places import Places

from ..small import texts
from .support import (
    ASKED,
    CHAT,
    PASSAGES,
    PATIENCE,
    QUESTION,
    HeldAnswers,
    Live,
    client_of,
    error_in,
    eventually,
    served_finch,
)

SENT: dict[str, Any] = {"messages": ASKED, "documents": texts(8)}


class HeldPass:
    """Holds one of a model's forward passes until it is let go, and counts them."""

    def __init__(self, finch: Finch, hold: int) -> None:
        self.count = 0
        self.held, self.let_go = threading.Event(), threading.Event()
        self._hold = hold
        finch.model.model.layers[0].register_forward_pre_hook(self._pass)

    def _pass(self, *_: Any) -> None:
        self.count += 1
        if self.count == self._hold:
            self.held.set()
            assert self.let_go.wait(PATIENCE)


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as pool:
        yield pool


def test_an_engines_answers_are_answers() -> None:
    answers: Answers = BatchedAnswers(served_finch(), running=1, waiting=0)
    assert (answers.running, answers.waiting) == (0, 0)


def test_answers_are_those_of_the_engine(engine: Finch, answer: Answer) -> None:
    async def both() -> list[Answer]:
        answers = BatchedAnswers(engine, running=2, waiting=2)
        asked = [answers.ask(QUESTION, PASSAGES, {}), answers.chat(QUESTION, PASSAGES, {"budget": 40})]
        for pieces in asked:
            assert "".join([piece async for piece in pieces]) == pieces.answer.text
            await pieces.aclose()
        assert (answers.running, answers.waiting) == (0, 0)
        return [pieces.answer for pieces in asked]

    first, second = asyncio.run(both())
    assert first.text == answer.text
    assert second.report.budget == 40


def test_the_next_begins_when_one_is_closed(engine: Finch) -> None:
    async def three() -> None:
        answers = BatchedAnswers(engine, running=1, waiting=2)
        first, second, third = (answers.ask(QUESTION, PASSAGES, {}) for _ in range(3))
        assert (answers.running, answers.waiting) == (1, 2)
        with pytest.raises(BusyError, match="1 answers run and 2 wait") as busy:
            answers.ask(QUESTION, PASSAGES, {})
        assert busy.value.retry_after >= 1
        waiting = asyncio.create_task(anext(third))
        second.cancel()  # while it waits: its place is free at once, and nothing was read
        assert (answers.running, answers.waiting) == (1, 1)
        assert await anext(second, None) is None
        await anext(first)
        assert not waiting.done()
        await first.aclose()
        assert await waiting
        await third.aclose()
        await second.aclose()  # which was not there any more
        assert (answers.running, answers.waiting) == (0, 0)

    asyncio.run(three())


def test_a_place_is_free_after_an_error(engine: Finch) -> None:
    async def ask() -> None:
        answers = BatchedAnswers(engine, running=1, waiting=0)
        pieces = answers.ask("", PASSAGES, {})
        with pytest.raises(Exception, match="question"):
            await anext(pieces)
        await pieces.aclose()
        assert answers.running == 0

    asyncio.run(ask())


def test_closing_finishes_what_runs_and_then_cancels(engine: Finch) -> None:
    async def close() -> tuple[list[str], list[str]]:
        answers = BatchedAnswers(engine, running=1, waiting=1)
        await answers.close(1)  # nothing to wait for

        async def read(pieces: Any) -> list[str]:
            try:
                return [piece async for piece in pieces]
            finally:
                await pieces.aclose()

        finished = asyncio.create_task(read(answers.ask(QUESTION, PASSAGES, {})))
        await asyncio.sleep(0)
        await answers.close(PATIENCE)
        assert finished.done()
        stuck = answers.ask(QUESTION, PASSAGES, {})
        await anext(stuck)
        closing = asyncio.create_task(answers.close(0.05))
        await asyncio.sleep(0.2)
        rest = await read(stuck)
        await closing
        return finished.result(), rest

    whole, rest = asyncio.run(close())
    assert len(whole) > 1
    assert rest == []


def test_the_time_to_try_again_follows_from_what_answers_took(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("finch_rag.serve.places.time.monotonic", lambda: now)
    places = Places(1, 1, "answers")
    for _ in range(30):
        place = places.admit()
        now += 10
        place.leave()
        place.leave()  # again does no harm
    places.admit()
    places.admit()
    with pytest.raises(BusyError) as busy:
        places.admit()
    assert busy.value.retry_after == 20


def test_a_full_queue_is_a_429_at_once(engine: Finch, threads: ThreadPoolExecutor) -> None:
    finch = served_finch()
    held = HeldPass(finch, 1)
    with client_of(finch, running=1, waiting=1) as client:
        service = client.app.state.service  # type: ignore[attr-defined]
        taken = [threads.submit(client.post, CHAT, json=SENT) for _ in range(2)]
        assert held.held.wait(PATIENCE)
        assert eventually(lambda: service.answers.waiting == 1)
        for stream in (False, True):
            response = client.post(CHAT, json={**SENT, "stream": stream})
            assert error_in(response, 429)["code"] == "queue_full"
            assert int(response.headers["Retry-After"]) >= 1
        held.let_go.set()
        assert [response.result().status_code for response in taken] == [200, 200]
        assert eventually(lambda: (service.answers.running, service.answers.waiting) == (0, 0))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("hold", [1, 12])  # while the passages are read, and while the answer is made
def test_a_client_that_goes_ends_its_answer(
    stream: bool, hold: int, caches: weakref.WeakSet[CompressedCache], threads: ThreadPoolExecutor
) -> None:
    finch = served_finch(max_new_tokens=60)
    finch.chat(ASKED, SENT["documents"], stop_token_ids=())  # type: ignore[arg-type]
    held = HeldPass(finch, hold)
    with Live(finch) as live:

        def ask(read: float = PATIENCE) -> None:
            sent = {**SENT, "stream": stream}
            with httpx.stream("POST", live.url + CHAT, json=sent, timeout=httpx.Timeout(PATIENCE, read=read)) as got:
                list(got.iter_raw())

        def give_up() -> None:
            with pytest.raises(httpx.ReadTimeout):
                ask(read=0.3)

        gone = threads.submit(give_up)
        assert held.held.wait(PATIENCE)
        gone.result(PATIENCE)
        time.sleep(0.1)  # the server learns of it
        held.let_go.set()
        assert eventually(lambda: live.service.answers.running == 0)
        assert held.count == hold  # no step more
        assert eventually(lambda: not caches)
        status = "200" if stream and hold > 1 else "499"  # the first piece was out, or nothing
        counted = {"endpoint": CHAT, "status": status}
        assert eventually(lambda: live.service.metrics.registry.get_sample_value("finch_requests_total", counted) == 1)
        ask()  # the server lives on
        assert held.count > hold


def test_a_client_that_goes_while_it_waits_leaves_the_queue(threads: ThreadPoolExecutor) -> None:
    finch = served_finch()
    held = HeldPass(finch, 1)
    with Live(finch, running=1, waiting=1) as live:
        first = threads.submit(httpx.post, live.url + CHAT, json=SENT, timeout=PATIENCE)
        assert held.held.wait(PATIENCE)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(live.url + CHAT, json=SENT, timeout=0.3)
        assert eventually(lambda: live.service.answers.waiting == 0)
        held.let_go.set()
        assert first.result().status_code == 200
        assert eventually(lambda: live.service.answers.running == 0)


def test_a_ranking_whose_client_goes_is_cancelled(threads: ThreadPoolExecutor) -> None:
    finch = served_finch()
    held = HeldPass(finch, 1)
    with Live(finch) as live:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(live.url + "/v1/rerank", json={"query": QUESTION, "documents": texts(20)}, timeout=0.3)
        assert held.held.is_set()
        time.sleep(0.1)
        held.let_go.set()
        assert eventually(lambda: live.service.errands.places.running == 0)
        assert held.count == 1


@pytest.mark.parametrize("stream", [False, True])
def test_the_first_piece_has_its_time(engine: Finch, answer: Answer, stream: bool) -> None:
    held = HeldAnswers(answer)
    with client_of(engine, answers=held, first_token_timeout=0.1) as client:
        error = error_in(client.post(CHAT, json={**SENT, "stream": stream}), 504)
        assert error["code"] == "timeout"
        assert "0.1 s" in error["message"]
        assert eventually(lambda: held.running == 0)


def test_an_answer_has_its_time(engine: Finch, answer: Answer) -> None:
    held = HeldAnswers(answer, free_pieces=1)
    with client_of(engine, answers=held, timeout=0.2) as client:
        assert error_in(client.post(CHAT, json=SENT), 504)["code"] == "timeout"
        held.free_pieces = 1
        response = client.post(CHAT, json={**SENT, "stream": True})
        assert response.status_code == 200
        assert '"timeout"' in response.text
        assert "[DONE]" not in response.text
        assert eventually(lambda: held.running == 0)
        assert all(pieces.closed for pieces in held.pieces)


def test_a_ranking_has_its_time(threads: ThreadPoolExecutor) -> None:
    finch = served_finch()
    held = HeldPass(finch, 1)
    with client_of(finch, timeout=0.2) as client:
        sent = {"query": QUESTION, "documents": texts(20)}
        assert error_in(client.post("/v1/rerank", json=sent), 504)["code"] == "timeout"
        held.let_go.set()


def test_a_body_has_its_time(engine: Finch) -> None:
    def slowly() -> Iterator[bytes]:
        yield b"{"
        time.sleep(0.5)
        yield b"}"

    with Live(engine, timeout=0.2) as live:
        headers = {"Content-Type": "application/json"}
        assert error_in(httpx.post(live.url + CHAT, content=slowly(), headers=headers), 408)["code"] == "timeout"


def test_a_stopping_server_finishes_what_runs_and_takes_nothing_new(threads: ThreadPoolExecutor) -> None:
    finch = served_finch()
    expected = finch.chat(ASKED, SENT["documents"]).text  # type: ignore[arg-type]
    held = HeldPass(finch, 2)
    with Live(finch) as live:
        running = threads.submit(httpx.post, live.url + CHAT, json=SENT, timeout=PATIENCE)
        assert held.held.wait(PATIENCE)
        live.stop()
        assert eventually(lambda: live.service.stopping)
        for path, sent in ((CHAT, SENT), ("/v1/rerank", {"query": "x", "documents": ["y"]})):
            response = httpx.post(live.url + path, json=sent)
            assert error_in(response, 503)["code"] == "stopping"
            assert response.headers["Retry-After"]
        assert httpx.get(live.url + "/health").status_code == 503
        held.let_go.set()
        assert running.result().json()["choices"][0]["message"]["content"] == expected
        assert live.ended()


def test_what_does_not_finish_in_time_is_cut_off(threads: ThreadPoolExecutor) -> None:
    finch = served_finch()
    held = HeldPass(finch, 2)
    with Live(finch, stop_timeout=0.1) as live:
        running = threads.submit(httpx.post, live.url + CHAT, json=SENT, timeout=PATIENCE)
        assert held.held.wait(PATIENCE)
        live.stop()
        time.sleep(0.3)
        held.let_go.set()
        assert error_in(running.result(), 503)["code"] == "stopping"
        assert live.ended()


def test_several_are_answered_side_by_side_as_one_by_one(engine: Finch, threads: ThreadPoolExecutor) -> None:
    questions = [f"{QUESTION} {number}" for number in range(6)]
    expected = [engine.chat(question, PASSAGES).text for question in questions]
    with client_of(engine, running=3) as client:

        def ask(question: str) -> str:
            documents = [{"id": p.id, "title": p.title, "text": p.text} for p in PASSAGES]
            sent = {"messages": [{"role": "user", "content": question}], "documents": documents}
            return str(client.post(CHAT, json=sent).json()["choices"][0]["message"]["content"])

        assert list(threads.map(ask, questions)) == expected
