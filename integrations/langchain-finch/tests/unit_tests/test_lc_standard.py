"""LangChain's own unit tests for chat models. None of them runs the model, so it has a name only."""

from __future__ import annotations

from typing import Any

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_finch import ChatFinch
from langchain_tests.unit_tests import ChatModelUnitTests
from syrupy.assertion import SnapshotAssertion


class TestChatFinchUnit(ChatModelUnitTests):
    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatFinch

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": "embedded"}

    @property
    def has_tool_calling(self) -> bool:
        return False  # bind_tools is overridden to say so in one line

    @property
    def supports_model_override(self) -> bool:
        return False  # another model is another engine, which takes minutes to load: a model is made for it

    @pytest.mark.xfail(
        reason="LangChain loads by name only the classes of its own list, which names no third party's; "
        "test_lc_lazy.py loads the model with allowed_objects=[ChatFinch]",
        raises=ValueError,
    )
    def test_serdes(self, model: BaseChatModel, snapshot: SnapshotAssertion) -> None:
        super().test_serdes(model, snapshot)
