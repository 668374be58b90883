from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread
from typer.testing import CliRunner, Result

import finch_rag.bench
from finch_rag.bench import plots, positions, quality
from finch_rag.bench.cases import read_cases
from finch_rag.bench.methods import METHODS
from finch_rag.bench.positions import by_method, places
from finch_rag.cli.app import app
from finch_rag.engine import Finch

from .command_line import one_error
from .small import small_finch, texts

COUNT = 12


def run(*args: Any) -> Result:
    return CliRunner().invoke(app, ["bench", *map(str, args)], catch_exceptions=False)


def last_line(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    parsed: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return parsed


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set in the folder "set", of which each passage answers the question that names its number."""
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "set"
    root.mkdir()
    passages = [{"id": f"p{n}", "text": f"{text} token{n}"} for n, text in enumerate(texts(COUNT))]
    questions = [
        {"id": f"q{n}", "question": f"token{n}?", "answers": [f"token{n}"], "gold_ids": [f"p{n}"]} for n in range(COUNT)
    ]
    for name, records in (("passages", passages), ("questions.dev", questions)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return root


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a small engine is asked, in place of any model."""
    engine = small_finch()
    ask, calls = engine.ask, list[str]()

    def counted(question: str, *args: Any, **options: Any) -> Any:
        calls.append(question)
        return ask(question, *args, **options)

    monkeypatch.setattr(engine, "ask", counted)
    monkeypatch.setattr(Finch, "from_pretrained", lambda model, **settings: engine)
    return calls


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the commands pass on."""
    seen: list[Any] = []
    for module in (quality, positions):
        monkeypatch.setattr(module, "main", lambda data, out, **options: seen.append((data, out, options)))
    return seen


def test_quality_passes_its_options_on(passed: list[Any]) -> None:
    run("quality", "set")
    run(
        *("quality", "set", "--out", "o", "--model", "org/m", "--retriever", "dense", "--top-k", 7, "--limit", 9),
        *("--order", "gold-at:3", "--seed", 5, "--budget", "256, 512", "--methods", "finch, gold", "--shard", "2/3"),
        *("--max-new-tokens", 8, "--plot", "f.png", "--instructions", "Be brief.", "--unanswerable"),
    )
    default = {"model": "embedded", "retriever": "bm25", "top_k": 100, "order": "rank", "limit": 100, "seed": 0}
    rest = {"budgets": [512], "methods": ["finch", "full", "top-k"], "max_new_tokens": 16, "shard": (0, 1)}
    assert passed[0][2] == {**default, **rest, "instructions": None, "unanswerable": False, "plot": None}
    given = {"model": "org/m", "retriever": "dense", "top_k": 7, "order": "gold-at:3", "limit": 9, "seed": 5}
    rest = {"budgets": [256, 512], "methods": ["finch", "gold"], "max_new_tokens": 8, "shard": (1, 3)}
    rest |= {"instructions": "Be brief.", "unanswerable": True}
    assert passed[1] == (Path("set"), Path("o"), {**given, **rest, "plot": Path("f.png")})


def test_positions_passes_its_options_on(passed: list[Any]) -> None:
    run("positions", "set")
    run(
        *("positions", "set", "--out", "o", "--passages", "5,6", "--model", "m", "--retriever", "dense", "--limit", 9),
        *("--seed", 5, "--budget", 256, "--methods", "gold", "--max-new-tokens", 8, "--shard", "3/3", "--plot", "f"),
    )
    default = {"model": "embedded", "retriever": "bm25", "passages": [20, 50], "limit": 100, "seed": 0, "budget": 512}
    rest = {"methods": ["finch", "full"], "max_new_tokens": 16, "shard": (0, 1), "plot": None}
    assert passed[0][2] == {**default, **rest}
    given = {"model": "m", "retriever": "dense", "passages": [5, 6], "limit": 9, "seed": 5, "budget": 256}
    rest = {"methods": ["gold"], "max_new_tokens": 8, "shard": (2, 3), "plot": Path("f")}
    assert passed[1] == (Path("set"), Path("o"), {**given, **rest})


def test_other_settings_have_another_default_folder(passed: list[Any]) -> None:
    changes = [
        (),
        ("--model", "org/m"),
        ("--retriever", "dense"),
        ("--top-k", 7),
        ("--order", "random"),
        ("--limit", 9),
        ("--seed", 1),
        ("--unanswerable",),
    ]
    for change in changes:
        run("quality", "set", *change)
    run("positions", "set")
    folders = [str(out) for _, out, _ in passed]
    assert len(set(folders)) == len(changes) + 1
    assert folders[0] == str(Path("bench-results", "set-bm25-100-rank-100q-seed0-embedded"))
    assert folders[-1] == str(Path("bench-results", "set-bm25-positions-100q-seed0-embedded"))


def test_quality_answers_stores_and_goes_on(data: Path, asked: list[str]) -> None:
    command = ("quality", data, "--top-k", 3, "--limit", 4, "--budget", "40,60", "--max-new-tokens", 3)
    result = run(*command)
    summary = last_line(result)
    assert set(summary["methods"]) == {"finch@40", "finch@60", "full", "top-k@40", "top-k@60"}
    assert "finch@60 - full" in result.stdout
    assert "finch@60 - top-k@60" in result.stdout
    assert "top-k@60 - finch@60" not in result.stdout  # the same figures with another sign
    (file,) = Path("bench-results").glob("*/results-0.jsonl")
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(records) == len(asked) == 4 * 5
    for record in records:
        assert record["id"].startswith("q")
        assert {"prediction", "kept_ids", "prefill_seconds", "decode_seconds", "kv_tokens", "peak_mib"} <= set(record)
    assert last_line(run(*command)) == summary
    assert len(asked) == 4 * 5
    assert set(last_line(run(*command, "--methods", "gold"))["methods"]) == {*summary["methods"], "gold"}
    assert len(asked) == 4 * 6


def test_positions_asks_the_same_questions_with_gold_everywhere(data: Path, asked: list[str]) -> None:
    command = ("positions", data, "--passages", "3,5", "--limit", 4, "--budget", 60, "--max-new-tokens", 3)
    result = run(*command, "--out", "places")
    summary = last_line(result)
    assert list(summary["passages"]) == ["3", "5"]
    assert summary["cases"] == 4
    for count in (3, 5):
        rows = summary["passages"][str(count)]
        assert set(rows) == {"finch@60", "full"}
        assert list(rows["full"]["places"]) == [str(place) for place in places(count)]
        questions = set()
        for place in places(count):
            cases = list(read_cases(Path("places") / f"{count}-passages" / f"gold-at-{place}" / "cases.jsonl.gz"))
            questions.add(tuple(case.question.id for case in cases))
            for case in cases:
                at = [passage.id in case.question.gold_ids for passage in case.passages]
                assert at == [n == place for n in range(count)]
        assert len(questions) == 1
    calls = len(asked)
    assert calls == 4 * 2 * (len(places(3)) + len(places(5)))
    assert last_line(run(*command, "--out", "places")) == summary
    assert len(asked) == calls


def test_gold_stands_at_each_quarter() -> None:
    assert places(20) == [0, 5, 10, 15, 19]
    assert places(50) == [0, 12, 25, 37, 49]
    assert places(2) == [0, 1]


def row(accuracy: float, f1: float = 0.5, n: int = 4) -> dict[str, Any]:
    estimates = {name: {"mean": mean, "low": mean, "high": mean} for name, mean in (("accuracy", accuracy), ("f1", f1))}
    return {"n": n, "skipped": 0, "kv_tokens": 100.0, **estimates}


def test_spread_is_the_best_place_minus_the_worst() -> None:
    skipped = {"n": 0, "skipped": "too long"}
    found = by_method(
        {"0": {"a": row(0.5, 0.4), "b": row(1)}, "5": {"a": row(0.75), "b": skipped}, "9": {"a": row(0.25)}}
    )
    assert found["a"]["spread"] == {"accuracy": 0.5, "f1": pytest.approx(0.1)}
    assert found["b"]["spread"] is None
    assert found["b"]["places"]["9"]["n"] == 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("quality", "nowhere"), "nowhere has 0 files questions*.jsonl"),
        (("quality", "set", "--methods", "guess"), "method guess is unknown: use finch,"),
        (("quality", "set", "--methods", ","), "no method to run"),
        (("quality", "set", "--budget", "0"), "--budget is '0': use whole numbers from 1"),
        (("quality", "set", "--budget", "many"), "--budget is 'many'"),
        (("quality", "set", "--top-k", 0), "--top-k is 0"),
        (("quality", "set", "--limit", 0), "--limit is 0"),
        (("quality", "set", "--max-new-tokens", 0), "--max-new-tokens is 0"),
        (("quality", "set", "--order", "gold-at:99"), "gold-at:I with I from 0 to 11"),
        (("quality", "set", "--shard", "0/2"), "--shard is '0/2': use I/N with I from 1 to N"),
        (("quality", "set", "--shard", "3/2"), "--shard is '3/2'"),
        (("quality", "set", "--plot", "figure.doc"), "the plot figure.doc"),
        (("quality", "set", "--out", "set/passages.jsonl"), "set/passages.jsonl"),
        (("positions", "set", "--passages", "5,1"), "passages is [5, 1]: name numbers of at least 2"),
        (("positions", "set", "--passages", "5,20"), "passages is 20, but the data has 12 passages: use 12 or less"),
        (("positions", "set", "--passages", "x"), "--passages is 'x'"),
        (("positions", "set", "--budget", 0), "--budget is 0"),
        (("positions", "set", "--limit", 0), "--limit is 0"),
        (("positions", "set", "--plot", "figure"), "the plot figure "),
        (("speed", "--tokens", "many"), "--tokens is 'many'"),
    ],
)
@pytest.mark.usefixtures("data", "asked")
def test_bad_input_is_one_line_and_exit_code_2(args: tuple[Any, ...], message: str) -> None:
    assert message in one_error(run(*args))
    assert not Path("bench-results").exists()


@pytest.mark.usefixtures("asked")
def test_results_of_other_settings_are_refused(data: Path) -> None:
    run("quality", data, "--top-k", 3, "--limit", 1, "--out", "o")
    assert "another top_k (3 there): choose another --out" in one_error(
        run("quality", data, "--top-k", 4, "--limit", 1, "--out", "o")
    )


@pytest.mark.parametrize("command", ["quality", "positions"])
def test_help_names_every_method_and_says_that_a_run_goes_on(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    shown = " ".join(run(command, "--help").stdout.replace("│", " ").split())
    assert "goes on where it was cut off" in shown
    listed = shown.partition("Of: ")[2].partition("alone).")[0]
    words = set(re.findall(r"[\w-]+", listed))
    assert set(METHODS) <= words
    assert {word for word in words if word.startswith("finch-")} <= set(METHODS)


@pytest.mark.parametrize(
    ("package", "command"),
    [
        ("psutil", ("quality", "set")),
        ("psutil", ("positions", "set")),
        ("psutil", ("speed",)),
        ("psutil", ("ruler", "o")),
        ("matplotlib", ("quality", "set", "--plot", "figure.png")),
        ("matplotlib", ("positions", "set", "--plot", "figure.png")),
        ("bm25s", ("quality", "set")),
    ],
)
@pytest.mark.usefixtures("data")
def test_a_missing_package_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, package: str, command: tuple[str, ...]
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    for name in [name for name in sys.modules if name.startswith("finch_rag.bench.")]:
        monkeypatch.delitem(sys.modules, name)
        monkeypatch.delattr(finch_rag.bench, name.rpartition(".")[2])
    line = one_error(run(*command))
    assert line.startswith(f"Error: {package}")
    assert line.endswith("is not installed; install it with: pip install 'finch-rag[bench]'")
    assert not Path("bench-results").exists()


def inked(file: Path) -> float:
    """Share of a picture's pixels that are not white."""
    return float((imread(file)[..., :3] < 0.99).any(axis=-1).mean())


def test_quality_is_drawn(data: Path, asked: list[str]) -> None:
    command = ("quality", data, "--top-k", 3, "--limit", 2, "--budget", "40,60", "--max-new-tokens", 3)
    last_line(run(*command, "--plot", "figures/quality.png"))
    assert 0.01 < inked(Path("figures/quality.png")) < 0.5


def test_positions_are_drawn(data: Path, asked: list[str]) -> None:
    command = ("positions", data, "--passages", "3,5", "--limit", 2, "--budget", 40, "--max-new-tokens", 3)
    last_line(run(*command, "--plot", "places.png"))
    assert 0.01 < inked(Path("places.png")) < 0.5


def lines(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[float], list[float]]]:
    """What is drawn: of each line its name, places and means."""
    drawn: list[tuple[str, list[float], list[float]]] = []
    draw = plots._draw

    def watch(axis: Any, name: str, style: Any, at: list[float], estimates: list[dict[str, float]]) -> None:
        drawn.append((name, list(at), [estimate["mean"] for estimate in estimates]))
        draw(axis, name, style, at, estimates)

    monkeypatch.setattr(plots, "_draw", watch)
    return drawn


