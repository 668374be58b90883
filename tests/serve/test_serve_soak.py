"""The soak test, for a moment; and that it sees what goes wrong."""

from __future__ import annotations

import json
import logging
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from typer.testing import CliRunner

from finch_rag import Finch
from finch_rag.bench import soak
from finch_rag.bench.soak_client import Order, Tally
from finch_rag.bench.soak_requests import HOSTILE, draw, pool_of
from finch_rag.cli.app import app
from finch_rag.decode.running import RunningBatch
from finch_rag.errors import FinchError, InputError
from finch_rag.models.cache import CompressedCache

from .support import served_finch


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small engine in place of any model, in a process of which the heaps of a few threads are more than 2%."""
    monkeypatch.setattr(Finch, "from_pretrained", lambda model, **settings: served_finch())
    monkeypatch.setattr(soak, "_GROWTH", 0.1)


def soaked(**options: Any) -> dict[str, Any]:
    """What a soak finds; it ends by its number of requests, not by its minutes."""
    return soak.main(**{"clients": 4, "running": 3, **options})


def test_a_moment_of_everything(capsys: pytest.CaptureFixture[str]) -> None:
    found = soaked(requests=24, hostile=0.4)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == found
    assert found["problems"] == []
    assert found["requests"] == sum(found["outcomes"].values()) >= 4 * 24
    assert set(found["outcomes"]) == {"answered", "refused", "left"}
    assert found["different_answers"] == 24  # else mixed up ones would not be seen
    for kind in ("chat", "chat, streamed", "store chat, streamed", "completion", "rerank", "search", "store delete"):
        assert list(found["kinds"][kind]) == ["answered"]
    for kind in ("bad JSON", "body too large", "empty question", "lone surrogate", "unknown model", "wrong types"):
        assert list(found["kinds"][kind]) == ["refused"]
    assert "left" in found["kinds"]["leaves in mid-stream"]


def test_a_moment_of_steps_with_places(monkeypatch: pytest.MonkeyPatch) -> None:
    finch = served_finch()
    finch.runtime.graphs.enabled = True  # uncaptured on a CPU
    monkeypatch.setattr(Finch, "from_pretrained", lambda model, **settings: finch)
    assert soaked(requests=8)["problems"] == []


def test_answers_that_are_mixed_up_are_seen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    really = RunningBatch._joint_pass

    def swapped(batch: RunningBatch, answers: Sequence[Any], tokens: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
        passed = list(really(batch, answers, tokens))
        rows = [logits for _, logits in passed]
        yield from zip([answer for answer, _ in passed], rows[::-1], strict=True)

    monkeypatch.setattr(RunningBatch, "_joint_pass", swapped)
    with pytest.raises(FinchError, match=r"the soak found \d+ problems, the first: .*: wrong answer: "):
        soaked(requests=6, hostile=0)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["outcomes"]["wrong answer"] > 0


def test_the_same_seed_sends_the_same() -> None:
    def drawn(seed: int) -> list[Any]:
        rng = random.Random(seed)
        return [draw(rng, pool_of(seed, 24), 0.3) for _ in range(50)]

    assert drawn(3) == drawn(3)
    assert drawn(3) != drawn(4)
    pool = pool_of(0, 24)
    assert len({sending.content for sending in pool}) == 24
    rng = random.Random(0)
    assert len({make(rng, pool).kind for make in HOSTILE}) == len(HOSTILE)
    counted = Counter(draw(rng, pool, 0.1).number is None for _ in range(2000))
    assert 0.04 < counted[True] / 2000 < 0.1  # three kinds in ten are of the pool, and only leave


def test_what_stays_behind_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    kept: list[CompressedCache] = []
    servers: list[Any] = []
    asked: list[Order] = []
    sizes = iter([{"process": 100}, {"process": 111}])
    fill = soak._fill_stores

    def filled(server: Any) -> None:
        servers.append(server)
        fill(server)

    def spoils(ask: Any, order: Order) -> Tally:
        asked.append(order)
        if len(asked) == 2:  # the soak, behind the warm-up
            kept.append(CompressedCache(1, 1))
            servers[0].service.metrics.answered("/v1/rerank", 500, 0.1)
            logging.getLogger("finch_rag.serve").error("broken")
        return Tally()

    monkeypatch.setattr(soak, "_asked", spoils)
    monkeypatch.setattr(soak, "_fill_stores", filled)
    monkeypatch.setattr(soak, "_POOL", 1)
    monkeypatch.setattr(soak, "_QUIET", 0.2)
    monkeypatch.setattr(soak, "settled", lambda device: next(sizes))
    with pytest.raises(FinchError, match="the soak found 4 problems"):
        soaked()
    cache, response, memory, line = json.loads(capsys.readouterr().out.splitlines()[-1])["problems"]
    assert cache.startswith("caches left: 1 ")
    assert '1 responses with endpoint="/v1/rerank",status="500"' in response
    assert memory.startswith("memory of the process has grown")
    assert line == "the server logged: broken"
    assert [order.seconds for order in asked] == [300, 1800]


def test_a_request_that_fails_alone_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Finch, "rank", lambda *args, **options: 1 / 0)
    monkeypatch.setattr(soak, "_POOL", 6)
    result = CliRunner().invoke(app, ["bench", "soak"])
    assert result.exit_code == 2
    message = result.stderr.splitlines()[-1]
    assert message.startswith("Error: a request that is asked alone is not answered: wrong status: 500 in place of 200")


def test_minutes_must_be_some() -> None:
    with pytest.raises(InputError, match="minutes"):
        soaked(minutes=0)


def test_the_command_passes_its_options_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(soak, "main", lambda **options: seen.append(options))
    run = CliRunner().invoke
    assert run(app, ["bench", "soak"]).exit_code == 0
    run(app, "bench soak --model m --minutes 0.5 --clients 3 --seed 4 --running 2".split())
    assert seen == [
        {"model": "embedded", "minutes": 30.0, "clients": 8, "seed": 0, "running": 4},
        {"model": "m", "minutes": 0.5, "clients": 3, "seed": 4, "running": 2},
    ]
