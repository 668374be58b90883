from __future__ import annotations

from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient

from finch_rag import Answer, Finch

from .support import PASSAGES, QUESTION, client_of, served_finch


@pytest.fixture(scope="session")
def engine() -> Finch:
    """An engine on a small model; tests must not change it."""
    return served_finch()


@pytest.fixture(scope="session")
def answer(engine: Finch) -> Answer:
    """What the engine answers."""
    return engine.ask(QUESTION, PASSAGES)


@pytest.fixture(scope="session")
def client(engine: Finch) -> Iterator[TestClient]:
    """A client of a server without stores, keys and limits of its own."""
    with client_of(engine) as client:
        yield client
