"""Every text decoder family of transformers: read by the loop, read alone by its own attention, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from finch_rag import Finch, ModelError, Passage
from finch_rag.decode.generation import Decoder
from finch_rag.models.own_attention import global_layers, runs_own_attention
from finch_rag.reading import read_request
from finch_rag.resolving import resolve

from .families import FAMILIES, LEFT_OUT, config_of
from .small import chat_tokenizer, model_of, texts

QUESTION = "who built the bridge?"
_STEPS = 3
LISTED = Version("5.23")  # of transformers, whose families are listed here

# All others are read alone.
LOOP = (
    "apertus arcee aria_text bitnet cohere dbrx diffllama dots1 ernie4_5 ernie4_5_moe flex_olmo gemma glm glm4 "
    "glm4_moe gpt_neox granite granitemoe granitemoeshared helium hy_v3 hyperclovax internlm3 iquestcoder "
    "jais2 llama llama4_text minimax_m2 minimax_m3_vl_text ministral3 mistral mixtral olmo olmo2 olmoe "
    "persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3 solar_open starcoder2 "
).split()
REFUSED = (
    "axk2 bloom codegen cpmant deepseek_v32 deepseek_v4 dots3_note_text falcon falcon_mamba glm_moe_dsa "
    "gpt_neo gpt_neox_japanese gptj hy_v4 mamba mamba2 minimax mpt nemotron openai-gpt recurrent_gemma rwkv "
    "stablelm xglm xlstm zamba zamba2 "
).split()


def outcome(kind: str) -> str:
    """What becomes of a family; where it is read, logits behind all passages are the plain model's."""
    plain, model = model_of(config_of(kind), "eager"), model_of(config_of(kind), "eager")
    heads: dict[str, Any] = {"heads": "all", "alone_heads": [(0, 0)]}
    try:
        finch = Finch(model, chat_tokenizer(), name=kind, budget=200, max_new_tokens=2, **heads)
    except ModelError as error:
        assert "\n" not in str(error)  # noqa: PT017
        return "refused"
    if runs_own_attention(model):
        layers = sorted(global_layers(model))
        finch.runtime.alone_heads = [(layers[0], 0), (layers[-1], 1)]
    request = resolve(finch.runtime, QUESTION, [Passage(text) for text in texts(4)], finch.settings)
    cache = read_request(finch.runtime, request)
    document = [token for passage in request.prompt.passages for token in passage]
    tokens = [*request.prompt.prefix, *document, *request.answer_prompt]
    writer = finch.runtime.writer(request.sampling)
    decoder = Decoder(model, cache.fork(request.room), request.answer_prompt, writer, new_tokens=_STEPS)
    passes = decoder.logits()
    for _ in range(_STEPS):  # the question's pass, and steps of one token
        found = next(passes)[0]
        with torch.inference_mode():
            expected = plain(torch.tensor([tokens])).logits[0, -1]
        torch.testing.assert_close(found, expected, atol=1e-4 * max(1.0, float(expected.abs().max())), rtol=1e-4)
        writer.token_ids.append(int(expected.argmax()))
        tokens.append(writer.token_ids[-1])
    report = finch.ask(QUESTION, texts(20), budget=60).report
    assert 0 < report.kept_tokens <= 60 < report.context_tokens
    return "independent" if finch.runtime.no_loop else "loop"


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_family_is_read_right_or_refused_by_name(kind: str) -> None:
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    try:
        model_of(config_of(kind), "eager")
    except Exception as error:
        if Version(transformers.__version__) >= LISTED:
            raise
        pytest.skip(f"transformers {transformers.__version__} has another configuration: {error!r}")
    found = outcome(kind)
    if Version(transformers.__version__) >= LISTED:
        assert found == ("loop" if kind in LOOP else "refused" if kind in REFUSED else "independent")


def test_the_list_names_every_family() -> None:
    """A release with a new one makes this fail: build it small, and say what becomes of it."""
    if Version(transformers.__version__) < LISTED:
        pytest.skip(f"the list is of transformers {LISTED}")
    assert set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) <= set(FAMILIES) | set(LEFT_OUT)
    assert set(LOOP) | set(REFUSED) <= set(FAMILIES)
