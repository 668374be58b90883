"""What a model tells about itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_SMALLEST_WINDOW = 2048  # of layers that see a part: below, what is kept and a chunk have no room
# Kinds of layers that see a part, with what a configuration calls the tokens that they see.
_LOCAL = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}


def input_embedding(model: PreTrainedModel) -> torch.Tensor:
    """A model's input embedding, shape [vocabulary, hidden]; its device is where token ids go."""
    weight = model.get_input_embeddings().weight
    if not isinstance(weight, torch.Tensor):
        raise ModelError(f"{type(model).__name__} has no input embedding; Finch runs decoder-only text models")
    return weight


def text_config(model: PreTrainedModel) -> Any:
    """The configuration of a model's text part: its own, but for models that also see or hear.

    Args:
        model: A decoder.
    """
    return model.config.get_text_config(decoder=True)


def text_part(model: PreTrainedModel) -> torch.nn.Module:
    """What of a model reads text: all of it, but for models that also see or hear.

    Args:
        model: A decoder.
    """
    if text_config(model) is model.config:
        return model
    part: torch.nn.Module = model.get_decoder()
    return part


def plain_attention(model: PreTrainedModel) -> str:
    """The attention function of transformers that computes all that a model's attention has, the fastest one.

    Args:
        model: A decoder.
    """
    capped = getattr(text_config(model), "attn_logit_softcapping", None) is not None
    return "sdpa" if getattr(model, "_supports_sdpa", False) and not capped else "eager"


def positions_of(config: Any) -> int:
    """Positions that a model was trained on.

    Args:
        config: The model's configuration.

    Raises:
        ModelError: If it does not say.
    """
    positions = getattr(config, "max_position_embeddings", None)
    if not positions:
        raise ModelError(f"the model's configuration ({config.model_type}) names no window: use a rotary model")
    return int(positions)


def window_of(config: Any, *, held: bool = False) -> int:
    """Positions in which a model's attention is the plain causal attention that Finch runs.

    That is the trained window, or less: where all layers see a part, or with long RoPE's two sets of frequencies (which
    switch at a length, while keys rotated by the other set are in the cache), Finch stays below the smaller length.

    Args:
        config: The model's configuration.
        held: Stay below what layers see that see a part also where others see everything.

    Raises:
        ModelError: If it names none, or has layers that see a part beside others that see everything, and ``held`` is
            no or the part too small: the model's own attention reads in the whole window.
    """
    limits = [positions_of(config)]
    seen = tokens_seen_by_local_layers(config)
    if seen is not None and seen < limits[0]:
        if has_global_layers(config) and (seen < _SMALLEST_WINDOW or not held):
            cure = f"the loop's cache needs {_SMALLEST_WINDOW}" if held else 'one made with strategy="loop" stays below'
            raise ModelError(f"layers of {config.model_type} see {seen} of {limits[0]} tokens only; {cure}")
        limits.append(seen)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        limits.append(int(rope.get("original_max_position_embeddings", limits[0])))
    return min(limits)


def tokens_seen_by_local_layers(config: Any) -> int | None:
    """Tokens that the layers see that see a part of the window; None where all see everything.

    Args:
        config: The model's configuration.
    """
    unused = () if getattr(config, "use_sliding_window", True) else ("sliding_attention",)
    sizes = [getattr(config, name, None) for kind, name in _LOCAL.items() if kind in _kinds(config) - {*unused}]
    return min((int(size) for size in sizes if size), default=None)


def has_global_layers(config: Any) -> bool:
    """Whether some layers see everything.

    Args:
        config: The model's configuration.
    """
    return bool(_kinds(config) - {*_LOCAL})


def _kinds(config: Any) -> set[str]:
    """Kinds of layers; a configuration that names none has a window for all of them, or none."""
    return set(getattr(config, "layer_types", None) or ["sliding_attention"])
