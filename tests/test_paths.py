"""Files are replaced as a whole or not at all, also where the disk is full: files may not grow beyond some bytes."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finch_rag.bench.cases import QualityCase, read_cases, write_cases
from finch_rag.corpus.reading import Question
from finch_rag.corpus.retrieval import _load, _save
from finch_rag.errors import InputError
from finch_rag.models.cache import CompressedCache
from finch_rag.paths import replacing, write_atomically
from finch_rag.prompts.passages import Passage

from .small import small_finch, texts


@contextmanager
def full_after(size: int) -> Iterator[None]:
    """Every file that grows beyond so many bytes is an error of the system."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("size", [0, 1, 4096])
def test_text_that_does_not_fit_leaves_the_old_file(tmp_path: Path, size: int) -> None:
    file = tmp_path / "heads.json"
    write_atomically(file, "old")
    with full_after(size), pytest.raises(OSError, match="File too large"):
        write_atomically(file, "new" * 4096)
    assert file.read_text() == "old"
    assert names(tmp_path) == ["heads.json"]


@pytest.mark.parametrize("name", ["x" * 255, "\N{CYRILLIC SMALL LETTER ZHE}" * 127])
def test_a_name_may_be_as_long_as_the_system_takes(tmp_path: Path, name: str) -> None:
    write_atomically(tmp_path / name, "text")
    assert names(tmp_path) == [name]


def test_a_block_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail() -> None:
        with replacing(tmp_path / "file") as new:
            new.write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert names(tmp_path) == []


@pytest.mark.parametrize("size", [0, 100, 4096])
def test_a_cache_that_does_not_fit_is_one_line_and_leaves_the_old_one(tmp_path: Path, size: int) -> None:
    finch = small_finch()
    old, new = (finch.compress(question, texts(3)) for question in ("Who?", "When?"))
    file = tmp_path / "cache.safetensors"
    old.save(file)
    with full_after(size), pytest.raises(InputError, match=rf"the cache, {new.nbytes} bytes, cannot be written to .*"):
        new.save(file)
    assert CompressedCache.load(file).document.question == "Who?"
    assert names(tmp_path) == ["cache.safetensors"]


def test_a_cache_in_a_folder_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file or directory"):
        small_finch().compress("Who?", texts(3)).save(tmp_path / "nowhere" / "cache")


def test_an_index_that_does_not_fit_is_not_stored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file, embeddings = tmp_path / "index", np.eye(64, 384, dtype=np.float32)
    with full_after(4096):
        _save(file, embeddings)
    assert "it will be built again next time" in caplog.text
    assert names(tmp_path) == []
    _save(file, embeddings)
    found: Any = _load(file, 64)
    assert (found == embeddings).all()


def test_cases_that_do_not_fit_leave_the_old_ones(tmp_path: Path) -> None:
    def cases(text: str, count: int) -> list[QualityCase]:
        noise = [np.random.default_rng(n).bytes(64).hex() for n in range(count)]  # cannot be packed
        return [QualityCase(Question(str(n), text, ("a",), ()), [Passage(noise[n])], [0]) for n in range(count)]

    file = tmp_path / "cases.jsonl.gz"
    write_cases(cases("old", 1), file)
    with full_after(1024), pytest.raises(InputError, match=r"the cases cannot be written to .*: File too large"):
        write_cases(cases("new", 400), file)
    assert [case.question.question for case in read_cases(file)] == ["old"]
    assert names(tmp_path) == ["cases.jsonl.gz"]
