from __future__ import annotations

import asyncio
import contextvars
import gc
import threading
import time
import weakref
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import pytest
import torch

from finch_rag.engine import Finch
from finch_rag.errors import InputError, NumericsError, WindowError
from finch_rag.models.cache import CompressedCache

from .small import small_finch, texts

QUESTION = "When was the lighthouse built?"
TOKENS = 30
PATIENCE = 20.0  # seconds for what takes a moment; a test that needs them fails


class Passes:
    """Counts a model's forward passes behind the passages, and holds one of them until it is let go."""

    def __init__(self, finch: Finch, hold: int = 0, seconds: float = 0.0) -> None:
        self.count = 0
        self.held, self.let_go = threading.Event(), threading.Event()
        self._hold, self._seconds = hold, seconds
        finch.model.register_forward_pre_hook(self._pass)

    def _pass(self, *_: Any) -> None:
        self.count += 1
        time.sleep(self._seconds)
        if self.count == self._hold:
            self.held.set()
            assert self.let_go.wait(PATIENCE)

    async def are_held(self) -> None:
        assert await asyncio.to_thread(self.held.wait, PATIENCE)


async def freed(caches: weakref.WeakSet[CompressedCache]) -> bool:
    """Whether all caches go, soon: a thread may still be on its way out."""
    for attempt in range(100):
        if caches and attempt % 20 == 0:
            gc.collect()
        if not caches:
            return True
        await asyncio.sleep(0.01)
    return False


async def deltas(stream: AsyncIterator[str]) -> list[str]:
    return [delta async for delta in stream]


def test_aask_gives_what_ask_gives(finch: Finch) -> None:
    expected, found = finch.ask(QUESTION, texts(8)), asyncio.run(finch.aask(QUESTION, texts(8)))
    assert (found.text, found.citations) == (expected.text, expected.citations)
    assert found.report.new_tokens == expected.report.new_tokens


def test_astream_gives_what_stream_gives(finch: Finch) -> None:
    stream = finch.astream(QUESTION, texts(8), budget=30)
    expected = finch.stream(QUESTION, texts(8), budget=30)
    found = asyncio.run(deltas(stream))
    assert found == list(expected)
    assert len(found) > 1
    assert (stream.answer.text, stream.answer.citations) == (expected.answer.text, expected.answer.citations)
    assert stream.answer.report.budget == 30


def test_an_ended_stream_stays_ended(finch: Finch) -> None:
    async def twice() -> tuple[list[str], list[str]]:
        stream = finch.astream(QUESTION, texts(3))
        return await deltas(stream), await deltas(stream)

    first, second = asyncio.run(twice())
    assert first
    assert second == []


def test_a_stream_has_no_answer_before_its_end(finch: Finch) -> None:
    async def ask() -> None:
        stream = finch.astream(QUESTION, texts(3))
        with pytest.raises(InputError, match="to its end"):
            _ = stream.answer
        await anext(stream)
        with pytest.raises(InputError, match="to its end"):
            _ = stream.answer
        await stream.aclose()

    asyncio.run(ask())


def test_deltas_arrive_while_the_answer_is_made() -> None:
    finch = small_finch(max_new_tokens=TOKENS)
    passes = Passes(finch)

    async def counts() -> list[int]:
        return [passes.count async for _ in finch.astream(QUESTION, texts(8))]

    seen = asyncio.run(counts())
    assert seen == sorted(set(seen))
    assert seen[0] < passes.count / 2


async def ticks_during(answer: Coroutine[Any, Any, Any]) -> int:
    """How often another task has a turn before an answer is there."""
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.001)
            ticks += 1

    ticker = asyncio.create_task(tick())
    await asyncio.sleep(0)
    await answer
    ticker.cancel()
    return ticks


def test_the_loop_is_not_blocked() -> None:
    finch = small_finch(max_new_tokens=TOKENS)
    Passes(finch, seconds=0.005)

    async def blocking() -> None:
        finch.ask(QUESTION, texts(8))

    async def streaming() -> None:
        await deltas(finch.astream(QUESTION, texts(8)))

    assert asyncio.run(ticks_during(blocking())) <= 1
    assert asyncio.run(ticks_during(finch.aask(QUESTION, texts(8)))) > 10
    assert asyncio.run(ticks_during(streaming())) > 10


def test_two_at_once_give_what_they_give_alone(finch: Finch) -> None:
    questions = [QUESTION, "who built the bridge?"]
    alone = [finch.ask(question, texts(8)) for question in questions]

    async def together() -> list[Any]:
        streams = [finch.astream(question, texts(8)) for question in questions]
        await asyncio.gather(*(deltas(stream) for stream in streams))
        answers = await asyncio.gather(*(finch.aask(question, texts(8)) for question in questions))
        return [*(stream.answer for stream in streams), *answers]

    found = asyncio.run(together())
    assert alone[0].text != alone[1].text
    assert [(a.text, a.citations) for a in found] == [(a.text, a.citations) for a in alone] * 2


