"""``finch-rag bench load``: a real server, real clients, a tiny model with random weights."""

from __future__ import annotations

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from finch_rag.bench import load
from finch_rag.bench.load_client import Asked
from finch_rag.cli.app import app
from finch_rag.errors import FinchError


def loaded(command: str) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["bench", "load", "--shape", "tiny", *command.split()], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("passages", ["--tokens 300", "--store-tokens 900"])
def test_every_number_of_clients_gets_the_same_answers(passages: str) -> None:
    found = loaded(f"{passages} --clients 1,4 --requests 3 --new-tokens 5 --running 2")
    assert [(rows["requests"], rows["different"]) for rows in found["clients"].values()] == [(3, 0), (4, 0)]
    for rows in found["clients"].values():
        assert rows["a_second"] > 0
        assert 0 < rows["first_p50"] <= rows["first_p99"] <= rows["last_p99"]
        assert rows["first_p50"] < rows["last_p50"]  # it is streamed
        assert rows["new_tokens"] == 5


def test_a_request_that_fails_is_no_figure() -> None:
    with pytest.raises(FinchError, match="1 of 2 requests failed, the first with no memory"):
        load._figures(1.0, [Asked(0, 200, "a", 0.1, 0.2), Asked(1, 503, "", 0.1, 0.2, "no memory")])


def test_other_answers_than_those_of_one_client_are_counted() -> None:
    alone = [Asked(0, 200, "a", 0.1, 0.2), Asked(1, 200, "b", 0.1, 0.4)]
    assert load._different([alone[0], Asked(1, 200, "a", 0.2, 0.3)], alone) == 1


def test_figures_are_those_of_all_requests() -> None:
    found = [Asked(0, 200, "a", 0.1, 0.2, new_tokens=4), Asked(1, 200, "a", 0.2, 0.3, new_tokens=1)]
    figures = load._figures(2.0, found)
    assert figures["a_second"] == 1.0
    assert figures["first_p50"] == pytest.approx(0.15)
    assert figures["new_tokens"] == 2.5


def test_arguments_that_measure_nothing_are_refused() -> None:
    result = CliRunner().invoke(app, ["bench", "load", "--shape", "tiny", "--clients", "0"])
    assert result.exit_code != 0
