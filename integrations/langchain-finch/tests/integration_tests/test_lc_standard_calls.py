"""LangChain's own integration tests for chat models, on a small model with random weights."""

from __future__ import annotations

from typing import Any

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_finch import ChatFinch
from langchain_tests.integration_tests import ChatModelIntegrationTests
from lc_support import answer_with


class TestChatFinchCalls(ChatModelIntegrationTests):
    @pytest.fixture(autouse=True)
    def _model(self, folder: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        self._folder = folder
        if "structured_output" in request.node.name or "json_mode" in request.node.name:
            # Random weights keep to a schema where it is forced, but hardly ever end a text in it: what the model says
            # is scripted, what becomes of it is tested.
            answer_with(monkeypatch, '{"setup": "Why do cats purr?", "punchline": "They have found the answer."}')

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatFinch

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": self._folder}

    @property
    def has_tool_calling(self) -> bool:
        return False  # a model that reads through Finch calls no tools

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def supports_model_override(self) -> bool:
        return False  # another model is another engine, which takes minutes to load: a model is made for it
