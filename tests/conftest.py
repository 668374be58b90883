from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test may reach for a network

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: its kernels then run on a CPU
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start: the cores are taken

from finch_rag.corpus import retrieval
from finch_rag.engine import Finch
from finch_rag.models.cache import CompressedCache

from .command_line import CORPUS
from .hashed import hashed_embedder
from .small import chat_tokenizer, plain_tokenizer, small_finch, small_model, texts

torch.set_num_threads(1)  # small matrices gain nothing from more


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests begin first, so that no process waits for one at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def private_cache(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Keeps what the package stores out of the user's cache. Embedded tests use it: converting takes long."""
    if "embedded" not in request.keywords:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))
    return tmp_path / "user-cache" / "finch-rag"


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return chat_tokenizer()


@pytest.fixture(scope="session")
def untemplated() -> Any:
    """A tokenizer without chat template."""
    return plain_tokenizer()


@pytest.fixture(scope="session")
def finch() -> Finch:
    """An engine on a small model; tests must not change it."""
    return small_finch()


@pytest.fixture(scope="session")
def embedded() -> Finch:
    """An engine on the embedded model; tests must not change it."""
    return Finch.from_pretrained("embedded", max_new_tokens=16)


@pytest.fixture
def caches(monkeypatch: pytest.MonkeyPatch) -> weakref.WeakSet[CompressedCache]:
    """The caches that are alive."""
    alive: weakref.WeakSet[CompressedCache] = weakref.WeakSet()
    init = CompressedCache.__init__

    def tracked(cache: CompressedCache, *args: Any) -> None:
        init(cache, *args)
        alive.add(cache)

    monkeypatch.setattr(CompressedCache, "__init__", tracked)
    return alive


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small random model as `save_pretrained` writes it."""
    folder = tmp_path_factory.mktemp("model")
    small_model(max_position_embeddings=2048).save_pretrained(folder)
    chat_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "island.md").write_text(CORPUS)
    return folder


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "_load_embedder", lambda: hashed_embedder)


@pytest.fixture
def numbered(tmp_path: Path) -> Path:
    """A data set of which each passage answers the question that names its number; the first question has two."""
    passages = [{"id": f"p{n}", "text": f"{text} token{n}"} for n, text in enumerate(texts(12))]
    questions = [
        {
            "id": f"q{n}",
            "question": f"token{n}?",
            "answers": ["x"],
            "gold_ids": [f"p{n}", "p11"] if n == 0 else [f"p{n}"],
        }
        for n in range(12)
    ]
    for name, records in (("passages", passages), ("questions.dev", questions)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return tmp_path
