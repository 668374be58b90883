from __future__ import annotations

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from finch_rag import batch
from finch_rag.bench import many
from finch_rag.cli.app import app
from finch_rag.decode import generation
from finch_rag.errors import InputError
from finch_rag.prefill import shared


def measured(command: str) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["bench", "many", *command.split()], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def test_both_ways_are_timed_over_a_shared_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "_SHORTLIST_TOKENS", 200)
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
    monkeypatch.setattr(shared, "_SHORTLIST_TOKENS", 200)
    scans: list[int] = []
    groups: list[int] = []
    scan, decode = shared.scan_shared, generation.decode_many

    def scanned(model: Any, prompts: Any, *rest: Any) -> Any:
        scans.append(len(prompts))
        return scan(model, prompts, *rest)

    def decoded(model: Any, caches: Any, *rest: Any, **options: Any) -> Any:
        groups.append(len(caches))
        return decode(model, caches, *rest, **options)

    monkeypatch.setattr(batch, "scan_shared", scanned)
    monkeypatch.setattr(batch, "decode_many", decoded)
    measured("--shape tiny --tokens 1400 --questions 17 --budget 60 --new-tokens 2 --repeats 1")
    assert scans == [17, 17]  # the warm-up, and the run
    assert groups == 2 * ([1] * 17 + [8, 8, 1])
