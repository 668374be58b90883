from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_finch import ChatFinch, FinchLLM
from lc_support import SETTINGS, texts_as_documents

from finch_rag import Finch, Passage
from finch_rag.sharing import release_engine
from tests.small import chat_tokenizer, small_model


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small model with random weights, saved as a user's would be."""
    path = tmp_path_factory.mktemp("models") / "small"
    small_model(max_position_embeddings=4096).save_pretrained(path)
    chat_tokenizer().save_pretrained(path)
    return str(path)


@pytest.fixture
def chat(folder: str) -> ChatFinch:
    return ChatFinch(model=folder, **SETTINGS)


@pytest.fixture
def llm(folder: str) -> FinchLLM:
    return FinchLLM(model=folder, **SETTINGS)


@pytest.fixture(scope="session", autouse=True)
def shared(folder: str) -> Finch:
    """The small model's engine, held so that it is loaded once for all tests."""
    return ChatFinch(model=folder, **SETTINGS).engine


@pytest.fixture(autouse=True)
def nothing_is_kept(shared: Finch) -> Iterator[None]:
    """No test finds what another one has loaded, but for the engine that all share."""
    release_engine()
    yield
    release_engine()


@pytest.fixture(scope="session")
def documents() -> list[Document]:
    """Documents that do not fit the budget of `SETTINGS` together; tests must not change them."""
    return texts_as_documents(12)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[dict[str, str]], list[Passage], dict[str, Any]]]:
    """What the engine is asked: messages, passages, options."""
    seen: list[Any] = []
    stream = Finch.stream_chat

    def recorded(finch: Finch, messages: Any, passages: Any = (), **options: Any) -> Any:
        seen.append((messages, passages, options))
        return stream(finch, messages, passages, **options)

    monkeypatch.setattr(Finch, "stream_chat", recorded)
    return seen


@pytest.fixture
def database(tmp_path: Path) -> str:
    return str(tmp_path / "cache.db")
