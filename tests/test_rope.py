from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM, DynamicCache, T5Config

from finch_rag.engine import Finch
from finch_rag.errors import ModelError
from finch_rag.models.cache import CompressedCache
from finch_rag.models.inspection import window_of
from finch_rag.models.rope import KeyRotation

from .small import ARCHITECTURES, chat_tokenizer, model_of, small_config, small_model

SCALED: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "large base": {"rope_type": "default", "rope_theta": 1000000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 128,
    },
}
POSITIONS = [0, 1, 37, 200, 411, 511]


def config_of(name: str) -> Any:
    if name in SCALED:
        return small_config("llama", rope_parameters=SCALED[name])
    others: dict[str, tuple[str, dict[str, Any]]] = {
        "partial (StableLM)": ("stablelm", {"partial_rotary_factor": 0.25}),
        "partial (Phi)": ("phi", {"partial_rotary_factor": 0.5, "num_key_value_heads": 4}),
        "interleaved (Cohere)": ("cohere", {}),
        "interleaved and partial (GLM)": ("glm", {"partial_rotary_factor": 0.5}),
        "layers without positions (SmolLM3)": ("smollm3", {"num_hidden_layers": 4, "no_rope_layer_interval": 2}),
    }
    kind, changes = others.get(name, (name, {}))
    return small_config(kind, **changes)


NAMES = [
    *SCALED,
    *ARCHITECTURES[1:],
    "partial (StableLM)",
    "partial (Phi)",
    "interleaved (Cohere)",
    "interleaved and partial (GLM)",
    "layers without positions (SmolLM3)",
]


@torch.inference_mode()
def own_keys(model: Any, token: int = 33) -> list[torch.Tensor]:
    """Each layer's keys of one lonely token at all `POSITIONS`, as the model makes them: [kv_heads, positions, dim]."""
    cache = DynamicCache()
    count = len(POSITIONS)
    model.base_model(
        input_ids=torch.full((count, 1), token),
        position_ids=torch.tensor(POSITIONS)[:, None],
        past_key_values=cache,
        use_cache=True,
    )
    return [layer.keys[:, :, 0].transpose(0, 1).float() for layer in cache.layers]  # type: ignore[union-attr,index]


