"""What finch-rag keeps for itself, changed by somebody: heads, calibrations and indexes are found again."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from finch_rag.bench.quality import read_results
from finch_rag.corpus import retrieval
from finch_rag.corpus.retrieval import Retriever
from finch_rag.heads import stored as heads
from finch_rag.heads.search import HeadScore
from finch_rag.models.fingerprint import fingerprint
from finch_rag.paths import cache_folder
from finch_rag.quotes import support

from .crafted import DEEP
from .small import chat_tokenizer, small_model
from .test_retrieval import PASSAGES, embedded_texts, index_files

__all__ = ["embedded_texts"]  # a fixture

HUGE = "9" * 400
BAD: dict[str, str] = {
    "nothing": "",
    "half": '{"format": 1, "KEY": [[0, ',
    "a list": "[]",
    "a text": '"heads"',
    "null": "null",
    "no object but deep": DEEP,
    "deep": '{"format": 1, "KEY": ' + DEEP + "}",
    "deep and parsed": '{"format": 1, "KEY": ' + "[" * 900 + "]" * 900 + "}",
    "another format": '{"format": 9, "KEY": GOOD}',
    "a format that is a list": '{"format": [], "KEY": GOOD}',
    "no format": '{"KEY": GOOD}',
    "huge": '{"format": 1, "KEY": GOOD, "more": "' + "x" * 2_000_000 + '"}',
    "bytes": "\x00\x01",
    "none": '{"format": 1, "KEY": []}',
    "an object": '{"format": 1, "KEY": {"0": 1}}',
    "text in place of a list": '{"format": 1, "KEY": "012"}',
    "a number in place of a list": '{"format": 1, "KEY": 3}',
}
BAD_HEADS = {
    "pairs without score": "[[0, 1]]",
    "four numbers": "[[0, 1, 0.5, 2]]",
    "a layer that is not there": "[[99, 0, 0.5]]",
    "a negative layer": "[[-1, 0, 0.5]]",
    "a head that is not there": "[[0, 99, 0.5]]",
    "half a layer": "[[0.5, 0, 0.5]]",
    "a layer as text": '[["0", "1", 0.5]]',
    "a layer that is true": "[[true, 0, 0.5]]",
    "a layer of infinity": "[[Infinity, 0, 0.5]]",
    "a layer of NaN": "[[NaN, 0, 0.5]]",
    "a huge layer": f"[[{HUGE}, 0, 0.5]]",
    "a score of NaN": "[[0, 1, NaN]]",
    "a score of infinity": "[[0, 1, -Infinity]]",
    "a huge score": f"[[0, 1, {HUGE}]]",
    "a score as text": '[[0, 1, "much"]]',
    "rows that are text": '["012"]',
}
BAD_WEIGHTS = {
    "two": "[1.0, 2.0]",
    "four": "[1.0, 2.0, 3.0, 4.0]",
    "NaN": "[1.0, NaN, 2.0]",
    "infinity": "[1.0, 2.0, -Infinity]",
    "huge": f"[1.0, 2.0, {HUGE}]",
    "texts": '["1.0", "2.0", "3.0"]',
    "truth": "[true, 1.0, 2.0]",
    "null": "[null, 1.0, 2.0]",
    "lists": "[[1.0], 1.0, 2.0]",
}


def filled(key: str, good: str, values: dict[str, str]) -> dict[str, str]:
    whole = {name: text.replace("KEY", key).replace("GOOD", good) for name, text in BAD.items()}
    return whole | {f"{key}: {name}": f'{{"format": 1, "{key}": {value}}}' for name, value in values.items()}


HEADS = filled("heads", "[[0, 1, 0.5]]", BAD_HEADS)
WEIGHTS = filled("weights", "[1.0, 2.0, 3.0]", BAD_WEIGHTS)


def put(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


@pytest.mark.parametrize("name", HEADS)
def test_crafted_heads_are_found_again(monkeypatch: pytest.MonkeyPatch, private_cache: Path, name: str) -> None:
    model = small_model()
    monkeypatch.setattr(heads, "find_heads", lambda *args, **options: [HeadScore(1, 2, 0.5)])
    file = private_cache / "heads" / f"{fingerprint(model)}.json"
    put(file, HEADS[name])
    assert heads.resolve_heads("auto", model, chat_tokenizer(), "small") == {1: [2]}
    assert heads.load_heads(model) == [(1, 2)]


@pytest.mark.parametrize("name", HEADS)
def test_crafted_heads_for_the_other_use_are_not_kept(private_cache: Path, name: str) -> None:
    model = small_model()
    file = private_cache / "heads" / f"{fingerprint(model)}.json"
    put(file, HEADS[name])
    heads.save_heads(model, "small", [HeadScore(1, 2, 0.5)], "alone")
    assert list(json.loads(file.read_text())) == ["format", "model", "alone_heads"]


def test_heads_in_place_of_which_there_is_no_file_are_found_again(
    monkeypatch: pytest.MonkeyPatch, private_cache: Path
) -> None:
    model = small_model()
    monkeypatch.setattr(heads, "find_heads", lambda *args, **options: [HeadScore(1, 2, 0.5)])
    file = private_cache / "heads" / f"{fingerprint(model)}.json"
    file.parent.mkdir(parents=True)
    os.mkfifo(file)
    assert heads.resolve_heads("auto", model, chat_tokenizer(), "small") == {1: [2]}
    file.unlink()
    file.mkdir()
    assert heads.resolve_heads("auto", model, chat_tokenizer(), "small") == {1: [2]}


@pytest.mark.parametrize("name", WEIGHTS)
def test_crafted_weights_are_fitted_again(private_cache: Path, name: str) -> None:
    put(cache_folder("support") / "model.json", WEIGHTS[name])
    assert support._known("model.json") is None


def test_good_weights_are_taken(private_cache: Path) -> None:
    put(cache_folder("support") / "model.json", '{"format": 1, "weights": [1, 2.5, -3]}')
    assert support._known("model.json") == (1.0, 2.5, -3.0)


def save(file: Path, name: str, vectors: Any) -> None:
    save_file({name: vectors}, str(file), {"sha256": retrieval._checksum(vectors)})


def as_folder(file: Path, good: Any) -> None:
    file.unlink()
    file.mkdir()


def as_pipe(file: Path, good: Any) -> None:
    file.unlink()
    os.mkfifo(file)


INDEXES: dict[str, Callable[[Path, Any], Any]] = {
    "another name": lambda file, good: save(file, "vectors", good),
    "no checksum": lambda file, good: save_file({"embeddings": good}, str(file)),
    "a number": lambda file, good: save(file, "embeddings", np.array(1.0, dtype="float32")),
    "a row": lambda file, good: save(file, "embeddings", good[0]),
    "three dimensions": lambda file, good: save(file, "embeddings", good[None]),
    "passages in the last dimension": lambda file, good: save(file, "embeddings", np.ascontiguousarray(good.T)),
    "a passage less": lambda file, good: save(file, "embeddings", good[1:]),
    "no width": lambda file, good: save(file, "embeddings", good[:, :0]),
    "float64": lambda file, good: save(file, "embeddings", good.astype("float64")),
    "float16": lambda file, good: save(file, "embeddings", good.astype("float16")),
    "int64": lambda file, good: save(file, "embeddings", good.astype("int64")),
    "truth": lambda file, good: save(file, "embeddings", good > 0),
    "NaN": lambda file, good: save(file, "embeddings", good * float("nan")),
    "infinity": lambda file, good: save(file, "embeddings", good * float("inf")),
    "zeros": lambda file, good: save(file, "embeddings", good * 0),
    "huge numbers": lambda file, good: save(file, "embeddings", good * 1e30),
    "other bytes": lambda file, good: file.write_bytes(file.read_bytes()[:-9] + b"123456789"),
    "empty": lambda file, good: file.write_bytes(b""),
    "text": lambda file, good: file.write_bytes(b"no index" * 999),
    "a huge header": lambda file, good: file.write_bytes(b"\xff" * 8 + file.read_bytes()[8:]),
    "half": lambda file, good: file.write_bytes(file.read_bytes()[:700]),
    "a dtype that numpy lacks": lambda file, good: file.write_bytes(file.read_bytes().replace(b'"F32"', b'"F33"')),
    "a folder": as_folder,
    "a pipe": as_pipe,
}


@pytest.mark.parametrize("name", INDEXES)
def test_a_crafted_index_is_built_again(
    embedded_texts: list[str], private_cache: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    expected = Retriever.build(PASSAGES).search("a lamp", 3)
    (file,) = index_files(private_cache)
    good = retrieval._load(file, len(PASSAGES))
    INDEXES[name](file, good)
    embedded_texts.clear()
    with caplog.at_level(logging.WARNING, "finch_rag"):
        assert Retriever.build(PASSAGES).search("a lamp", 3) == expected
    assert len(embedded_texts) == len(PASSAGES) + 1  # and the question


def test_lines_of_results_that_are_none_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_text(f'{{"id": 1}}\n{DEEP}\n[]\n7\n{{"id": 2}}\n{{"id": ')
    assert [found["id"] for found in read_results(tmp_path)] == [1, 2]