def test_two_answers_are_made_at_the_same_time() -> None:
    finches = [small_finch(), small_finch()]
    held = [Passes(finch, hold=1) for finch in finches]

    async def together() -> None:
        answers = asyncio.gather(*(finch.aask(QUESTION, texts(3)) for finch in finches))
        for passes in held:
            await passes.are_held()
        for passes in held:
            passes.let_go.set()
        await answers

    asyncio.run(together())


def test_a_task_cancelled_while_the_passages_are_read_ends_the_reading(
    finch: Finch, caches: weakref.WeakSet[CompressedCache]
) -> None:
    chunks: list[int] = []
    cancelled = threading.Event()

    async def ask() -> None:
        def on_progress(stage: str, done: int, total: int) -> None:
            chunks.append(done)
            loop.call_soon_threadsafe(task.cancel)
            assert cancelled.wait(PATIENCE)

        loop = asyncio.get_running_loop()
        task = asyncio.create_task(finch.aask(QUESTION, texts(12), on_progress=on_progress))
        with pytest.raises(asyncio.CancelledError):
            await task
        cancelled.set()
        assert await freed(caches)

    assert finch.ask(QUESTION, texts(12)).report.chunks > 2
    asyncio.run(ask())
    assert len(chunks) == 1


def test_a_task_cancelled_while_it_answers_ends_the_answer(caches: weakref.WeakSet[CompressedCache]) -> None:
    finch = small_finch(max_new_tokens=TOKENS)
    assert finch.ask(QUESTION, texts(8)).report.new_tokens > 10
    passes = Passes(finch, hold=3)

    async def ask() -> None:
        task = asyncio.create_task(finch.aask(QUESTION, texts(8)))
        await passes.are_held()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):  # at once, not when the pass is over
            await task
        assert len(caches) == 1
        passes.let_go.set()
        assert await freed(caches)

    asyncio.run(ask())
    assert passes.count == 3


def test_a_task_cancelled_before_it_starts_makes_nothing() -> None:
    finch = small_finch()
    passes = Passes(finch)

    async def ask() -> None:
        task = asyncio.create_task(finch.aask(QUESTION, texts(8)))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(ask())
    assert passes.count == 0


def test_a_time_limit_ends_the_answer(caches: weakref.WeakSet[CompressedCache]) -> None:
    finch = small_finch(max_new_tokens=TOKENS)
    passes = Passes(finch, hold=2)

    async def ask() -> None:
        with pytest.raises(asyncio.TimeoutError):
            async with asyncio.timeout(0.2):
                await finch.aask(QUESTION, texts(8))
        passes.let_go.set()
        assert await freed(caches)

    asyncio.run(ask())
    assert passes.count <= 2


def test_an_engine_answers_as_before_after_a_cancellation() -> None:
    finch = small_finch(max_new_tokens=TOKENS)
    expected = finch.ask(QUESTION, texts(8)).text
    passes = Passes(finch, hold=3)

    async def ask() -> str:
        task = asyncio.create_task(finch.aask(QUESTION, texts(8)))
        await passes.are_held()
        task.cancel()
        passes.let_go.set()
        return (await finch.aask(QUESTION, texts(8))).text

    assert asyncio.run(ask()) == expected


@pytest.mark.parametrize(
    ("question", "options", "error"),
    [("", {}, InputError), (QUESTION, {"budget": 5000}, WindowError), (QUESTION, {"budgett": 1}, InputError)],
)
def test_bad_input_reaches_the_awaiter(finch: Finch, question: str, options: Any, error: type[Exception]) -> None:
    stream = finch.astream(question, texts(3), **options)  # not yet
    with pytest.raises(error):
        asyncio.run(deltas(stream))
    with pytest.raises(error):
        asyncio.run(finch.aask(question, texts(3), **options))


def test_errors_of_reading_and_decoding_reach_the_awaiter(caches: weakref.WeakSet[CompressedCache]) -> None:
    finch = small_finch()

    def stop(*_: Any) -> None:
        raise LookupError("stop")

    with pytest.raises(LookupError, match="stop"):
        asyncio.run(finch.aask(QUESTION, texts(3), on_progress=stop))
    with torch.no_grad():
        finch.model.get_parameter("lm_head.weight").fill_(float("nan"))
    with pytest.raises(NumericsError):
        asyncio.run(finch.aask(QUESTION, texts(3)))
    assert asyncio.run(freed(caches))


