from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import AsyncIterator
from typing import Any

import pytest
from li_support import (
    OTHER_QUESTION,
    QUESTION,
    calls,
    cancelled_during,
    counted_passes,
    finch_llm,
    listening,
    new_engine,
    on_each_pass,
    passages,
)
from llama_index.core.callbacks import CallbackManager, CBEventType, EventPayload, LlamaDebugHandler
from llama_index.core.llms import ChatMessage
from llama_index.llms.finch import FinchLLM, PassagesMessage

from finch_rag import InputError, ModelError
from finch_rag.models.cache import CompressedCache

MESSAGE = PassagesMessage(QUESTION, passages())


async def collected(stream: AsyncIterator[Any]) -> list[Any]:
    return [piece async for piece in stream]


def asked(method: str, question: str = QUESTION) -> Any:
    return question if "complete" in method else [PassagesMessage(question, passages())]


async def outcome(llm: FinchLLM, method: str, question: str = QUESTION, **options: Any) -> Any:
    """The response of an asynchronous call, of a stream the last piece."""
    made = await getattr(llm, method)(asked(method, question), **options)
    return (await collected(made))[-1] if "stream" in method else made


METHODS = ["acomplete", "astream_complete", "achat", "astream_chat"]


@pytest.mark.parametrize("method", METHODS)
def test_each_call_gives_what_its_blocking_twin_gives(method: str) -> None:
    llm = finch_llm()
    twin = getattr(llm, method.removeprefix("a").removeprefix("stream_"))(asked(method))
    made = asyncio.run(outcome(llm, method))
    assert str(made) == str(twin)
    assert made.additional_kwargs["citations"] == twin.additional_kwargs["citations"]
    assert made.raw["report"]["new_tokens"] == twin.raw["report"]["new_tokens"] == 8


@pytest.mark.parametrize("method", ["astream_complete", "astream_chat"])
def test_deltas_join_to_the_text_and_the_last_piece_adds_the_report(method: str) -> None:
    async def run() -> list[Any]:
        return await collected(await getattr(finch_llm(), method)(asked(method)))

    *earlier, last = asyncio.run(run())
    assert len(earlier) > 1
    assert "".join(piece.delta for piece in earlier) == str(last).removeprefix("assistant: ")
    assert not any(piece.additional_kwargs for piece in earlier)
    assert (last.delta, bool(last.additional_kwargs["report"])) == ("", True)


@pytest.mark.parametrize("method", METHODS)
def test_options_of_a_call_are_obeyed(method: str) -> None:
    made = asyncio.run(outcome(finch_llm(), method, max_tokens=3))
    assert made.raw["report"]["new_tokens"] == 3


@pytest.mark.parametrize("method", METHODS)
def test_the_loop_runs_on_while_a_call_reads(method: str) -> None:
    llm = finch_llm()
    waited: list[bool] = []

    async def run() -> None:
        ticked, loop = threading.Event(), asyncio.get_running_loop()

        def hook() -> None:  # a loop that is blocked by the forward pass cannot set the event
            if not waited:
                loop.call_soon_threadsafe(ticked.set)
                waited.append(ticked.wait(5))

        with on_each_pass(llm.engine, hook):
            await outcome(llm, method)

    asyncio.run(run())
    assert waited == [True]


def test_pieces_arrive_as_they_are_made() -> None:
    llm = finch_llm()

    async def run() -> list[int]:
        with counted_passes(llm.engine) as passes:
            return [len(passes) async for _ in await llm.astream_chat([MESSAGE])]

    made = asyncio.run(run())
    assert made[0] < made[1] < made[-1]


@pytest.mark.parametrize(
    ("method", "at_pass"),
    [*((method, 12) for method in METHODS), ("achat", 2), ("astream_chat", 2)],  # while it answers, while it reads
)
def test_a_cancelled_task_stops_and_frees_the_cache(
    method: str, at_pass: int, caches: weakref.WeakSet[CompressedCache]
) -> None:
    llm = finch_llm(chunk_size=100, max_new_tokens=50)
    assert asyncio.run(cancelled_during(llm.engine, at_pass, lambda: outcome(llm, method))) == at_pass
    gc.collect()
    assert len(caches) == 0
    assert llm.complete(QUESTION).text


def test_a_stream_that_is_left_stops(caches: weakref.WeakSet[CompressedCache]) -> None:
    llm = finch_llm(max_new_tokens=50)

    async def run() -> int:
        stream = await llm.astream_chat([MESSAGE])
        async for _ in stream:
            break
        await stream.aclose()
        return len(passes)

    with counted_passes(llm.engine) as passes:
        done = asyncio.run(run())
    assert len(passes) == done < 50
    gc.collect()
    assert len(caches) == 0


@pytest.mark.parametrize("method", METHODS)
def test_two_calls_at_once_get_what_they_would_get_alone(method: str) -> None:
    llm = finch_llm()
    expected = [str(asyncio.run(outcome(llm, method, question))) for question in (QUESTION, OTHER_QUESTION)]
    both = threading.Barrier(2, timeout=10)
    passes: list[None] = []

    def hook() -> None:
        passes.append(None)
        if len(passes) <= 2:  # one of each call: the first waits inside its pass until the other's has begun
            both.wait()

    async def run() -> list[str]:
        made = await asyncio.gather(*(outcome(llm, method, question) for question in (QUESTION, OTHER_QUESTION)))
        return [str(response) for response in made]

    with on_each_pass(llm.engine, hook):
        assert asyncio.run(run()) == expected
    assert not both.broken
    assert expected[0] != expected[1]


@pytest.mark.parametrize("method", METHODS)
def test_bad_input_is_an_error_of_the_call_and_ends_its_event(method: str) -> None:
    handler = LlamaDebugHandler(print_trace_on_end=False)
    llm = finch_llm(callback_manager=CallbackManager([handler]))
    with pytest.raises(InputError, match="max_tokenz") as caught:
        asyncio.run(outcome(llm, method, max_tokenz=3))
    ((_, end),) = handler.get_event_pairs(CBEventType.LLM)
    assert end.payload == {EventPayload.EXCEPTION: caught.value}


@pytest.mark.parametrize("method", METHODS)
def test_an_unknown_model_is_an_error_of_the_first_call(method: str) -> None:
    with pytest.raises(ModelError, match="/no/such/folder"):
        asyncio.run(outcome(FinchLLM("/no/such/folder"), method))


@pytest.mark.parametrize("method", METHODS)
def test_callbacks_and_instrumentation_see_the_call(method: str) -> None:
    handler = LlamaDebugHandler(print_trace_on_end=False)
    with listening() as events:
        made = asyncio.run(outcome(finch_llm(callback_manager=CallbackManager([handler])), method))
    ((_, end),) = handler.get_event_pairs(CBEventType.LLM)
    assert made in (end.payload or {}).values()
    assert calls(events) == 1
    names = [type(event).__name__ for event in events]
    assert names[0].endswith("StartEvent")
    assert names[-1].endswith("EndEvent")
    assert ("InProgress" in names[1]) == ("stream" in method)


def test_the_model_is_loaded_beside_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded_in: list[threading.Thread] = []

    def load(*_: Any, **__: Any) -> Any:
        loaded_in.append(threading.current_thread())
        return new_engine()

    monkeypatch.setattr("llama_index.llms.finch.base.shared_engine", load)
    llm = FinchLLM("some/model", max_new_tokens=2)
    assert asyncio.run(llm.achat([ChatMessage(content=QUESTION)])).message.content
    assert loaded_in
    assert loaded_in[0] is not threading.main_thread()
