"""A model's own attention with a window for an observer: soft caps, sinks, sliding windows and hybrids stay as is.

`finch_rag.models.attention` replaces a model's attention, which needs layers that are plain causal attention. Here the
function that the model would run is run, and an observer sees queries and keys before it. Like there it travels as the
keyword argument ``finch_observer`` of the model's forward.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from ..errors import ModelError
from .inspection import input_embedding, plain_attention, sparse_attention, text_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SDPA, _EAGER = "finch_own_sdpa", "finch_own_eager"

AttentionFunction = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


class OwnObserver(Protocol):
    """Sees what every attention layer computes with."""

    def __call__(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        scaling: float,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:
        """Called once a layer, before its attention output is computed.

        Args:
            layer: Index of the layer.
            query: Rotated queries, shape [batch, heads, queries, head_dim].
            key: Rotated keys of the whole cache, shape [batch, kv_heads, keys, head_dim].
            scaling: Factor on the products.
            softcap: What the products are capped to, smoothly; None for no cap.
            sinks: Products that each head pays to nothing, shape [heads]; None for none.

        Raises:
            SeenEnough: If the layers above, and this one's output, are not needed.
        """


@dataclass(frozen=True, slots=True)
class GlobalLayer:
    """A layer whose attention sees everything before it.

    Attributes:
        heads: Query heads.
        kv_heads: Key heads.
        head_dim: Of both.
    """

    heads: int
    kv_heads: int
    head_dim: int


def use_own_attention(model: PreTrainedModel) -> Mapping[int, GlobalLayer]:
    """Puts the window for an observer in front of a model's own attention.

    The model computes the same as before, also in calls that have nothing to do with Finch.

    Args:
        model: A decoder, some layers of which have softmax attention that goes through ``AttentionInterface``.

    Returns:
        Its layers with attention over everything, all of one shape.

    Raises:
        ModelError: If it has no such layer, or does not show it.
    """
    AttentionInterface.register(_SDPA, _watched_sdpa)
    AttentionInterface.register(_EAGER, _watched_eager)
    AttentionMaskInterface.register(_SDPA, sdpa_mask)
    AttentionMaskInterface.register(_EAGER, eager_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(_SDPA if plain_attention(model) == "sdpa" else _EAGER)
    try:
        return global_layers(model)
    except ModelError:
        model.set_attn_implementation(before)
        raise


def runs_own_attention(model: PreTrainedModel) -> bool:
    """Whether `use_own_attention` was called for a model.

    Args:
        model: The model.
    """
    return model.config._attn_implementation in (_SDPA, _EAGER)


def global_layers(model: PreTrainedModel) -> Mapping[int, GlobalLayer]:
    """The layers whose attention over everything a model shows to observers, by a pass of two tokens.

    Args:
        model: With its own attention, see `use_own_attention`.

    Raises:
        ModelError: If there is none.
    """
    found: dict[int, GlobalLayer] = {}
    local = _local_layers(text_config(model))

    def look(layer: int, query: torch.Tensor, key: torch.Tensor, scaling: float, **extras: Any) -> None:
        if layer >= 0 and layer not in local and key.shape[-1] == query.shape[-1]:
            found[layer] = GlobalLayer(query.shape[1], key.shape[1], key.shape[3])

    name = type(model).__name__
    try:
        with torch.inference_mode():
            tokens = torch.ones(1, 2, dtype=torch.long, device=input_embedding(model).device)
            model.base_model(input_ids=tokens, use_cache=False, finch_observer=look)
    except Exception as error:  # whatever a model trips over
        raise ModelError(f"{name} does not show its attention to Finch ({type(error).__name__}: {error})") from error
    if not found:
        raise ModelError(
            f"{name} has no layer whose softmax attention over all tokens Finch can see: use a model with attention, "
            "such as Llama or Qwen"
        )
    shapes = list(found.values())
    usual = max(set(shapes), key=shapes.count)
    return {layer: shape for layer, shape in sorted(found.items()) if shape == usual}


def _local_layers(config: Any) -> frozenset[int]:
    """Layers that the configuration says see only their neighbourhood."""
    kinds = getattr(config, "layer_types", None) or []
    return frozenset(layer for layer, kind in enumerate(kinds) if "sliding" in kind or "chunked" in kind)


def _watched(
    run: AttentionFunction, module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **options: Any
) -> Any:
    """Shows a layer that sees everything to the observer, and runs its attention."""
    observer: OwnObserver | None = options.pop("finch_observer", None)
    if sparse_attention(options):
        raise ModelError("its attention is sparse, chosen by an indexer, which Finch cannot run")
    everything = options.get("sliding_window") is None
    if observer is not None and everything and getattr(module, "layer_idx", None) is not None:
        scaling = options.get("scaling")
        extras = {"softcap": options.get("softcap"), "sinks": options.get("s_aux")}
        observer(
            int(module.layer_idx),
            query,
            key,
            query.shape[-1] ** -0.5 if scaling is None else scaling,
            **{name: extra for name, extra in extras.items() if extra is not None},
        )
    return run(module, query, key, value, attention_mask, **options)


def _watched_sdpa(module: torch.nn.Module, *states: Any, **options: Any) -> Any:
    """SDPA as transformers runs it, in the signature of ``AttentionInterface``."""
    return _watched(sdpa_attention_forward, module, *states, **options)


def _watched_eager(module: torch.nn.Module, *states: Any, **options: Any) -> Any:
    """The model file's own eager attention, with its soft cap and sinks, likewise."""
    return _watched(_eager_of(module), module, *states, **options)


def _eager_of(module: torch.nn.Module) -> AttentionFunction:
    """The eager attention function of the file that a module's class, or one that it derives from, is written in."""
    for kind in type(module).__mro__:
        function = getattr(sys.modules.get(kind.__module__), "eager_attention_forward", None)
        if function is not None:
            run: AttentionFunction = function
            return run
    raise ModelError(f"{type(module).__name__} has no eager attention that Finch can stand in front of")
