"""Fixtures of these tests; conftest.py hands them to pytest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import finch_rag.decode.generation
from finch_rag.prompts.builder import Prompt, PromptBuilder
from finch_rag.prompts.parsing import ParsedPrompt, parse_prompt
from finch_rag.request import Request
from finch_rag.resolving import resolve_parsed
from tests.small import chat_tokenizer

Says = Callable[..., None]


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
    """The prompts that are built, as token ids; more than are read where one may not fit."""
    seen: list[Prompt] = []
    build = PromptBuilder.build

    def recorded(builder: PromptBuilder, *args: Any, **options: Any) -> Prompt:
        prompt = build(builder, *args, **options)
        seen.append(prompt)
        return prompt

    monkeypatch.setattr(PromptBuilder, "build", recorded)
    return seen


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch) -> Says:
    """Makes the model say given texts, one a call; all but the choice of tokens stays as it is."""

    def script(*answers: str) -> None:
        left = list(answers)

        def sampler(*_: Any) -> Any:
            answer = left.pop(0) if len(left) > 1 else left[0]
            tokens = iter([*chat_tokenizer()(answer)["input_ids"], chat_tokenizer().eos_token_id])
            return lambda logits: torch.tensor([next(tokens)])

        monkeypatch.setattr(finch_rag.decode.generation, "sampler", sampler)

    return script


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[Prompt]:
    """The prompts that are read, one a call, as token ids."""
    seen: list[Prompt] = []

    def recorded(*args: Any) -> Request:
        request = resolve_parsed(*args)
        seen.append(request.prompt)
        return request

    monkeypatch.setattr("finch_rag.engine.resolve_parsed", recorded)
    return seen
