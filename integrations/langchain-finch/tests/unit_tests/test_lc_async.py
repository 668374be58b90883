"""The event loop runs on while a model works, and a task that is cancelled ends the work."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from typing import Any

import pytest
from langchain_classic.chains import create_retrieval_chain
from langchain_core.documents import Document
from langchain_finch import ChatFinch, FinchLLM, create_finch_documents_chain
from lc_support import QUESTION, SETTINGS, Fixed

import finch_rag.decode.generation
import finch_rag.decode.sampling
from finch_rag import Finch
from finch_rag.models.cache import CompressedCache

BOTH = pytest.mark.parametrize("kind", [ChatFinch, FinchLLM])


@BOTH
@pytest.mark.parametrize("way", ["ainvoke", "astream"])
async def test_the_loop_runs_on_while_a_model_is_loaded_reads_and_answers(
    kind: Any, way: str, folder: str, documents: list[Document], monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = asyncio.get_running_loop()
    ran: dict[str, list[bool]] = {"load": [], "read": [], "answer": []}

    def turn_of_the_loop(stage: str) -> None:
        went = threading.Event()
        loop.call_soon_threadsafe(went.set)
        ran[stage].append(went.wait(5))

    load, sampler = Finch.from_pretrained, finch_rag.decode.sampling.sampler

    def loading(*args: Any, **settings: Any) -> Finch:
        turn_of_the_loop("load")
        return load(*args, **settings)

    def answering(*args: Any) -> Any:
        choose = sampler(*args)

        def chosen(logits: Any) -> Any:
            turn_of_the_loop("answer")
            return choose(logits)

        return chosen

    monkeypatch.setattr(Finch, "from_pretrained", loading)
    monkeypatch.setattr(finch_rag.decode.generation, "sampler", answering)
    # A device by name, so that the engine is none of the other tests'.
    model = kind(model=folder, device="cpu", **SETTINGS)
    bound = model.bind(documents=documents, on_progress=lambda *_: turn_of_the_loop("read"))
    if way == "ainvoke":
        await bound.ainvoke(QUESTION)
    else:
        assert [piece async for piece in bound.astream(QUESTION)]
    assert [len(turns) for turns in ran.values()] == [1, len(ran["read"]), SETTINGS["max_tokens"]]
    assert len(ran["read"]) > 2
    assert all(all(turns) for turns in ran.values())


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One item a token that is generated."""
    made: list[int] = []
    sampler = finch_rag.decode.sampling.sampler

    def counting(*args: Any) -> Any:
        choose = sampler(*args)

        def chosen(logits: Any) -> Any:
            made.append(len(made))
            return choose(logits)

        return chosen

    monkeypatch.setattr(finch_rag.decode.generation, "sampler", counting)
    return made


def long_answer(kind: Any, folder: str, documents: list[Document]) -> Any:
    return kind(model=folder, **{**SETTINGS, "max_tokens": 2000}).bind(documents=documents)


async def freed(caches: weakref.WeakSet[CompressedCache]) -> bool:
    for _ in range(100):
        gc.collect()
        if not caches:
            return True
        await asyncio.sleep(0.02)
    return False


@BOTH
async def test_a_cancelled_stream_ends_the_generation(
    kind: Any,
    folder: str,
    documents: list[Document],
    steps: list[int],
    caches: weakref.WeakSet[CompressedCache],
) -> None:
    pieces: list[Any] = []

    async def consume() -> None:
        async for piece in long_answer(kind, folder, documents).astream(QUESTION):
            pieces.append(piece)

    task = asyncio.create_task(consume())
    while len(pieces) < 3:
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await freed(caches)
    made = len(steps)
    await asyncio.sleep(0.1)
    assert len(steps) == made < 1000


@BOTH
async def test_a_cancelled_call_ends_the_generation(
    kind: Any,
    folder: str,
    documents: list[Document],
    steps: list[int],
    caches: weakref.WeakSet[CompressedCache],
) -> None:
    task = asyncio.create_task(long_answer(kind, folder, documents).ainvoke(QUESTION))
    while len(steps) < 3:
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await freed(caches)
    made = len(steps)
    await asyncio.sleep(0.1)
    assert len(steps) == made < 1000


@BOTH
async def test_a_stream_that_is_left_ends_the_generation(
    kind: Any,
    folder: str,
    documents: list[Document],
    steps: list[int],
    caches: weakref.WeakSet[CompressedCache],
) -> None:
    async for _ in long_answer(kind, folder, documents).astream(QUESTION):
        break
    assert await freed(caches)
    for _ in long_answer(kind, folder, documents).stream(QUESTION):
        break
    assert await freed(caches)
    assert len(steps) < 100


@BOTH
async def test_a_call_that_is_cancelled_while_it_reads_stops_reading(
    kind: Any, folder: str, documents: list[Document], caches: weakref.WeakSet[CompressedCache]
) -> None:
    read: list[int] = []
    reading, go_on = threading.Event(), threading.Event()

    def progress(stage: str, done: int, total: int) -> None:
        read.append(done)
        reading.set()
        go_on.wait(10)

    model = kind(model=folder, **SETTINGS).bind(documents=documents, on_progress=progress)
    task = asyncio.create_task(model.ainvoke(QUESTION))
    await asyncio.to_thread(reading.wait, 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    go_on.set()
    assert await freed(caches)
    assert len(read) == 1


async def test_a_retrieval_chain_that_is_cancelled_ends_the_generation(
    folder: str, documents: list[Document], steps: list[int], caches: weakref.WeakSet[CompressedCache]
) -> None:
    model = ChatFinch(model=folder, **{**SETTINGS, "max_tokens": 2000})
    chain = create_retrieval_chain(Fixed(found=documents), create_finch_documents_chain(model))
    pieces: list[Any] = []

    async def consume() -> None:
        async for piece in chain.astream({"input": QUESTION}):
            if "answer" in piece:
                pieces.append(piece)

    task = asyncio.create_task(consume())
    while len(pieces) < 3:
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await freed(caches)
    made = len(steps)
    await asyncio.sleep(0.1)
    assert len(steps) == made < 1000
