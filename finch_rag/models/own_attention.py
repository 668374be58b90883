"""A model's own attention with a window for an observer: soft caps, sinks, sliding windows and hybrids stay as is.

`finch_rag.models.attention` replaces a model's attention, which needs layers that are plain causal attention. Here the
function that the model would run is run, and an observer sees queries and keys before it. It does not travel through
the model, whose layers may hand on no keywords, but stands in a context variable: threads do not meet.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from ..errors import ModelError
from .inspection import input_embedding, plain_attention, text_config
from .products import ProductWindow, is_plain, scaling_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The last is for attention that does not ask transformers for its function, see `finch_rag.models.products`.
_SDPA, _EAGER, _WRITTEN_OUT = "finch_own_sdpa", "finch_own_eager", "finch_own_written_out"
_PROBE = 16  # tokens; a bias that tells distances is plain to see

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


@dataclass(slots=True)
class _Watch:
    """A forward pass that is watched."""

    observer: OwnObserver
    layers: int = 0  # before the one that runs

    def number(self, module: Any) -> int:
        """The layer that a module is; those that several layers share do not know it, and are counted."""
        layer, self.layers = getattr(module, "layer_idx", None), self.layers + 1
        return self.layers - 1 if layer is None or layer < 0 else int(layer)


_watch: ContextVar[_Watch | None] = ContextVar("finch_watch", default=None)


@contextmanager
def shown_to(observer: OwnObserver, model: PreTrainedModel, sequences: int) -> Iterator[None]:
    """Shows an observer what the forward passes within it compute with, those of this thread.

    Args:
        observer: The observer.
        model: With its own attention, see `use_own_attention`.
        sequences: How many a pass reads.
    """
    if model.config._attn_implementation == _WRITTEN_OUT:
        with ProductWindow(sequences, lambda layer, q, k, scores: observer(layer, q, k, scaling_of(q, k, scores))):
            yield
        return
    token = _watch.set(_Watch(observer))
    try:
        yield
    finally:
        _watch.reset(token)


def use_own_attention(model: PreTrainedModel) -> Mapping[int, GlobalLayer]:
    """Puts the window for an observer in front of a model's own attention.

    The model computes the same as before, also in calls that have nothing to do with Finch.

    Args:
        model: A decoder, some layers of which have softmax attention.

    Returns:
        Its layers with attention over everything, all of one shape.

    Raises:
        ModelError: If it has no such layer, or does not show it.
    """
    for name, run, mask in ((_SDPA, _watched_sdpa, sdpa_mask), (_EAGER, _watched_eager, eager_mask)):
        AttentionInterface.register(name, run)
        AttentionMaskInterface.register(name, mask)
    AttentionMaskInterface.register(_WRITTEN_OUT, eager_mask)
    before = model.config._attn_implementation
    if model._can_set_attn_implementation():
        model.set_attn_implementation(_SDPA if plain_attention(model) == "sdpa" else _EAGER)
    else:
        model.config._attn_implementation = _WRITTEN_OUT
    try:
        return global_layers(model)
    except ModelError:
        if model._can_set_attn_implementation():
            model.set_attn_implementation(before)
        else:
            model.config._attn_implementation = before
        raise


def runs_own_attention(model: PreTrainedModel) -> bool:
    """Whether `use_own_attention` was called for a model.

    Args:
        model: The model.
    """
    return model.config._attn_implementation in (_SDPA, _EAGER, _WRITTEN_OUT)


def global_layers(model: PreTrainedModel) -> Mapping[int, GlobalLayer]:
    """The layers whose attention over everything a model shows to observers, by a pass of a few tokens.

    Args:
        model: With its own attention, see `use_own_attention`.

    Raises:
        ModelError: If there is none.
    """
    found: dict[int, GlobalLayer] = {}
    local = _local_layers(text_config(model))

    def look(layer: int, query: torch.Tensor, key: torch.Tensor, *of_scores: Any, **more_of_scores: Any) -> None:
        if layer not in local and key.shape[-1] == query.shape[-1]:
            found[layer] = GlobalLayer(query.shape[1], key.shape[1], key.shape[3])

    def look_at_products(layer: int, query: torch.Tensor, key: torch.Tensor, scores: torch.Tensor) -> None:
        if is_plain(query, key, scores):
            look(layer, query, key)

    name = type(model).__name__
    written_out = model.config._attn_implementation == _WRITTEN_OUT
    tokens = torch.arange(1, _PROBE + 1, device=input_embedding(model).device)[None]
    try:
        with torch.inference_mode(), ProductWindow(1, look_at_products) if written_out else shown_to(look, model, 1):
            model.base_model(input_ids=tokens % int(text_config(model).vocab_size), use_cache=False)
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
    kinds = getattr(config, "layer_types", None) or getattr(config, "attention_layers", None) or []
    local = ("sliding", "chunked", "local")
    return frozenset(layer for layer, kind in enumerate(kinds) if any(name in kind for name in local))


def _watched(
    run: AttentionFunction, module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **options: Any
) -> Any:
    """Shows a layer that sees everything to the observer, and runs its attention."""
    watch = _watch.get()
    if watch is not None:
        layer = watch.number(module)
        if options.get("sliding_window") is None:
            scaling = options.get("scaling")
            extras = {"softcap": options.get("softcap"), "sinks": options.get("s_aux")}
            watch.observer(
                layer,
                query,
                key,
                query.shape[-1] ** -0.5 if scaling is None else scaling,
                **{name: extra for name, extra in extras.items() if extra is not None},
            )
    if attention_mask is not None:  # up to transformers 5.1, StableLM's is one key too long
        attention_mask = attention_mask[..., : key.shape[2]]
    if options.pop("block_indices", None) is not None:  # MiniMax M3 counts its blocks by positions
        raise ModelError("its attention chooses blocks of tokens, which must stand without a gap")
    indices = options.pop("indices", None)
    if indices is not None:
        attention_mask = _chosen(attention_mask, indices, key.shape[2])
    return run(module, query, key, value, attention_mask, **options)


def _chosen(mask: torch.Tensor, indices: torch.Tensor, keys: int) -> torch.Tensor:
    """The mask of what an indexer chose (DeepSeek V3.2); transformers makes it for functions of its own names only.

    Args:
        mask: What else is masked, shape [batch, 1, queries, keys]; never None, the indexer needs it too.
        indices: The keys that each query token chose, shape [batch, queries, chosen].
        keys: How many there are.
    """
    left_out = torch.ones(*indices.shape[:2], keys, dtype=torch.bool, device=indices.device)
    left_out = left_out.scatter(-1, indices.long(), False)[:, None]
    return mask & ~left_out if mask.dtype == torch.bool else mask.masked_fill(left_out, torch.finfo(mask.dtype).min)


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