def test_a_line_joins_a_methods_budgets_by_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = lines(monkeypatch)
    small, large = {**row(0.5, 0.1), "kv_tokens": 90.0}, {**row(0.6, 0.2), "kv_tokens": 900.0}
    methods = {"new-peer@1000": small, "finch@1000": large, "finch@100": small, "full": large, "refine@10": {"n": 0}}
    settings = {"data": "set", "retriever": "bm25", "top_k": 3, "model": "org/m"}
    plots.plot_quality({"settings": settings, "cases": 4, "methods": methods}, tmp_path / "figure.svg")
    assert drawn == [
        ("finch", [90.0, 900.0], [0.5, 0.6]),
        ("full", [900.0], [0.6]),
        ("new-peer", [90.0], [0.5]),
        ("finch", [90.0, 900.0], [0.1, 0.2]),
        ("full", [900.0], [0.2]),
        ("new-peer", [90.0], [0.1]),
    ]


def test_places_are_shares_of_the_passages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = lines(monkeypatch)
    found = by_method({"0": {"finch@9": row(0.5)}, "5": {"finch@9": row(0.6)}, "10": {"finch@9": {"n": 0}}})
    settings = {"data": "set", "retriever": "bm25", "budget": 9, "model": "m"}
    plots.plot_positions({"settings": settings, "cases": 4, "passages": {"11": found}}, tmp_path / "figure.pdf")
    assert drawn == [("finch", [0.0, 0.5], [0.5, 0.6])]
