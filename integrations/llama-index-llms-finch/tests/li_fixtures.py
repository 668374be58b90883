"""Fixtures of these tests; conftest.py hands them to pytest."""

from __future__ import annotations

from typing import Any

import pytest

from finch_rag.prompt import Prompt, PromptBuilder
from finch_rag.templates import Request, take_apart


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """What the engine makes of the prompts that it gets."""
    seen: list[Request] = []

    def recorded(*args: Any) -> Request:
        request = take_apart(*args)
        seen.append(request)
        return request

    monkeypatch.setattr("finch_rag.engine.take_apart", recorded)
    return seen


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> list[Prompt]:
    """The prompts that are read, as token ids."""
    seen: list[Prompt] = []
    build = PromptBuilder.build

    def recorded(builder: PromptBuilder, *args: Any, **options: Any) -> Prompt:
        prompt = build(builder, *args, **options)
        seen.append(prompt)
        return prompt

    monkeypatch.setattr(PromptBuilder, "build", recorded)
    return seen
