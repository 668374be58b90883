from __future__ import annotations

import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from finch_rag.engine import Finch
from finch_rag.errors import InputError, WindowError
from finch_rag.models.cache import CompressedCache
from finch_rag.streaming import AnswerStream

from .small import small_finch, texts

QUESTION = "When was the lighthouse built?"


def test_a_stream_joins_to_the_answer(finch: Finch) -> None:
    whole = finch.ask(QUESTION, texts(8))
    stream = finch.stream(QUESTION, texts(8))
    deltas = list(stream)
    assert len(deltas) > 1
    assert "".join(deltas) == whole.text == stream.answer.text
    assert stream.answer.citations == whole.citations
    assert stream.answer.report.new_tokens == whole.report.new_tokens


def test_a_stream_has_no_answer_before_its_end(finch: Finch) -> None:
    stream = finch.stream(QUESTION, texts(8))
    with pytest.raises(InputError, match="to its end"):
        _ = stream.answer
    next(stream)
    with pytest.raises(InputError, match="to its end"):
        _ = stream.answer
    stream.close()
    assert list(stream) == []


def leave_with_block(stream: AnswerStream) -> None:
    with stream:
        pass


@pytest.mark.parametrize("end", [AnswerStream.close, leave_with_block, list])
def test_an_ended_stream_frees_its_cache(finch: Finch, caches: weakref.WeakSet[CompressedCache], end: Any) -> None:
    stream = finch.stream(QUESTION, texts(8))
    next(stream)
    assert len(caches) == 1  # the one for reading, which is larger, is gone already
    end(stream)
    gc.collect()
    assert len(caches) == 0


def test_a_dropped_stream_frees_its_cache(finch: Finch, caches: weakref.WeakSet[CompressedCache]) -> None:
    stream = finch.stream(QUESTION, texts(8))
    next(stream)
    del stream
    assert len(caches) == 0


def test_an_answer_holds_no_cache(finch: Finch, caches: weakref.WeakSet[CompressedCache]) -> None:
    answer = finch.ask(QUESTION, texts(8))
    gc.collect()
    assert len(caches) == 0
    assert answer.citations


def test_a_stream_that_is_never_read_runs_no_forward_pass() -> None:
    finch, passes = small_finch(), []
    finch.model.model.register_forward_pre_hook(lambda *_: passes.append(1))
    stream = finch.stream(QUESTION, texts(8))
    assert passes == []
    next(stream)
    assert passes
    done = len(passes)
    stream.close()
    assert len(passes) == done


def test_a_stream_refuses_bad_input_at_once(finch: Finch) -> None:
    with pytest.raises(InputError):
        finch.stream("", texts(3))
    with pytest.raises(WindowError):
        finch.stream(QUESTION, texts(3), budget=5000)


def test_threads_that_share_a_stream_read_all_of_it(finch: Finch) -> None:
    expected = finch.ask(QUESTION, texts(8), max_new_tokens=60)
    for _ in range(5):
        stream = finch.stream(QUESTION, texts(8), max_new_tokens=60)
        with ThreadPoolExecutor(4) as pool:
            parts = list(pool.map(lambda _, stream=stream: list(stream), range(4)))
        assert sum(map(len, parts)) > 2
        assert stream.answer.text == expected.text


def test_a_stream_is_closed_while_another_thread_reads_it(caches: weakref.WeakSet[CompressedCache]) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def on_progress(stage: str, done: int, total: int) -> None:
        begun.set()
        go_on.wait(10)

    stream = small_finch().stream(QUESTION, texts(30), on_progress=on_progress)
    with ThreadPoolExecutor(2) as pool:
        reading = pool.submit(list, stream)
        begun.wait(10)
        closing = pool.submit(stream.close)
        go_on.set()
        assert reading.result(10) == []
        closing.result(10)
    with pytest.raises(InputError, match="no answer yet"):
        _ = stream.answer
    gc.collect()
    assert not caches


def test_a_stream_may_be_closed_by_its_own_callback() -> None:
    stream = small_finch().stream(QUESTION, texts(30), on_progress=lambda *step: stream.close())
    assert list(stream) == []


def test_a_stream_that_its_own_callback_reads_is_an_input_error() -> None:
    def on_progress(stage: str, done: int, total: int) -> None:
        stream.read()

    stream = small_finch().stream(QUESTION, texts(30), on_progress=on_progress)
    with pytest.raises(InputError, match="callback"):
        list(stream)
