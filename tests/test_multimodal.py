"""Checkpoints that also see: their text part is read, by their own class or from a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForImageTextToText

from finch_rag import Finch
from finch_rag.checkup.checking import equal_to_plain, right_after_eviction
from finch_rag.heads.examples import HeadExample

from .families import config_of
from .model_table import LISTED
from .small import chat_tokenizer, texts

_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_PATCHES: dict[str, Any] = {**_VISION, "depth": 1, "num_heads": 2, "out_hidden_size": 64}
_LLAMA_VISION = {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32}
# By configuration: that of the text part, of what sees, and whether the loop runs.
KINDS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "gemma3": ("gemma3_text", _VISION, False),
    "gemma4": ("gemma4_text", _VISION, False),
    "llama4": ("llama4_text", {**_VISION, **_LLAMA_VISION}, False),
    "mistral3": ("ministral3", {**_VISION, "model_type": "pixtral", "head_dim": 16}, True),
    "qwen3_5": ("qwen3_5_text", _PATCHES, False),
}


@pytest.fixture(params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def seeing(kind: str) -> Any:
    """A small model that sees, with random weights."""
    text, vision, _ = KINDS[kind]
    if kind not in CONFIG_MAPPING or text not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    others = {"audio_config": None} if kind == "gemma4" else {}
    part = {**config_of(text).to_dict(), "max_position_embeddings": 1024}
    config = AutoConfig.for_model(kind, text_config=part, vision_config=vision, **others)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        try:
            model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32, attn_implementation="eager")
        except AttributeError as error:
            if Version(transformers.__version__) >= LISTED:
                raise
            pytest.skip(f"transformers {transformers.__version__} does not make {kind} of its configuration: {error}")
    return model.eval()


def check(finch: Finch, kind: str) -> None:
    example = HeadExample("who built the bridge?", tuple(texts(12)), 0)
    assert finch.window == 1024
    assert bool(finch.runtime.no_loop) != KINDS[kind][2]
    for finding in (equal_to_plain(finch, example), right_after_eviction(finch, example)):
        assert finding.passed, finding
    report = finch.ask(example.question, texts(20), budget=80, max_new_tokens=4).report
    assert 0 < report.kept_tokens <= 80 < report.context_tokens


def test_the_text_part_is_read_by_the_models_own_class(kind: str) -> None:
    check(Finch(seeing(kind), chat_tokenizer(), heads="all", alone_heads=[(3, 0)]), kind)


def test_the_text_part_is_read_from_a_folder(kind: str, tmp_path: Path) -> None:
    seeing(kind).save_pretrained(tmp_path)
    chat_tokenizer().save_pretrained(tmp_path)
    settings: dict[str, Any] = {"dtype": "float32", "device": "cpu", "heads": "all", "alone_heads": [(3, 0)]}
    check(Finch.from_pretrained(tmp_path, **settings), kind)