def test_a_callback_sees_the_context_of_its_task(finch: Finch) -> None:
    name: contextvars.ContextVar[str] = contextvars.ContextVar("name", default="nobody")
    seen: set[str] = set()

    async def ask(who: str) -> None:
        name.set(who)
        await finch.aask(QUESTION, texts(3), on_progress=lambda *_: seen.add(name.get()))

    async def together() -> None:
        await asyncio.gather(ask("Ann"), ask("Bob"))

    asyncio.run(together())
    assert seen == {"Ann", "Bob"}


def test_aclose_ends_the_generation_and_frees_the_cache(caches: weakref.WeakSet[CompressedCache]) -> None:
    finch = small_finch(max_new_tokens=TOKENS)
    passes = Passes(finch)

    async def ask() -> None:
        stream = finch.astream(QUESTION, texts(8))
        await anext(stream)
        assert len(caches) == 1
        done = passes.count
        await stream.aclose()
        assert passes.count == done
        assert await freed(caches)
        assert await deltas(stream) == []
        await stream.aclose()  # again does no harm

    asyncio.run(ask())


def test_a_stream_closed_before_its_start_reads_nothing() -> None:
    finch = small_finch()
    passes = Passes(finch)
    chunks: list[int] = []

    async def ask() -> None:
        stream = finch.astream(QUESTION, texts(8), on_progress=lambda stage, done, total: chunks.append(done))
        await stream.aclose()
        assert await deltas(stream) == []

    asyncio.run(ask())
    assert (passes.count, chunks) == (0, [])


def test_aclose_after_the_end_keeps_the_answer(finch: Finch) -> None:
    async def ask() -> str:
        stream = finch.astream(QUESTION, texts(3))
        await deltas(stream)
        await stream.aclose()
        return stream.answer.text

    assert asyncio.run(ask()) == finch.ask(QUESTION, texts(3)).text


def test_a_cancelled_reader_may_close_its_stream(caches: weakref.WeakSet[CompressedCache]) -> None:
    finch = small_finch(max_new_tokens=TOKENS)
    passes = Passes(finch, hold=3)

    async def read() -> None:
        stream = finch.astream(QUESTION, texts(8))
        try:
            await deltas(stream)
        finally:
            await stream.aclose()

    async def ask() -> None:
        task = asyncio.create_task(read())
        await passes.are_held()
        task.cancel()
        asyncio.get_running_loop().call_later(0.1, passes.let_go.set)
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await freed(caches)

    asyncio.run(ask())
    assert passes.count == 3


def test_leaving_the_loop_early_frees_the_cache(caches: weakref.WeakSet[CompressedCache]) -> None:
    finch = small_finch(max_new_tokens=TOKENS)
    passes = Passes(finch)

    async def ask() -> None:
        async for _ in finch.astream(QUESTION, texts(8)):
            assert len(caches) == 1
            break
        done = passes.count
        assert await freed(caches)
        assert passes.count == done

    asyncio.run(ask())


def test_any_thread_may_cancel_a_stream_that_another_one_reads(caches: weakref.WeakSet[CompressedCache]) -> None:
    finch = small_finch(max_new_tokens=TOKENS)
    passes = Passes(finch, hold=3)
    stream = finch.stream(QUESTION, texts(8))
    found: list[str] = []
    reader = threading.Thread(target=lambda: found.extend(stream))
    reader.start()
    assert passes.held.wait(PATIENCE)
    stream.cancel()
    passes.let_go.set()
    reader.join(PATIENCE)
    assert not reader.is_alive()
    assert passes.count == 3
    assert len(found) <= 3
    assert next(stream, None) is None
    gc.collect()
    assert len(caches) == 0
    with pytest.raises(InputError):
        _ = stream.answer


def test_a_stream_cancelled_while_it_reads_ends_without_text(finch: Finch) -> None:
    chunks: list[int] = []

    def on_progress(stage: str, done: int, total: int) -> None:
        chunks.append(done)
        stream.cancel()

    stream = finch.stream(QUESTION, texts(12), on_progress=on_progress)
    assert list(stream) == []
    assert len(chunks) == 1


def test_a_stream_cancelled_before_its_start_reads_nothing(finch: Finch) -> None:
    chunks: list[int] = []
    stream = finch.stream(QUESTION, texts(12), on_progress=lambda stage, done, total: chunks.append(done))
    stream.cancel()
    assert list(stream) == []
    assert chunks == []


def test_cancelling_an_ended_stream_keeps_its_answer(finch: Finch) -> None:
    stream = finch.stream(QUESTION, texts(3))
    answer = stream.read()
    stream.cancel()
    assert stream.answer is answer
