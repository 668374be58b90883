"""Requests that come at any time, executed by one thread."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from finch_rag import batch
from finch_rag.answer import Answer
from finch_rag.decode import running as running_module
from finch_rag.engine import Finch
from finch_rag.errors import DeviceMemoryError, NumericsError
from finch_rag.prompts.passages import as_passages
from finch_rag.quotes import support
from finch_rag.request import Cancelled, Request
from finch_rag.resolving import resolve, with_store
from finch_rag.serve import scheduler as scheduler_module
from finch_rag.serve.scheduler import Scheduler

from .small import small_finch, texts
from .test_batch import bare
from .test_own_models import new_finch

QUESTIONS = [f"{word} {n}?" for n, word in enumerate(("When", "Who was", "Where", "Why did the boats", "How") * 4)]


class Heard:
    """What a listener was told."""

    def __init__(self) -> None:
        self.deltas: list[str] = []
        self.answer: Answer | None = None
        self.error: BaseException | None = None
        self.done = threading.Event()
        self.times = 0

    def on_delta(self, text: str) -> None:
        self.deltas.append(text)

    def on_answer(self, answer: Answer) -> None:
        self.answer, self.times = answer, self.times + 1
        self.done.set()

    def on_error(self, error: BaseException) -> None:
        self.error, self.times = error, self.times + 1
        self.done.set()

    def read(self) -> Answer:
        assert self.done.wait(60)
        if self.error is not None:
            raise self.error
        assert self.answer is not None
        return self.answer


def request_of(finch: Finch, question: str, passages: Any = (), **options: Any) -> Request:
    settings = finch.settings.updated(options)
    chosen, settings = with_store(finch.runtime, question, as_passages(passages), settings)
    return resolve(finch.runtime, question, chosen, settings)


@pytest.fixture(params=["plain passes", "steps with places"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Finch:
    finch = small_finch()
    if request.param == "steps with places":  # uncaptured on a CPU
        monkeypatch.setattr(finch.runtime.graphs, "enabled", True)
    return finch


@pytest.fixture
def scheduler(engine: Finch) -> Iterator[Scheduler]:
    made = Scheduler(engine.runtime, running=3)
    yield made
    made.close()


def asked(scheduler: Scheduler, request: Request) -> Heard:
    heard = Heard()
    scheduler.submit(request, heard)
    return heard


OPTIONS: list[dict[str, Any]] = [
    {},
    {"max_new_tokens": 1},
    {"max_new_tokens": 3, "strategy": "loop"},
    {"temperature": 0.9, "top_k": 20, "seed": 4, "max_new_tokens": 9},
    {"stop": ["e", "an"], "max_new_tokens": 20},
    {"selection": "token"},
    {"rounds": 2},
    {"quotes": False, "max_new_tokens": 30},
]


def test_every_answer_is_the_one_that_the_engine_gives(engine: Finch, scheduler: Scheduler) -> None:
    rng = random.Random(0)
    calls = [
        (question, texts(2 + 3 * (n % 7), seed=n), OPTIONS[n % len(OPTIONS)]) for n, question in enumerate(QUESTIONS)
    ]
    expected = [bare(engine.ask(question, passages, **options)) for question, passages, options in calls]
    heard = []
    for question, passages, options in calls:
        heard.append(asked(scheduler, request_of(engine, question, passages, **options)))
        time.sleep(rng.random() / 50)
    for each, answer in zip(heard, expected, strict=True):
        assert bare(each.read()) == answer
        assert "".join(each.deltas) == answer.text
        assert each.times == 1
    assert scheduler.running == scheduler.waiting == 0


def test_a_question_without_passages_and_one_to_a_store(engine: Finch, scheduler: Scheduler) -> None:
    store = engine.open_store()
    store.add(texts(12))
    expected = [bare(engine.ask("Who?")).text, engine.ask("Who?", store=store).text]
    heard = [asked(scheduler, request_of(engine, "Who?", **options)) for options in ({}, {"store": store})]
    assert [each.read().text for each in heard] == expected


def test_no_more_run_than_there_are_places(engine: Finch, scheduler: Scheduler) -> None:
    most = most_bytes = 0
    heard = [asked(scheduler, request_of(engine, question, texts(3), max_new_tokens=20)) for question in QUESTIONS]
    while not all(each.done.is_set() for each in heard):
        most, most_bytes = max(most, scheduler.running), max(most_bytes, scheduler.cache_bytes)
        time.sleep(0.001)
    assert 1 <= most <= 3
    per_token = 2 * 2 * 2 * 16 * 4  # keys and values of two layers with two heads of 16 in float32
    assert 0 < most_bytes <= 3 * (60 + 250) * per_token  # budget, and the rest of prompt and answer
    assert scheduler.cache_bytes == 0


def test_a_cancelled_answer_ends_and_the_others_do_not(engine: Finch, scheduler: Scheduler) -> None:
    requests = [request_of(engine, question, texts(4), max_new_tokens=60) for question in QUESTIONS[:6]]
    expected = [engine.ask(question, texts(4), max_new_tokens=60).text for question in QUESTIONS[:6]]
    heard = [asked(scheduler, request) for request in requests]
    while not heard[1].deltas and not heard[1].done.is_set():
        time.sleep(0.001)
    for number in (1, 5):  # one runs, one waits
        requests[number].cancellation.cancel()
    for number in (0, 2, 3, 4):
        assert heard[number].read().text == expected[number]
    for number in (1, 5):
        with pytest.raises(Cancelled):
            heard[number].read()
        assert heard[number].times == 1


def test_a_request_that_fails_leaves_those_that_are_read_with_it_alone(
    engine: Finch, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [engine.ask(question, texts(4)).text for question in QUESTIONS[:3]]
    really = batch.read_together

    def fails(runtime: Any, requests: Any) -> Any:
        if any(request.question == QUESTIONS[1] for request in requests):
            raise DeviceMemoryError("no memory")
        return really(runtime, requests)

    monkeypatch.setattr(scheduler_module, "read_together", fails)
    heard = [asked(scheduler, request_of(engine, question, texts(4))) for question in QUESTIONS[:3]]
    with pytest.raises(DeviceMemoryError):
        heard[1].read()
    assert [heard[0].read().text, heard[2].read().text] == [expected[0], expected[2]]


def test_nan_ends_one_answer(engine: Finch, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [request_of(engine, question, texts(4), max_new_tokens=40) for question in QUESTIONS[:3]]
    expected = [engine.ask(question, texts(4), max_new_tokens=40).text for question in QUESTIONS[:3]]
    really = running_module.RunningBatch._next_tokens
    bad: list[Any] = []

    def spoilt(batch: Any, older: Any) -> Any:
        for answer, logits in really(batch, older):
            bad[:] = bad or [answer]
            assert isinstance(logits, torch.Tensor)
            yield answer, torch.full_like(logits, float("nan")) if answer is bad[0] else logits

    monkeypatch.setattr(running_module.RunningBatch, "_next_tokens", spoilt)
    heard = [asked(scheduler, request) for request in requests]
    for each in heard:
        assert each.done.wait(60)
    failed = [each for each in heard if each.error is not None]
    assert [type(each.error) for each in failed] == [NumericsError]
    for each, text in zip(heard, expected, strict=True):
        assert each in failed or each.read().text == text


def test_an_error_of_our_own_is_told_to_all_and_the_next_is_served(
    engine: Finch, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(running_module.RunningBatch, "step", lambda *_: 1 / 0)
        heard = [asked(scheduler, request_of(engine, question, texts(4))) for question in QUESTIONS[:2]]
        for each in heard:
            with pytest.raises(ZeroDivisionError):
                each.read()
    assert "a turn of the scheduler failed" in caplog.text
    assert asked(scheduler, request_of(engine, "Who?", texts(3))).read().text == engine.ask("Who?", texts(3)).text


def test_an_answer_without_support_is_withheld_also_from_the_stream(engine: Finch, scheduler: Scheduler) -> None:
    engine.runtime.support_weights.get(lambda: (0.0, 0.0, 0.0), lambda: None)  # a support of a half, whatever is found
    options: dict[str, Any] = {"min_support": 0.9, "max_new_tokens": 8}
    expected = engine.ask("Who?", texts(6), **options)
    heard = asked(scheduler, request_of(engine, "Who?", texts(6), **options))
    assert heard.read().report.stop_reason == expected.report.stop_reason == "unsupported"
    assert heard.deltas == []


def test_what_answers_rest_on_is_looked_for_together_and_where_that_fails_alone(
    engine: Finch, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [request_of(engine, question, texts(4), max_new_tokens=12) for question in QUESTIONS[:3]]
    expected = [bare(engine.ask(question, texts(4), max_new_tokens=12)) for question in QUESTIONS[:3]]
    really = support.finished
    together: list[int] = []

    def fails(runtime: Any, written: Any) -> Any:
        together.append(len(written))
        if any(each.request.question == QUESTIONS[1] for each in written):
            raise NumericsError("NaN")
        return really(runtime, written)

    monkeypatch.setattr(scheduler_module, "finished", fails)
    monkeypatch.setattr(scheduler, "_read_tokens", 10**6)
    heard = [Heard() for _ in requests]
    with scheduler._changed:  # so that all of them are read in one turn
        for request, each in zip(requests, heard, strict=True):
            scheduler.submit(request, each)
    with pytest.raises(NumericsError):
        heard[1].read()
    assert [bare(heard[0].read()), bare(heard[2].read())] == [expected[0], expected[2]]
    assert together[0] > 1


def test_closing_cancels_what_runs_and_what_waits(engine: Finch) -> None:
    scheduler = Scheduler(engine.runtime, running=1)
    heard = [asked(scheduler, request_of(engine, question, texts(4), max_new_tokens=100)) for question in QUESTIONS[:3]]
    scheduler.close()
    assert all(each.times == 1 for each in heard)
    assert isinstance(heard[2].error, Cancelled)
    assert asked(scheduler, request_of(engine, "Who?", texts(3))).read().text == engine.ask("Who?", texts(3)).text


@pytest.mark.parametrize("closes", [True, False])
def test_no_thread_is_left_where_nothing_is_asked(closes: bool, engine: Finch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler_module, "_IDLE", 60 if closes else 0.05)
    before = set(threading.enumerate())
    scheduler = Scheduler(engine.runtime)
    for question in QUESTIONS[:2]:
        asked(scheduler, request_of(engine, question, texts(3))).read()
    if closes:
        scheduler.close()
    deadline = time.monotonic() + 10
    while {thread.name for thread in set(threading.enumerate()) - before} & {"finch-scheduler"}:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert asked(scheduler, request_of(engine, "Who?", texts(3))).read().text == engine.ask("Who?", texts(3)).text
    scheduler.close()


def test_answers_of_a_model_with_a_cache_of_its_own_come_one_after_another() -> None:
    finch = new_finch("gemma3_text")
    assert finch.runtime.no_loop
    scheduler = Scheduler(finch.runtime, running=3)
    expected = [finch.ask(question, texts(5), max_new_tokens=6).text for question in QUESTIONS[:5]]
    requests = [request_of(finch, question, texts(5), max_new_tokens=6) for question in QUESTIONS[:5]]
    heard = [asked(scheduler, request) for request in requests]
    assert [each.read().text for each in heard] == expected
    cancelled = request_of(finch, "Who?", texts(5), max_new_tokens=80)
    last = asked(scheduler, request_of(finch, QUESTIONS[0], texts(5), max_new_tokens=6))
    given_up = asked(scheduler, cancelled)
    cancelled.cancellation.cancel()
    with pytest.raises(Cancelled):
        given_up.read()
    assert last.read().text == expected[0]
    scheduler.close()


def test_places_have_room_for_longer_answers_to_come(monkeypatch: pytest.MonkeyPatch) -> None:
    finch = small_finch()
    graphs = finch.runtime.graphs
    monkeypatch.setattr(graphs, "enabled", True)
    taken: list[tuple[int, int]] = []
    really = graphs.take

    def recorded(like: Any, answers: int, tokens: int) -> Any:
        taken.append((answers, tokens))
        return really(like, answers, tokens)

    monkeypatch.setattr(graphs, "take", recorded)
    scheduler = Scheduler(finch.runtime, running=3)
    requests = [
        request_of(finch, question, texts(4), max_new_tokens=40 + 40 * n) for n, question in enumerate(QUESTIONS[:3])
    ]
    heard = [Heard() for _ in requests]
    with scheduler._changed:  # one turn for all
        for request, each in zip(requests, heard, strict=True):
            scheduler.submit(request, each)
    for request, each in zip(requests, heard, strict=True):
        assert each.read().report.new_tokens == request.sampling.max_new_tokens
    assert [answers for answers, _ in taken] == [3]  # one step, never a larger one
    assert all(tokens & (tokens - 1) == 0 for _, tokens in taken)
