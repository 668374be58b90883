"""``finch-rag check``: what runs is called right, what is broken is called wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AttentionInterface

from finch_rag import Finch, check_model
from finch_rag.checkup.checking import Finding
from finch_rag.models import attention
from finch_rag.prompts.chat_template import answer_at_once
from finch_rag.prompts.peculiarities import peculiarities

from .command_line import one_error, run
from .small import CHATML, chat_tokenizer, small_finch, small_model, tokenizer_with
from .test_own_models import new_finch

NAMES = ["model", "reading", "window", "prompts", "equal", "evicted", "needles", "speed"]


def checked(finch: Finch) -> dict[str, Finding]:
    found = {finding.name: finding for finding in check_model(finch)}
    assert list(found) == NAMES
    return found


def loop_finch(**changes: Any) -> Finch:
    settings = {"reread": True, "budget": None, "chunk_size": "auto", "instructions": None, **changes}
    model = small_model(max_position_embeddings=4096)
    return Finch(model, chat_tokenizer(), name="small", heads=[(0, 1)], alone_heads=[(0, 1)], **settings)


def test_a_model_for_the_loop_is_right() -> None:
    found = checked(loop_finch())
    assert found["model"].detail.startswith("small (llama): 0 million parameters, 0.00 GB, float32, on cpu")
    assert found["reading"].detail == "the loop, and each passage alone"
    assert found["window"].detail == "4,096 tokens"
    assert found["equal"].passed
    assert "4 of 4 tokens are the same" in found["equal"].detail
    assert found["evicted"].passed
    assert "moved keys" in found["evicted"].detail
    assert found["needles"].passed is not None


@pytest.mark.parametrize("kind", ["gemma2", "gpt_oss", "qwen3_next"])
def test_a_model_that_is_read_alone_is_right(kind: str) -> None:
    found = checked(new_finch(kind, budget=None))
    assert found["reading"].detail.startswith("each passage alone, by the model's own attention: ")
    assert found["equal"].passed
    assert found["evicted"].passed
    assert "logits" in found["evicted"].detail


@pytest.fixture
def broken_attention() -> Iterator[None]:
    """Finch's attention with the scaling of another model."""

    def broken(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **options: Any) -> Any:
        return attention.attention_forward(module, query, key, value, mask, scaling=1.5 * scaling, **options)

    yield AttentionInterface.register(attention.ATTENTION_NAME, broken)
    AttentionInterface.register(attention.ATTENTION_NAME, attention.attention_forward)


def test_an_attention_that_computes_something_else_is_found(request: pytest.FixtureRequest) -> None:
    finch = loop_finch()
    request.getfixturevalue("broken_attention")
    assert checked(finch)["equal"].passed is False


def test_keys_at_wrong_positions_are_found() -> None:
    finch = loop_finch()
    rotation = finch.runtime.rotation
    finch.runtime._rotation = type(rotation)(rotation.inv_freq * 1.01, rotation.interleaved, rotation.rotates)
    assert checked(finch)["evicted"].passed is False


def test_a_window_below_the_positions_is_told() -> None:
    finch = Finch(
        small_model("mistral", sliding_window=2048, max_position_embeddings=4096),
        chat_tokenizer(),
        heads="all",
        alone_heads=[(0, 1)],
    )
    window = next(finding for finding in check_model(finch) if finding.name == "window")
    assert window.detail == "2,048 tokens of 4,096: Finch stays below what all layers see"


def test_two_beginnings_are_wrong() -> None:
    tokenizer = tokenizer_with("<|endoftext|><|endoftext|>" + CHATML)
    tokenizer.bos_token = "<|endoftext|>"
    finch = Finch(small_model(max_position_embeddings=4096), tokenizer, heads="all", alone_heads=[(0, 1)])
    prompts = next(finding for finding in check_model(finch) if finding.name == "prompts")
    assert prompts == Finding("prompts", "begins with <|endoftext|> 2 times", False)


def test_what_is_peculiar_to_a_template_is_told() -> None:
    once = tokenizer_with("<|endoftext|>" + CHATML)
    once.bos_token = "<|endoftext|>"
    assert peculiarities(once) == ["begins with <|endoftext|>"]
    forgetful = "{% for m in messages %}{% if m['role'] != 'assistant' %}{{ m['content'] }}{% endif %}{% endfor %}"
    assert peculiarities(tokenizer_with(forgetful)) == ["no BOS token", "earlier answers are not shown"]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("<|im_start|>assistant\n", "<|im_start|>assistant\n"),
        ("<|im_start|>assistant\n<think>\n", "<|im_start|>assistant\n<think>\n\n</think>\n\n"),
        ("<|start|>assistant", "<|start|>assistant<|channel|>final<|message|>"),
    ],
)
def test_an_answer_is_opened_and_no_thought(prompt: str, expected: str) -> None:
    assert answer_at_once(prompt) == expected


def test_a_template_is_asked_not_to_think() -> None:
    template = CHATML + "{% if enable_thinking is not defined or enable_thinking %}<think>\nlong{% endif %}"
    prompt = small_finch(tokenizer=tokenizer_with(template)).prompts.build("who?", [])
    assert str(tokenizer_with(template).decode(prompt.tail)).endswith("assistant\n")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    small_model(max_position_embeddings=4096).save_pretrained(tmp_path)
    chat_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def test_the_command_lists_what_was_found(folder: Path) -> None:
    as_json = run("check", folder, "--json")
    found = json.loads(as_json.stdout)["findings"]
    assert [finding["name"] for finding in found] == NAMES
    assert [finding["passed"] for finding in found[4:6]] == [True, True]
    result = run("check", folder)
    assert result.exit_code == as_json.exit_code == (0 if found[6]["passed"] else 1)  # its weights are random
    assert "the loop, and each passage alone" in result.stdout


def test_the_command_fails_where_a_check_does(folder: Path, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue("broken_attention")
    result = run("check", folder)
    assert result.exit_code in (1, 2)


def test_a_model_that_is_refused_is_one_line(tmp_path: Path) -> None:
    small_model("bert").save_pretrained(tmp_path)
    chat_tokenizer().save_pretrained(tmp_path)
    assert "BertLMHeadModel" in one_error(run("check", tmp_path))


@pytest.mark.slow
@pytest.mark.embedded
def test_the_embedded_model_is_right(embedded: Finch) -> None:
    found = checked(embedded)
    assert all(finding.passed is not False for finding in found.values())
    assert "kept for 3 of 3" in found["needles"].detail


def test_nothing_of_the_model_is_changed() -> None:
    finch = loop_finch()
    before = finch.model.config._attn_implementation
    expected = finch.ask("when?", ["It was built in 1874."], max_new_tokens=3).text
    checked(finch)
    assert finch.model.config._attn_implementation == before
    assert finch.ask("when?", ["It was built in 1874."], max_new_tokens=3).text == expected
    assert not torch.is_inference_mode_enabled()