@pytest.mark.parametrize("name", NAMES)
def test_re_rotated_keys_are_those_that_the_model_makes_at_the_new_position(name: str) -> None:
    model = model_of(config_of(name))
    rotation = KeyRotation.of(model, window_of(model.config))
    positions = torch.tensor(POSITIONS)
    for layer, keys in enumerate(own_keys(model)):
        for shift in range(1, len(POSITIONS)):  # every position to every other one
            re_rotated = rotation.re_rotate(keys, rotation.between(positions, positions.roll(shift)), layer)
            torch.testing.assert_close(re_rotated, keys.roll(shift, dims=1), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", SCALED)
def test_re_rotated_random_keys_are_those_of_the_models_rotary_module(name: str) -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    model = model_of(config_of(name))
    torch.manual_seed(0)
    raw, old, new = torch.randn(1, 2, 40, 16), torch.arange(300, 340), torch.arange(17, 57)

    def at(positions: torch.Tensor) -> torch.Tensor:
        cos, sin = model.model.rotary_emb(raw, positions[None])
        rotated: torch.Tensor = apply_rotary_pos_emb(raw, raw, cos, sin)[1]
        return rotated

    rotation = KeyRotation.of(model, 512)
    re_rotated = rotation.re_rotate(at(old), rotation.between(old, new), 0)
    torch.testing.assert_close(re_rotated, at(new), atol=1e-4, rtol=1e-4)


def test_the_rotations_that_were_found() -> None:
    assert not KeyRotation.of(small_model(), 512).interleaved
    assert KeyRotation.of(model_of(config_of("interleaved (Cohere)")), 512).interleaved
    partial = KeyRotation.of(model_of(config_of("partial (StableLM)")), 512)
    assert partial.inv_freq.shape == (2,)  # a quarter of 16 elements, in pairs
    found = KeyRotation.of(model_of(config_of("layers without positions (SmolLM3)")), 512)
    assert found.rotates == (True, False, True, False)


@pytest.mark.parametrize("name", ["default", "qwen3", "interleaved (Cohere)", "partial (StableLM)", "yarn"])
def test_the_rotation_is_found_in_bfloat16_too(name: str) -> None:
    model = model_of(config_of(name))
    expected = KeyRotation.of(model, 512)
    found = KeyRotation.of(model.to(torch.bfloat16), 512)
    assert (found.interleaved, found.rotates) == (expected.interleaved, expected.rotates)


def test_elements_that_do_not_rotate_stay_to_the_bit() -> None:
    rotation = KeyRotation.of(model_of(config_of("partial (StableLM)")), 512)
    keys = torch.randn(2, 3, 16)
    re_rotated = rotation.re_rotate(keys, rotation.between(torch.tensor([5, 6, 7]), torch.tensor([0, 1, 2])), 0)
    assert torch.equal(re_rotated[..., 4:], keys[..., 4:])
    assert not torch.equal(re_rotated[..., :4], keys[..., :4])


def test_a_key_that_keeps_its_position_stays_to_the_bit() -> None:
    rotation = KeyRotation.of(small_model(), 512)
    keys = torch.randn(2, 3, 16).bfloat16()
    positions = torch.tensor([5, 260, 511])
    assert torch.equal(rotation.re_rotate(keys, rotation.between(positions, positions), 0), keys)


def test_two_hundred_evictions_in_bfloat16_leave_one_rounding() -> None:
    torch.manual_seed(0)
    rotation = KeyRotation.of(small_model(), 512)
    prefix, budget, chunk = 5, 64, 24
    cache = CompressedCache(1, prefix + budget + chunk)
    layer = cache.layers[0]
    stored: list[tuple[torch.Tensor, int]] = []  # by token: its key as first stored, and where

    def append(count: int) -> list[int]:
        keys = torch.randn(1, 2, count, 16).bfloat16()
        first = layer.length
        layer.update(keys, keys)
        stored.extend((keys[0, :, n].float(), first + n) for n in range(count))
        return list(range(len(stored) - count, len(stored)))

    append(prefix)
    cache.prefix = prefix
    names: list[int] = []  # of the tokens behind the prefix, in order
    for _ in range(200):
        names += append(chunk)
        index = torch.randperm(len(names))[:budget]
        index = torch.cat((torch.arange(8), index[index >= 8]))[:budget].sort().values  # eight stay all the time
        cache.evict(index, range(chunk), rotation)
        names = [names[i] for i in index.tolist()]

    assert names[:8] == list(range(prefix, prefix + 8))
    assert layer.keys is not None
    found = layer.keys[0, :, prefix : layer.length].float()
    inv_freq = 10000.0 ** (-torch.arange(0, 16, 2).double() / 16)
    for place, name in enumerate(names):
        key, old = stored[name]
        angle = (prefix + place - old) * torch.cat((inv_freq, inv_freq))
        fresh = key * angle.cos() + torch.cat((-key[:, 8:], key[:, :8]), dim=-1) * angle.sin()
        # Rounding to 8 significant bits moves a number by at most 2**-9 of itself, rounded up to its power of two.
        assert bool(((found[:, place] - fresh).abs() <= fresh.abs() * 2**-8 + 1e-4).all())


def test_a_model_without_rotary_positions_has_no_rotation() -> None:
    config = small_config("gpt2", n_embd=64, n_layer=2, n_head=4, n_positions=512)
    with pytest.raises(ModelError, match="no rotary positions"):
        KeyRotation.of(model_of(config), 512)
    assert "no rotary positions" in Finch(model_of(config), chat_tokenizer()).runtime.no_loop


def test_an_encoder_decoder_is_refused() -> None:
    config = T5Config(vocab_size=400, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    with pytest.raises(ModelError, match="encoder-decoder"):
        Finch(AutoModelForSeq2SeqLM.from_config(config), chat_tokenizer())


def test_a_rotation_that_is_not_known_is_refused() -> None:
    model = small_model()
    model.model.rotary_emb.inv_freq[1] *= 1.5  # what was read off no longer says how the model rotates
    unlike = model.model.rotary_emb.inv_freq.clone()
    forward = model.model.rotary_emb.forward

    def other(x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = forward(x, position_ids * 2)
        return cos, sin

    model.model.rotary_emb.forward = other
    with pytest.raises(ModelError, match="rotates its keys in a way"):
        KeyRotation.of(model, 512)
    assert torch.equal(model.model.rotary_emb.inv_freq, unlike)


def test_different_frequencies_by_layer_are_no_rotation() -> None:
    config = small_config(
        "gemma3_text",
        num_hidden_layers=2,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=64,
    )
    with pytest.raises(ModelError, match="2 different sets of rotary frequencies"):
        KeyRotation.of(model_of(config), 512)


def test_models_with_alibi_instead_of_positions_are_refused() -> None:
    config = AutoConfig.for_model("bloom", vocab_size=400, hidden_size=64, n_layer=2, n_head=4)  # knows no window
    with pytest.raises(ModelError):
        Finch(model_of(config, "eager"), chat_tokenizer())
