"""Many questions at once, from threads and from tasks, some of which are cancelled: all others as one by one."""

from __future__ import annotations

import asyncio
import gc
import json
import random
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
from langchain_finch import ChatFinch
from llama_index.core.llms import ChatMessage
from llama_index.llms.finch import FinchLLM

from finch_rag.bench.serving import served
from finch_rag.engine import Finch
from finch_rag.models.cache import CompressedCache
from finch_rag.serve.settings import ServeSettings
from finch_rag.store.store import PassageStore

from ..small import small_finch, texts
from .tally import RAW, RECOVERED, WRONG, Tally

_PASSAGES = 8
_SECONDS = 120.0  # for what takes a moment; what takes longer hangs


@dataclass(frozen=True)
class Face:
    """A way to ask.

    Attributes:
        pieces: An answer in pieces, in this thread; may be left early.
        whole: An answer, awaited; may be cancelled.
    """

    pieces: Callable[[str], Iterator[str]]
    whole: Callable[[str], Awaitable[str]]


def _prompt(question: str) -> str:
    return "\n\n".join([*texts(_PASSAGES), question])


def _engine_face(finch: Finch, store: PassageStore | None = None) -> Face:
    passages = [] if store else texts(_PASSAGES)

    def pieces(question: str) -> Iterator[str]:
        with finch.stream(question, passages, store=store) as stream:
            yield from stream

    async def whole(question: str) -> str:
        return (await finch.aask(question, passages, store=store)).text

    return Face(pieces, whole)


def _llama_index_face(finch: Finch) -> Face:
    llm = FinchLLM(engine=finch)

    def pieces(question: str) -> Iterator[str]:
        return (str(part.delta) for part in llm.stream_complete(_prompt(question)))

    async def whole(question: str) -> str:
        return str((await llm.achat([ChatMessage(role="user", content=_prompt(question))])).message.content)

    return Face(pieces, whole)


def _langchain_face(finch: Finch) -> Face:
    llm = ChatFinch(engine=finch)

    def pieces(question: str) -> Iterator[str]:
        return (str(part.text) for part in llm.stream(_prompt(question)))

    async def whole(question: str) -> str:
        return str((await llm.ainvoke(_prompt(question))).text)

    return Face(pieces, whole)


def _server_face(url: str) -> Face:
    documents = [{"id": str(place), "text": text} for place, text in enumerate(texts(_PASSAGES))]

    def body(question: str, stream: bool) -> dict[str, Any]:
        messages = [{"role": "user", "content": question}]
        return {"messages": messages, "documents": documents, "temperature": 0, "stream": stream}

    def pieces(question: str) -> Iterator[str]:
        with (
            httpx.Client(timeout=_SECONDS) as client,
            client.stream("POST", f"{url}/v1/chat/completions", json=body(question, True)) as reply,
        ):
            reply.raise_for_status()
            for line in reply.iter_lines():
                if line.startswith("data: {"):
                    for choice in json.loads(line.removeprefix("data: "))["choices"]:
                        yield choice["delta"].get("content") or ""

    async def whole(question: str) -> str:
        async with httpx.AsyncClient(timeout=_SECONDS) as client:
            reply = await client.post(f"{url}/v1/chat/completions", json=body(question, False))
            reply.raise_for_status()
            return str(reply.json()["choices"][0]["message"]["content"])

    return Face(pieces, whole)


@contextmanager
def _faces(folder: Path) -> Iterator[dict[str, Face]]:
    finch = small_finch(alone_heads=[(0, 3), (1, 0)], reread=True, max_new_tokens=24)
    with finch.open_store(folder / "store") as store, served(finch, ServeSettings(running=6, waiting=400)) as server:
        store.add(texts(_PASSAGES))
        yield {
            "engine": _engine_face(finch),
            "store": _engine_face(finch, store=store),
            "FinchLLM": _llama_index_face(finch),
            "ChatFinch": _langchain_face(finch),
            "server": _server_face(server.url),
        }


def _read(face: Face, question: str, cancelled: bool) -> str | None:
    """A text, or None where it was left after its first piece."""
    pieces = face.pieces(question)
    if not cancelled:
        return "".join(pieces)
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]  # a generator's
    return None


