from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread
from transformers import CONFIG_MAPPING
from typer.testing import CliRunner

from finch_rag.bench import plots, shapes, speed
from finch_rag.bench.readings import READINGS, STORE_SHORTLISTS, STRATEGIES
from finch_rag.bench.shapes import SHAPES, random_finch, random_model, random_prompt, worst_heads
from finch_rag.bench.timing import Measurement, SkippedError, SpeedCase, Subject, matrix_rate
from finch_rag.cli.app import app
from finch_rag.errors import InputError, MissingExtraError
from finch_rag.heads.alone import ALONE_HEADS
from finch_rag.heads.search import HEADS

from .small import small_config

CPU = torch.device("cpu")


def tiny() -> Any:
    return random_model("tiny", CPU, torch.float32)


@pytest.fixture(scope="module")
def summary() -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # of the measuring processes, which would wait for each other's threads
        result = CliRunner().invoke(
            app,
            "bench speed --shape tiny --tokens 1400 --budget 256 --chunk-size 512 --repeats 1".split(),
            catch_exceptions=False,
        )
    assert result.exit_code == 0, result.output
    assert "seconds finch/full at 1400" in result.stdout
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def test_both_methods_are_measured_at_each_length(summary: dict[str, Any]) -> None:
    assert [(row["method"], row["tokens"]) for row in summary["cases"]] == [("full", 1400), ("finch", 1400)]
    for row in summary["cases"]:
        assert 0 < row["prefill_seconds"] <= row["first_token_seconds"]
        assert row["decode_ms"] > 0
        assert row["matrix_share"] >= 0  # of so small a model on a busy machine it may be rounded to none
    assert summary["model"] == "tiny (random weights)"
    assert set(summary["ratios"]) == {"seconds finch/full at 1400", "memory finch/full at 1400"}


def test_ratios_compare_with_the_plain_pass_and_with_the_shortest_text() -> None:
    seconds = {("full", 100): 4.0, ("finch", 100): 2.0, ("finch", 400): 7.0}
    rows: list[dict[str, Any]] = [
        {"method": method, "tokens": tokens, "first_token_seconds": taken, "peak_mib": 10.0}
        for (method, tokens), taken in seconds.items()
    ]
    rows.append({"method": "full", "tokens": 400, "skipped": "no memory"})
    assert speed.ratios(rows) == {
        "seconds finch/full at 100": 0.5,
        "memory finch/full at 100": 1.0,
        "seconds finch 400/100": 3.5,
        "memory finch 400/100": 1.0,
    }


def test_the_figure_is_drawn_and_leaves_out_what_was_skipped(summary: dict[str, Any], tmp_path: Path) -> None:
    rows = [*summary["cases"], {"method": "kvpress", "tokens": 1400, "skipped": "no memory"}]
    plots.plot_speed({**summary, "cases": rows}, tmp_path / "speed.png")
    image = imread(tmp_path / "speed.png")
    assert image.shape[0] > 300
    assert image.std() > 0.05


@pytest.mark.parametrize("tokens", [1, 95, 1000, 5000])
def test_a_random_prompt_has_so_many_tokens(tokens: int) -> None:
    prompt = random_prompt(tiny(), tokens)
    assert sum(map(len, prompt.passages)) == tokens
    assert all(0 < len(passage) <= 160 for passage in prompt.passages)
    assert len(prompt.question) == 48
    assert prompt == random_prompt(tiny(), tokens)


def test_the_heads_of_a_shape_are_laid_where_a_reading_ends_last() -> None:
    assert worst_heads(tiny(), 3) == [(0, 0), (1, 0), (2, 0)]  # of four layers the lower two thirds
    assert worst_heads(tiny(), 2) == [(1, 0), (2, 0)]
    finch = random_finch("tiny")
    assert list(finch.heads) == worst_heads(finch.model, HEADS)
    assert list(finch.alone_heads) == worst_heads(finch.model, ALONE_HEADS)


