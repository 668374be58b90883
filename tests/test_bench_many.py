from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable
from typing import Any

import pytest
from typer.testing import CliRunner

from finch_rag import batch
from finch_rag.bench import many
from finch_rag.cli.app import app
from finch_rag.decode import running
from finch_rag.errors import InputError
from finch_rag.models.cache import CompressedCache
from finch_rag.prefill import shared
from finch_rag.streaming import AnswerStream


def measured(command: str) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["bench", "many", *command.split()], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def counting(call: Callable[..., Any], calls: list[int], count: Callable[[], int] = lambda: 0) -> Callable[..., Any]:
    """The same, with a figure of the time of each call."""

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(count())
        return call(*args, **options)

    return counted


def test_both_ways_are_timed_over_a_shared_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finch_rag.prefill.shortlists._SHORTLIST_TOKENS", 200)
    found = measured("--shape tiny --tokens 1400 --questions 3 --budget 60 --new-tokens 4 --repeats 2")
    assert found["shared"]
    assert list(found["ways"]) == ["one by one", "ask_many"]
    for row in found["ways"].values():
        assert row["reading (s)"] > 0
        assert row["answers (s)"] > 0
    assert found["throughput"] > 0


def test_a_short_list_is_not_shared() -> None:
    assert not measured("--shape tiny --tokens 300 --questions 2 --budget 60 --new-tokens 2 --repeats 1")["shared"]


def test_a_mistake_in_the_arguments_is_told() -> None:
    with pytest.raises(InputError, match="shape 'llama-9b' is unknown"):
        many.main(shape="llama-9b")
    with pytest.raises(InputError, match="0 questions"):
        many.main(questions=0)
    refused = CliRunner().invoke(app, ["bench", "many", "--questions", "0"])
    assert isinstance(refused.exception, (InputError, SystemExit))
    assert refused.exit_code != 0


def test_more_questions_than_a_group_are_measured_as_they_are_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finch_rag.prefill.shortlists._SHORTLIST_TOKENS", 200)
    scans: list[int] = []
    groups: list[int] = []
    scan, decode = shared.scan_shared, running.decode_many

    def scanned(model: Any, prompts: Any, *rest: Any) -> Any:
        scans.append(len(prompts))
        return scan(model, prompts, *rest)

    def decoded(model: Any, caches: Any, *rest: Any, **options: Any) -> Any:
        groups.append(len(caches))
        return decode(model, caches, *rest, **options)

    monkeypatch.setattr(batch, "scan_shared", scanned)
    monkeypatch.setattr(batch, "decode_many", decoded)
    alone: list[int] = []
    monkeypatch.setattr(many, "AnswerStream", counting(AnswerStream, alone))
    measured("--shape tiny --tokens 1400 --questions 17 --budget 60 --new-tokens 2 --repeats 1")
    assert scans == [17, 17]  # the warm-up, and the run
    assert groups == 2 * [8, 8, 1]
    assert len(alone) == 2 * 17  # as `Finch.ask` answers


def test_nothing_of_an_earlier_run_is_in_memory(
    monkeypatch: pytest.MonkeyPatch, caches: weakref.WeakSet[CompressedCache]
) -> None:
    init = CompressedCache.__init__

    def in_a_circle(cache: Any, *args: Any) -> None:
        init(cache, *args)
        cache.circle = cache  # so that only the garbage collector frees it

    monkeypatch.setattr(CompressedCache, "__init__", in_a_circle)
    alive: list[int] = []
    monkeypatch.setattr(many, "AnswerStream", counting(AnswerStream, alive, lambda: len(caches)))
    monkeypatch.setattr(many, "answer_together", counting(batch.answer_together, alive, lambda: len(caches)))
    gc.disable()
    try:
        measured("--shape tiny --tokens 300 --questions 1 --budget 60 --new-tokens 2 --repeats 2")
    finally:
        gc.enable()
    assert alive == 3 * [0, 0]  # by both ways, the warm-up and two runs
