"""Forks, spawned processes, copies of what threads share, and a Python that ends with answers under way."""

from __future__ import annotations

import copy
import pickle
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finch_rag.engine import Finch
from finch_rag.errors import InputError, SettingsError

from .small import small_finch, texts

QUESTION = "When was the lighthouse built?"
_ROOT = Path(__file__).parent.parent
_SECONDS = 120.0  # what hangs fails


def started(script: str, *arguments: object) -> subprocess.Popen[str]:
    """A Python that runs a script, in which ``finch`` makes a small engine."""
    head = """
        import multiprocessing, os, signal, sys, threading
        import torch
        from tests.small import small_finch as finch, texts
        from finch_rag.errors import FinchError
        QUESTION = "When was the lighthouse built?"
    """
    code = textwrap.dedent(head) + textwrap.dedent(script)
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, cwd=_ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def said(process: subprocess.Popen[str]) -> list[str]:
    """What it prints, once it has ended well and without a word of its own."""
    try:
        out, wrong = process.communicate(timeout=_SECONDS)
    finally:
        process.kill()
    assert (process.returncode, wrong) == (0, "")
    return out.splitlines()


@pytest.fixture(params=["engine", "store", "stream"])
def shared(request: pytest.FixtureRequest, finch: Finch) -> Any:
    makers: dict[str, Callable[[], Any]] = {
        "engine": lambda: finch,
        "store": finch.open_store,
        "stream": lambda: finch.stream(QUESTION, texts(3)),
    }
    return makers[request.param]()


def test_what_threads_share_is_not_copied(shared: Any) -> None:
    assert copy.copy(shared) is shared
    assert copy.deepcopy({"part": [shared]})["part"][0] is shared


def test_what_holds_a_model_cannot_be_pickled(shared: Any) -> None:
    with pytest.raises(InputError, match=f"^{type(shared).__name__} cannot be pickled.*make it in each of them"):
        pickle.dumps([shared])


def test_a_python_without_its_lock_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "_is_gil_enabled", lambda: False, raising=False)
    with pytest.raises(SettingsError, match="PYTHON_GIL=1"):
        small_finch()
    monkeypatch.setattr(sys, "_is_gil_enabled", lambda: True)
    assert small_finch().ask(QUESTION, texts(3)).text


FORKED = """
    torch.set_num_threads(2)
    engine = finch(alone_heads=[(0, 3), (1, 0)])
    alone, store = engine.ask(QUESTION, texts(8)).text, engine.open_store(sys.argv[1])
    store.add(texts(8))

    def in_a_fork(tried):
        if pid := os.fork():
            return os.waitpid(pid, 0)[1]
        signal.alarm(60)  # what hangs does not stay
        try:
            print(tried(), flush=True)
        except FinchError as error:
            print(f"{type(error).__name__}: {error}", flush=True)
        sys.exit(7)

    def with_one_thread():
        torch.set_num_threads(1)
        return engine.ask(QUESTION, texts(8)).text == alone

    def read_only():
        torch.set_num_threads(1)
        return len(engine.open_store(sys.argv[1], read_only=True).search(QUESTION))

    def written_again():
        torch.set_num_threads(1)
        return finch(alone_heads=[(0, 3), (1, 0)]).open_store(sys.argv[1])

    for tried in (
        lambda: engine.ask(QUESTION, texts(8)),
        lambda: finch().ask(QUESTION, texts(8)),
        with_one_thread,
        lambda: store.search(QUESTION),
        lambda: store.add(texts(9)),
        lambda: store.remove(["1"]),
        read_only,
        written_again,
    ):
        ended = in_a_fork(tried)
        assert os.waitstatus_to_exitcode(ended) == 7, ended
    print(store.add(texts(9)).read_tokens > 0, engine.ask(QUESTION, texts(8)).text == alone)
"""


def test_a_fork_is_refused_where_it_would_hang_and_leaves_the_parent_as_it_was(tmp_path: Path) -> None:
    lines = said(started(FORKED, tmp_path / "store"))
    threads = "InputError: this process .* by 2 threads, .*torch.set_num_threads\\(1\\) here first, or start .* spawn"
    opened = "StoreError: the store in .* was opened by process .*: open it here, with read_only=True"
    expected = [threads, threads, "True", threads, threads, opened, "8", "StoreError: another process .*", "True True"]
    assert len(lines) == len(expected)
    for line, pattern in zip(lines, expected, strict=True):
        assert re.match(pattern, line), line


SPAWNED = """
    if __name__ == "__main__":
        engine = finch()
        alone = engine.ask(QUESTION, texts(8)).text
        from tests.test_processes import ask_in_another
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            print(pool.map(ask_in_another, [0]) == [alone])
            try:
                pool.apply(ask_in_another, (engine,))
            except FinchError as error:
                print(error)
"""


def ask_in_another(_: object) -> str:
    """What a spawned process answers."""
    return small_finch().ask(QUESTION, texts(8)).text


@pytest.mark.slow
def test_a_spawned_process_answers_with_an_engine_of_its_own() -> None:
    lines = said(started(SPAWNED))
    assert lines[0] == "True"
    assert lines[1].startswith("Finch cannot be pickled")


UNDER_WAY = {
    "a stream": """
        stream = finch().stream(QUESTION, texts(20))
        next(stream)
    """,
    "a stream in a circle": """
        circle = [finch().stream(QUESTION, texts(20))]
        next(circle[0])
        circle.append(circle)
        del circle
    """,
    "a stream of a store in a folder": """
        store = finch(alone_heads=[(0, 3), (1, 0)]).open_store(sys.argv[1])
        store.add(texts(20))
        stream = finch().stream(QUESTION, store=store)
        next(stream)
    """,
    "a task": """
        import asyncio
        engine = finch(max_new_tokens=200)

        async def leave():
            global stream, task
            stream = engine.astream(QUESTION, texts(20))
            await anext(stream)
            task = asyncio.create_task(engine.aask(QUESTION, texts(20)))
            await asyncio.sleep(0.05)

        asyncio.run(leave())
    """,
    "the server's scheduler": """
        from finch_rag.resolving import resolve
        from finch_rag.serve.scheduler import Scheduler
        engine = finch(max_new_tokens=200)
        scheduler, begun = Scheduler(engine.runtime, running=2), threading.Event()

        class Listener:
            def on_delta(self, text): begun.set()
            def on_answer(self, answer): pass
            def on_error(self, error): pass

        for _ in range(4):
            scheduler.submit(resolve(engine.runtime, QUESTION, [], engine.settings), Listener())
        begun.wait(30)
    """,
}


@pytest.mark.slow
def test_python_ends_in_silence_with_answers_under_way(tmp_path: Path) -> None:
    running = {name: started(script, tmp_path / "store") for name, script in UNDER_WAY.items()}
    for name, process in running.items():
        assert said(process) == [], name