def test_shapes_have_the_sizes_of_their_models() -> None:
    sizes = {}
    with torch.device("meta"):
        known = [name for name in SHAPES if name != "qwen3.5-8b" or "qwen3_5_text" in CONFIG_MAPPING]
        for name in known:
            model = random_model(name, torch.device("meta"), torch.bfloat16)
            model.tie_weights()  # transformers 5.0 does not on the meta device
            sizes[name] = model.num_parameters()
    assert sizes["llama-8b"] == pytest.approx(8.03e9, rel=0.01)
    assert sizes["qwen-1.5b"] == pytest.approx(1.54e9, rel=0.01)
    assert sizes["gpt-oss-20b"] == pytest.approx(20.9e9, rel=0.01)
    assert "qwen3.5-8b" not in sizes or sizes["qwen3.5-8b"] == pytest.approx(8.95e9, rel=0.01)


def test_a_shape_that_is_read_by_its_own_attention_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    sliding = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 16}
    shape = partial(small_config, "gemma3_text", num_hidden_layers=4, max_position_embeddings=4096, **sliding)
    monkeypatch.setitem(shapes.SHAPES, "sliding", shape)
    for method in ("full", "finch", "finch-store-best"):
        measurement = Measurement(SpeedCase(method=method, tokens=600, model="", shape="sliding", budget=128))
        run = measurement.run()
        assert run.first_token_seconds > 0
        assert (run.matrix_share is None) == (method != "full")
    assert measurement.subject.finch.alone_heads == [(1, 0), (1, 1), (1, 2), (1, 3)]  # of the lower two thirds


@pytest.mark.parametrize("method", ["full", "finch", "finch-loop"])
def test_a_method_without_memory_is_skipped_with_the_reason(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    measurement = Measurement(SpeedCase(method=method, tokens=600, model="", shape="tiny", budget=128, chunk_size=256))
    run = measurement.run()
    assert run.peak_mib >= 0
    assert run.matrix_share is not None
    assert run.matrix_share > 0

    def starve(*args: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    layers: Any = measurement.subject.finch.model.base_model.layers
    layers[0].register_forward_pre_hook(starve)
    with pytest.raises(SkippedError, match="no memory left"):
        measurement.run()


def test_the_measured_matrix_rate_is_one_of_a_computer() -> None:
    assert 1e7 < matrix_rate(tiny()) < 1e16


def test_a_method_reads_by_its_strategy() -> None:
    subject = Subject.of(model="", shape="tiny")
    prompt = random_prompt(subject.finch.model, 1400)
    found = {}
    for method, strategy in STRATEGIES.items():
        request = subject.request(prompt, budget=256, strategy=strategy, new_tokens=1)
        found[method] = request.plan and request.plan.strategy
    assert found == {"finch": "independent", "finch-compiled": "independent", "finch-loop": "loop"}


def test_help_names_every_shape_and_method(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    shown = CliRunner().invoke(app, ["bench", "speed", "--help"]).stdout
    words = set(re.findall(r"[\w.-]*\w", shown))
    assert {*SHAPES, *READINGS, *STORE_SHORTLISTS} <= words
    assert {word for word in words if word.startswith("finch-")} <= {*READINGS, *STORE_SHORTLISTS, "finch-rag"}


def test_unknown_shapes_and_methods_are_named() -> None:
    with pytest.raises(InputError, match=r"shape 'llama-9b' is unknown: use llama-8b"):
        speed.main(shape="llama-9b")
    known = "full, finch, finch-compiled, finch-loop, kvpress, finch-store, finch-store-best"
    with pytest.raises(InputError, match=rf"method finsh is unknown: use {known}$"):
        speed.main(shape="tiny", methods=["finsh"])
    with pytest.raises(InputError, match="at 0 repeats"):
        speed.main(shape="tiny", repeats=0)
    with pytest.raises(InputError, match=r"speed\.txt is of no kind"):
        speed.main(shape="tiny", plot=Path("speed.txt"))


def test_kvpress_needs_its_own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "kvpress", None)
    with pytest.raises(MissingExtraError, match="make bench-peers"):
        speed.main(shape="tiny", methods=["kvpress"])
