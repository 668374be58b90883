from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from contextlib import suppress
from typing import Any

import pytest

from finch_rag.errors import ModelError
from finch_rag.prompts import chat_template, deadline, trial
from finch_rag.prompts.builder import Prompt, PromptBuilder
from finch_rag.prompts.passages import Passage

from .hostile_templates import HARMLESS, LATE, RUNAWAY, USELESS
from .small import CHATML, chat_tokenizer, small_finch, tokenizer_with

HISTORY = [{"role": ("user", "assistant")[turn % 2], "content": "x"} for turn in range(6)]
LONGEST = 5.0  # seconds


def prompt_of(template: Any, turns: int = 0) -> Prompt:
    builder = PromptBuilder(tokenizer_with(template))
    return builder.build("when?", [Passage("the bridge")], history=HISTORY * turns)


@pytest.mark.slow
@pytest.mark.parametrize("template", RUNAWAY.values(), ids=RUNAWAY)
def test_a_template_that_never_ends_or_fills_the_memory_is_a_model_error_at_the_first_prompt(template: str) -> None:
    start = time.perf_counter()
    with pytest.raises(ModelError, match=r"chat template of .* cannot be used: it .*; pass a tokenizer with") as caught:
        prompt_of(template)
    assert time.perf_counter() - start < LONGEST
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("template", USELESS.values(), ids=USELESS)
def test_a_template_that_fails_or_makes_no_text_is_a_model_error_of_one_line(template: object) -> None:
    start = time.perf_counter()
    with pytest.raises(ModelError, match=r"chat template of \w+ (fails: \S|does not show each message once)") as caught:
        prompt_of(template)
    assert time.perf_counter() - start < LONGEST
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("template", HARMLESS.values(), ids=HARMLESS)
def test_a_template_that_takes_a_while_is_used(template: str) -> None:
    assert prompt_of(template, turns=1).prefix


def test_what_no_trial_has_seen_is_stopped_where_the_prompt_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "_SECONDS", 0.3)
    assert prompt_of(LATE).prefix
    start = time.perf_counter()
    with pytest.raises(ModelError, match=r"cannot be used: it took more than 0\.3 s; pass a tokenizer with"):
        prompt_of(LATE, turns=3)
    assert time.perf_counter() - start < LONGEST
    assert prompt_of(CHATML, turns=3).prefix  # and the next one is made


def test_an_engine_says_so_at_the_first_question() -> None:
    finch = small_finch(tokenizer=tokenizer_with(RUNAWAY["repeats a text"]))
    with pytest.raises(ModelError, match="takes too much memory") as caught:
        finch.ask("when?", ["the bridge"])
    assert "\n" not in str(caught.value)


def test_a_template_that_makes_something_else_than_text_is_a_model_error() -> None:
    tokenizer: Any = tokenizer_with(CHATML)
    for made in (None, [1, 2], b"x", {"input_ids": [1]}):
        tokenizer.apply_chat_template = lambda *args, made=made, **options: made
        with pytest.raises(ModelError, match=f"makes {type(made).__name__}, not text"):
            PromptBuilder(tokenizer).build("when?", [])


def test_a_trial_is_made_once_for_each_template(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    def tells(told: str) -> str:
        tried.append(told)
        return ""

    monkeypatch.setattr(trial, "_tried", tells)
    trial.what_is_wrong.cache_clear()
    for _ in range(3):
        prompt_of(CHATML, turns=1)
    assert len(tried) == 1
    trial.what_is_wrong.cache_clear()


@pytest.mark.parametrize("executable", [None, "", "/usr/bin/no-python", "/usr/bin/uwsgi"])
def test_where_no_trial_can_be_made_the_template_is_used(
    monkeypatch: pytest.MonkeyPatch, executable: str | None
) -> None:
    trial.what_is_wrong.cache_clear()
    monkeypatch.setattr(sys, "executable", executable)
    assert prompt_of(CHATML).prefix
    trial.what_is_wrong.cache_clear()


def test_a_trial_that_does_not_start_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "_STARTS", 0.0)
    trial.what_is_wrong.cache_clear()
    assert trial.what_is_wrong(RUNAWAY["repeats a text"]) == ""
    trial.what_is_wrong.cache_clear()


def test_work_within_a_deadline_returns_and_raises_as_it_does_without() -> None:
    assert deadline.within(5, lambda: "made") == "made"
    with pytest.raises(KeyError, match="x"):
        deadline.within(5, lambda: {"y": 1}["x"])


def forever() -> None:
    while True:
        with suppress(Exception):  # as a program of strangers may
            time.sleep(0.001)


def test_work_that_never_ends_is_stopped() -> None:
    before = threading.active_count()
    for _ in range(3):
        with pytest.raises(TimeoutError, match=r"more than 0\.05 s"):
            deadline.within(0.05, forever)
    ends = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < ends:
        time.sleep(0.01)
    assert threading.active_count() <= before


def test_threads_do_not_wait_for_each_others_work() -> None:
    held, results = threading.Event(), []
    first = threading.Thread(target=lambda: results.append(deadline.within(10, lambda: held.wait(10))))
    first.start()
    assert deadline.within(5, lambda: "second") == "second"
    held.set()
    first.join()
    assert results == [True]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_forked_process_has_helpers_of_its_own() -> None:
    code = (
        "import os\nfrom finch_rag.prompts.deadline import within\nwithin(5, lambda: 1)\npid = os.fork()\n"
        "done = within(5, lambda: 2)\nif pid == 0: os._exit(0 if done == 2 else 1)\n"
        "raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_making_a_prompt_takes_hardly_longer() -> None:
    tokenizer = chat_tokenizer()
    messages = [chat_template.Message(role="user", content="x")]

    def least(work: Any) -> float:
        taken = []
        for _ in range(200):
            start = time.perf_counter()
            work()
            taken.append(time.perf_counter() - start)
        return min(taken)

    turns = [{"role": "user", "content": "x"}]
    plain = least(lambda: tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    assert least(lambda: chat_template.rendered(tokenizer, messages)) - plain < 1e-4
