"""Memory that runs out at any place: the right answer, or one line; and then the right answer, every time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from finch_rag import CompressedCache, PassageStore
from finch_rag.answering import Begun
from finch_rag.batch import read_together
from finch_rag.decode.running import RunningAnswer, RunningBatch
from finch_rag.engine import Finch
from finch_rag.errors import DeviceMemoryError
from finch_rag.models.forward import memory_guard
from finch_rag.prompts.passages import Passage
from finch_rag.resolving import resolve

from .small import small_finch, texts

QUESTION, OTHER = "When was the lighthouse built?", "Who drew the maps?"
PASSAGES = [Passage(text, id=str(number)) for number, text in enumerate(texts(6))]
CHUNK = 256
PLACES = 14  # of each way that are tried, spread over all


class RunsOut(TorchDispatchMode):
    """Memory for so many tensors, and none for the next one; for all after it, again.

    Args:
        after: How many; None for as many as are asked for.
    """

    def __init__(self, after: int | None) -> None:
        super().__init__()
        self.made, self._after = 0, after

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            if self.made == self._after:
                self.made += 1
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has")
            self.made += 1
        return func(*args, **(kwargs or {}))


@cache
def engine() -> Finch:
    return small_finch(alone_heads=[(0, 1), (1, 2)], max_new_tokens=4, chunk_size=CHUNK, reread=True, quotes=False)


@cache
def compressed() -> CompressedCache:
    return engine().compress(QUESTION, PASSAGES)


@cache
def kept() -> PassageStore:
    store = engine().open_store()
    store.add(PASSAGES)
    return store


def new_store(chunk_size: int) -> object:
    with engine().open_store() as store:
        store.add(PASSAGES)
        return [found.index for found in store.search(QUESTION)]


def running(chunk_size: int) -> object:
    """Answers as a server generates them: each for itself in a batch of several."""
    finch = engine()
    settings = finch.settings.updated({"chunk_size": chunk_size, "strategy": "loop"})
    requests = [resolve(finch.runtime, text, PASSAGES, settings) for text in (QUESTION, OTHER)]
    batch = RunningBatch(finch.model, finch.runtime.graphs, most=2)
    for request, read in zip(requests, read_together(finch.runtime, requests), strict=True):
        with memory_guard(finch.model, "an answer"):  # as the scheduler does
            begun, writer = Begun.of(request, read), finch.runtime.writer(request.sampling)
        batch.join(RunningAnswer(begun.cache, request.answer_prompt, writer, request.sampling.max_new_tokens))
    texts_of: dict[int, str] = {}
    while batch.answers:
        for answer, delta in batch.step():
            texts_of[id(answer)] = texts_of.get(id(answer), "") + delta
            if answer.error is not None:
                raise answer.error
    return list(texts_of.values())


WAYS: Mapping[str, Callable[[int], object]] = {
    "ask by the loop": lambda size: engine().ask(QUESTION, PASSAGES, strategy="loop", chunk_size=size).text,
    "ask alone": lambda size: engine().ask(QUESTION, PASSAGES, strategy="independent").text,
    "ask without passages": lambda size: engine().ask(QUESTION).text,
    "sample": lambda size: "".join(engine().stream(QUESTION, PASSAGES, temperature=1.0, seed=1)),
    "ask many by the loop": lambda size: [
        answer.text for answer in engine().ask_many([QUESTION, OTHER], PASSAGES, strategy="loop", chunk_size=size)
    ],
    "ask many": lambda size: [answer.text for answer in engine().ask_many([QUESTION, OTHER], PASSAGES)],
    "rank": lambda size: [citation.index for citation in engine().rank(QUESTION, PASSAGES, chunk_size=size)],
    "keep tokens": lambda size: engine().ask(QUESTION, PASSAGES, selection="token", reread=False, chunk_size=size).text,
    "compress": lambda size: engine().compress(QUESTION, PASSAGES, chunk_size=size).kept.tolist(),
    "ask a cache": lambda size: engine().ask_cached(compressed(), OTHER).text,
    "ask a store": lambda size: engine().ask(QUESTION, PASSAGES, store=kept()).text,
    "search": lambda size: [citation.index for citation in kept().search(QUESTION)],
    "fill a store": new_store,
    "quotes": lambda size: engine().ask(QUESTION, PASSAGES, quotes=True).text,
    "run": running,
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_wherever_memory_runs_out_the_next_call_is_right(way: str) -> None:
    ask = WAYS[way]
    right, halved = (
        ask(CHUNK),
        ask(CHUNK // 2),
    )  # all passages are one chunk: it is read in halves where memory runs out
    with RunsOut(None) as counting:
        assert ask(CHUNK) == right
    assert counting.made > PLACES
    for number in range(PLACES):
        after = number * counting.made // PLACES + number % 7
        with RunsOut(after) as memory:
            found = told(ask)
        assert isinstance(found, DeviceMemoryError) or is_one_of(found, right, halved)
        assert "\n" not in str(found) or not isinstance(found, DeviceMemoryError)
        assert memory.made > after
        assert ask(CHUNK) == right


def told(ask: Callable[[int], object]) -> object:
    """What an ask comes to: what it returns, or its error."""
    try:
        return ask(CHUNK)
    except DeviceMemoryError as error:
        return error


def is_one_of(found: object, right: object, halved: object) -> bool:
    """Whether an answer, or each of several, is one of two."""
    if found in (right, halved):
        return True
    if not (isinstance(found, list) and isinstance(right, list) and isinstance(halved, list)):
        return False
    return len(found) == len(right) and all(own in both for own, *both in zip(found, right, halved, strict=True))


@pytest.mark.slow
def test_a_scan_that_runs_out_of_memory_goes_on_with_less() -> None:
    finch, halves = engine(), []
    for after in range(40, 100, 20):  # in the layers of the first pass
        with RunsOut(after):
            halves.append(finch.ask(QUESTION, PASSAGES, strategy="loop"))
    smaller = finch.ask(QUESTION, PASSAGES, strategy="loop", chunk_size=CHUNK // 2)
    assert {answer.report.chunk_size for answer in halves} == {CHUNK // 2}
    assert {answer.text for answer in halves} == {smaller.text}
