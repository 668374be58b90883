"""A model's own cache in static buffers: what can be a CUDA graph on a GPU."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from finch_rag import Finch
from finch_rag.decode.own_step import OwnStep
from finch_rag.models.forward import own_positions
from finch_rag.models.kept_cache import KeptCache
from finch_rag.models.own_attention import use_own_attention
from finch_rag.models.own_cache import new_cache

from .families import config_of
from .small import model_of, texts
from .test_own_models import QUESTION, family, new_finch, require

KINDS = ("gemma2", "gemma3_text", "gpt_oss", "qwen3_next", "gpt2", "deepseek_v3")  # a window of 16 tokens, where any
CUDA = torch.cuda.is_available()


@torch.inference_mode()
def filled(model: Any, tokens: int, first: int = 20) -> KeptCache:
    cache = new_cache(model, tokens)
    ids = torch.arange(first, first + tokens, device=model.device)[None]
    model(ids, past_key_values=cache, use_cache=True, **own_positions(model, cache, tokens))
    return cache


@torch.inference_mode()
def plain(model: Any, cache: KeptCache, tokens: list[int]) -> list[torch.Tensor]:
    """Logits after each token, by passes on the cache itself."""
    found = []
    for token in tokens:
        ids = torch.tensor([[token]], device=model.device)
        found.append(model(ids, past_key_values=cache, use_cache=True, **own_positions(model, cache, 1)).logits[:, -1])
    return found


def watched(kind: str) -> Any:
    model = family(kind)
    use_own_attention(model)
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [9, 40])
def test_a_step_computes_what_a_pass_on_the_cache_computes(kind: str, length: int) -> None:
    model = watched(kind)
    cache = filled(model, length)
    step = OwnStep(model, cache, 64)
    step.load([cache])
    tokens = [5, 9, 300, 7, 8, 11, 2, 40, 41, 42]  # from 9 tokens on, beyond the window of 16
    for token, expected in zip(tokens, plain(model, cache, tokens), strict=True):
        torch.testing.assert_close(step([token]), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_longer_answer_left_behind_is_not_seen(kind: str) -> None:
    model = watched(kind)
    step = OwnStep(model, filled(model, 3), 64)
    step.load([filled(model, 50)])
    step([8])
    short = filled(model, 5, first=90)
    step.load([short])
    torch.testing.assert_close(step([6]), plain(model, short, [6])[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_the_same_with_and_without(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    finch = new_finch(kind)
    expected = [finch.ask(question, texts(20)).text for question in (QUESTION, "when?")]
    monkeypatch.setattr(finch.runtime.graphs, "enabled", True)
    assert [finch.ask(question, texts(20)).text for question in (QUESTION, "when?")] == expected
    assert [answer.text for answer in finch.ask_many([QUESTION, "when?"], texts(20))] == expected
    assert [type(step) for step in finch.runtime.graphs.idle] == [OwnStep]


def test_a_cache_of_other_kinds_decodes_by_plain_steps_which_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    require("falcon_h1")
    model = model_of(config_of("falcon_h1"), "eager")
    finch = Finch(model, new_finch("gemma2").tokenizer, budget=60, max_new_tokens=4, alone_heads=[(0, 1)])
    expected = finch.ask(QUESTION, texts(20)).text
    monkeypatch.setattr(finch.runtime.graphs, "enabled", True)
    with caplog.at_level(logging.WARNING):
        assert [finch.ask(QUESTION, texts(20)).text for _ in range(2)] == [expected] * 2
    (message,) = [record.message for record in caplog.records if "CUDA graph" in record.message]
    assert message.startswith("FalconH1ForCausalLM cannot be captured as a CUDA graph, so it decodes slower: its cache")


def test_a_step_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = watched("gemma2")
    cache = filled(model, 9)
    monkeypatch.setattr(OwnStep, "_masks", lambda step: step._mask(step._places != step._position))  # sees itself alone
    with pytest.raises(RuntimeError, match="computes something else"):
        OwnStep(model, cache, 64)


@pytest.mark.skipif(not CUDA, reason="there is no CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_a_captured_step_computes_the_same_on_a_gpu(kind: str) -> None:
    model = watched(kind).cuda()
    cache = filled(model, 30)
    step = OwnStep(model, cache, 512)
    assert step.captured
    step.load([cache])
    for token, expected in zip([5, 9, 300], plain(model, cache, [5, 9, 300]), strict=True):
        torch.testing.assert_close(step([token]), expected, atol=1e-3, rtol=1e-3)