async def _awaited(face: Face, question: str, cancel_after: float | None) -> str | None:
    """A text, or None where the task was cancelled before it was there."""
    task = asyncio.ensure_future(face.whole(question))
    if cancel_after is not None:
        await asyncio.sleep(cancel_after)
        task.cancel()
    try:
        return await task
    except asyncio.CancelledError:
        return None


def attack(
    folder: Path, questions: int = 200, threads: int = 8, tasks: int = 50, cancelled: float = 0.2, seed: int = 0
) -> list[Tally]:
    """Asks by each face as many questions from threads, and as many from tasks at the same time.

    Args:
        folder: For a store.
        questions: Of each face, from threads; as many again from tasks.
        threads: How many.
        tasks: The most that run at the same time.
        cancelled: Which part of them.
        seed: Of what is cancelled, and when.
    """
    alive: weakref.WeakSet[CompressedCache] = weakref.WeakSet()
    tallies = []
    with _caches_in(alive), _faces(folder) as faces:
        for name, face in faces.items():
            tally = Tally(f"{name}: {threads} threads and {tasks} tasks at once, a fifth cancelled")
            tallies.append(tally)
            started = time.perf_counter()
            right = {f"Who wrote letter {number}?": "" for number in range(questions)}
            for question in right:
                right[question] = "".join(face.pieces(question))
            if len(set(right.values())) < min(10, questions // 2):
                tally.note(WRONG, "the questions have the same answers, so nothing is compared")
            alone, before = time.perf_counter() - started, len(alive)  # the reader of passages alone has one
            drawn = random.Random(f"{seed} {name}")
            orders = [(question, drawn.random() < cancelled, drawn.uniform(0, 0.1)) for question in right]
            worker = threading.Thread(
                target=_ask_at_once, args=(face, orders, right, threads, tasks, tally), daemon=True
            )
            worker.start()
            worker.join(_SECONDS + 20 * alone)
            if worker.is_alive():
                tally.note(RAW, f"{name} hangs")
                return tallies
            if not _gone(alive, before):
                tally.note(WRONG, f"{len(alive) - before} caches are left")
    return tallies


def _ask_at_once(
    face: Face, orders: list[tuple[str, bool, float]], right: dict[str, str], threads: int, tasks: int, tally: Tally
) -> None:
    def judge(question: str, asked: Callable[[], str | None], wanted: bool) -> None:
        with tally.judged():
            found = asked()
            good = found == right[question] if found is not None else not wanted
            tally.note(RECOVERED if good else WRONG, f"{question}: {found!r} in place of {right[question]!r}")

    async def all_tasks() -> None:
        free = asyncio.Semaphore(tasks)

        async def one(question: str, cancel: bool, after: float) -> None:
            async with free:
                try:
                    found = await asyncio.wait_for(_awaited(face, question, after if cancel else None), _SECONDS)
                except Exception as error:
                    raised = error

                    def again() -> str | None:
                        raise raised

                    judge(question, again, not cancel)
                else:
                    judge(question, lambda: found, not cancel)

        await asyncio.gather(*(one(*order) for order in orders))

    loop = threading.Thread(target=lambda: asyncio.run(all_tasks()))
    loop.start()
    with ThreadPoolExecutor(threads) as pool:
        for question, cancel, _ in orders:
            pool.submit(judge, question, partial(_read, face, question, cancel), not cancel)
    loop.join()


@contextmanager
def _caches_in(alive: weakref.WeakSet[CompressedCache]) -> Iterator[None]:
    """Takes note of each cache that is made."""
    init = CompressedCache.__init__

    def noted(cache: CompressedCache, *args: Any) -> None:
        init(cache, *args)
        alive.add(cache)

    CompressedCache.__init__ = noted  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        CompressedCache.__init__ = init  # type: ignore[method-assign]


def _gone(alive: weakref.WeakSet[CompressedCache], before: int) -> bool:
    """Whether no more caches are left than before, soon: what was cancelled may still be on its way out."""
    for attempt in range(100):
        if attempt % 25 == 24:
            gc.collect()
        if len(alive) <= before:
            return True
        time.sleep(0.1)
    return False
