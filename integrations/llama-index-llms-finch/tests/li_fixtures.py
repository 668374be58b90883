"""Fixtures of these tests; conftest.py hands them to pytest."""

from __future__ import annotations

from typing import Any

import pytest

from finch_rag.prompts.builder import Prompt, PromptBuilder
from finch_rag.prompts.parsing import ParsedPrompt, parse_prompt


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[ParsedPrompt]:
    """What the engine makes of the prompts that it gets."""
    seen: list[ParsedPrompt] = []

    def recorded(*args: Any) -> ParsedPrompt:
        parsed = parse_prompt(*args)
        seen.append(parsed)
        return parsed

    monkeypatch.setattr("finch_rag.engine.parse_prompt", recorded)
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
