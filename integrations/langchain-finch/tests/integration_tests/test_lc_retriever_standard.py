"""LangChain's own tests of retrievers, on `FinchRetriever`."""

from __future__ import annotations

from typing import Any

import pytest
from langchain_core.retrievers import BaseRetriever
from langchain_finch import ChatFinch, FinchRetriever
from langchain_tests.integration_tests import RetrieversIntegrationTests
from lc_support import QUESTION, texts_as_documents


class TestFinchRetriever(RetrieversIntegrationTests):
    @pytest.fixture(autouse=True)
    def _filled(self, chat: ChatFinch) -> None:
        self._store = FinchRetriever.from_documents(texts_as_documents(12), llm=chat).passage_store

    @property
    def retriever_constructor(self) -> type[BaseRetriever]:
        return FinchRetriever

    @property
    def retriever_constructor_params(self) -> dict[str, Any]:
        return {"store": self._store}

    @property
    def retriever_query_example(self) -> str:
        return QUESTION
