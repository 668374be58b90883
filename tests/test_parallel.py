"""A model that two processes share by transformers' tensor parallel plan, against one process that has all of it."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version

from finch_rag.paths import write_atomically

from .shared_model import QUESTIONS, engine
from .small import chat_tokenizer, small_model, texts

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        Version(transformers.__version__) < Version("5.17"), reason="older transformers take minutes to gather outputs"
    ),
]

FAMILIES = ("llama", "qwen3", "phi3")
_SECONDS = 240


def _models(folder: Path) -> Path:
    """Small models in folders, and what one process has made of the passages for the first."""
    sizes: dict[str, Any] = {"max_position_embeddings": 2048, "num_hidden_layers": 3}
    made = {kind: small_model(kind, **sizes) for kind in FAMILIES}
    made["uneven"] = small_model(**sizes, num_key_value_heads=1)
    made["gemma2"] = small_model("gemma2", "eager", **sizes)
    for name, model in made.items():
        model.save_pretrained(folder / name)
        chat_tokenizer().save_pretrained(folder / name)
    finch = engine(folder / "llama", heads="all", alone_heads=[(0, 3), (1, 0)])
    finch.compress(QUESTIONS[0], texts(12), strategy="loop").save(folder / "llama.cache")
    with finch.open_store(folder / "store") as store:
        store.add(texts(12))
    return folder


def _caches(folder: Path, models: Path) -> list[Path]:
    """The user's cache of each process; heads for the loop are known, but not to the second process."""
    caches = [folder / name for name in ("first", "second", "only")]
    known = {"format": 1, "model": "llama", "heads": [[0, 3, 0.5], [1, 0, 0.4]]}
    name = f"finch-rag/heads/{engine(models / 'llama').fingerprint}.json"
    for cache in (caches[0], caches[2]):
        write_atomically(cache / name, json.dumps(known))
    return caches


def _found(device: str, models: Path, caches: list[Path], results: Path) -> list[dict[str, Any]]:
    """What the first and the second of two processes find, and what one by itself."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    running = []
    for number, cache in enumerate(caches):
        environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "1"}
        if device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        if number < 2:
            rank = {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2"}
            environment |= {**rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, "-m", "tests.shared_model", str(models), str(results / f"{number}.json")]
        running.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    try:
        said = [process.communicate(timeout=_SECONDS)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0, 0], "\n".join(said)
    return [json.loads((results / f"{number}.json").read_text()) for number in range(3)]


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda", marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two CUDA devices")
        ),
    ],
)
def test_two_processes_that_share_a_model_do_as_one_that_has_it(device: str, tmp_path: Path) -> None:
    """One test, as all of it needs the same three processes, which take long to start."""
    models = _models(tmp_path / "models")
    caches = _caches(tmp_path, models)
    found = _found(device, models, caches, tmp_path)
    for part in ("named", "all", "together", "more", "qwen3", "phi3"):
        _check_answers(part, *(each[part] for each in found))
    _check_that_equal_answers_say_something(found[2])
    _check_heads([each["heads"] for each in found], caches)
    _check_agreements(*(each["agreements"] for each in found[:2]))
    for own in found[:2]:
        _check_refusals(own["refusals"])


def _check_answers(part: str, first: dict[str, Any], second: dict[str, Any], alone: dict[str, Any]) -> None:
    assert first == second, part
    assert first.keys() == alone.keys()
    for name, expected in alone.items():
        assert first[name]["text"] == expected["text"], (part, name)
        for cited, wanted in zip(first[name]["cited"], expected["cited"], strict=True):
            assert cited["share"] == pytest.approx(wanted["share"], abs=1e-5), (part, name)
            assert {**cited, "share": 0} == {**wanted, "share": 0}, (part, name)


def _check_that_equal_answers_say_something(alone: dict[str, Any]) -> None:
    """Passages are left out, others for each question and strategy, and answers differ."""
    for part in ("named", "all"):
        asked = [told for name, told in alone[part].items() if name.startswith("ask")]
        kept = [tuple(sorted(each["place"] for each in told["cited"] if each["kept"])) for told in asked]
        assert all(0 < len(places) < 12 for places in kept)
        assert len(set(kept)) == len({told["text"] for told in asked}) == 2 * len(QUESTIONS)
    assert any(cited["quotes"] for told in alone["named"].values() for cited in told["cited"])


def _check_heads(heads: list[dict[str, Any]], caches: list[Path]) -> None:
    """Those that the first process knows, or all find and the first one writes down, under one fingerprint."""
    assert heads[2]["loop"] == {"0": [3], "1": [0]}
    assert sum(map(len, heads[2]["alone"].values())) > 2
    assert heads[0] == heads[1] == heads[2]
    first, second, only = (cache / f"finch-rag/heads/{heads[0]['fingerprint']}.json" for cache in caches)
    assert not second.exists()
    pairs = [[pair[:2] for pair in json.loads(file.read_text())["alone_heads"]] for file in (first, only)]
    assert pairs[0] == pairs[1]


def _check_agreements(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert first == second
    assert len(set(first["drawn"])) == len(QUESTIONS)
    assert (first["least"], first["agreed"], first["first"]) == (5, {"rank": 0}, True)


def _check_refusals(said: dict[str, str]) -> None:
    expected = {
        "save": "InputError: .*device_map",
        "ask": "InputError: the cache has all heads, .*compress the passages again",
        "store": "SettingsError: .*device_map.*read_only=True",
        "server": "SettingsError: .*2 processes.*device_map",
        "compile": "ModelError: compile_layers .*leave it out",
        "quantised": "ModelError: .*quantised.*device_map",
        "uneven": "ModelError: 2 processes .* has 1: .*device_map",
        "own attention": "ModelError: .*its own attention.*device_map",
        "memory": "ModelError: .*77 tokens.*smaller chunk_size",
    }
    assert said.keys() == expected.keys()
    for name, line in expected.items():
        assert re.match(line, said[name]), said[name]
