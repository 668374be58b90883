"""The attention function that Finch runs: SDPA on a growing cache, with a window for an observer.

Registered with transformers under the name ``finch``. Scores never need eager attention: an observer, passed as the
keyword argument ``finch_observer`` of the model's forward, is shown each layer's rotated queries and keys and makes
what it wants of them. It travels with the call, so that threads do not meet and no module is hooked or patched.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from ..errors import ModelError
from .inspection import input_embedding, text_config
from .parallel import TensorParallel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTION_NAME = "finch"

# Query tokens per call on a CPU. SDPA's CPU kernel computes what a mask then throws away, so query tokens are processed
# in blocks that each see only the key tokens up to their own end. Measured on two cores for 2,048 query tokens on a
# cache of 552: one call 59 ms, blocks of 512 / 256 / 128 query tokens 46 / 43 / 44 ms.
_CPU_BLOCK = 256


class AppendedLength(int):
    """How many key tokens a cache shows when the last of them are the query tokens of the forward pass.

    Up to transformers 5.2 a mask is asked for by the query tokens' positions, which are on the device. A cache that
    tells its length by this class saves asking for them: that would wait for all the device's work, at every pass.
    """

    @classmethod
    def of(cls, before: int, queries: int | torch.Tensor) -> AppendedLength:
        """The key tokens before the query tokens, and these.

        Args:
            before: Key tokens in use before the pass.
            queries: How many; up to transformers 5.2 their positions, shape [queries].
        """
        return cls(before + (queries if isinstance(queries, int) else queries.shape[0]))


class SeenEnough(Exception):  # noqa: N818 - no error
    """Raised by an observer that needs no further layer; it ends the forward pass, see `finch_rag.models.forward`."""


class Observer(Protocol):
    """Sees what every attention layer computes with."""

    def __call__(self, layer: int, query: torch.Tensor, key: torch.Tensor, scaling: float) -> None:
        """Called once a layer, before its attention output is computed.

        Args:
            layer: Index of the layer.
            query: Rotated queries, shape [1, heads, queries, head_dim].
            key: Rotated keys of the whole cache, shape [1, kv_heads, keys, head_dim].
            scaling: Factor on the products, 1/sqrt(head_dim) for most models.

        Raises:
            SeenEnough: If the layers above, and this one's output, are not needed.
        """


@runtime_checkable
class SelectiveObserver(Observer, Protocol):
    """An observer that looks at some layers only; what the others show it need not be whole."""

    def looks_at(self, layer: int) -> bool:
        """Whether it looks at a layer's queries and keys.

        Args:
            layer: Index of the layer.
        """


def shown_all_heads(model: PreTrainedModel, observer: Observer) -> Observer:
    """An observer that sees all heads of a model, also those that are in other processes.

    Args:
        model: The model.
        observer: What it shows them to.

    Returns:
        The observer itself where this process has all heads.
    """
    shared = TensorParallel.of(model)
    if shared is None:
        return observer

    def show(layer: int, query: torch.Tensor, key: torch.Tensor, scaling: float) -> None:
        if not isinstance(observer, SelectiveObserver) or observer.looks_at(layer):
            query, key = shared.all_queries(query), shared.all_keys(key)
        observer(layer, query, key, scaling)

    return show


class VarlenAttention(Protocol):
    """Attention of several sequences that share a forward pass, see `finch_rag.models.varlen.VarlenBatch`."""

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """The attention of one layer, each sequence by itself.

        Args:
            layer: Index of the layer.
            query: Of all sequences joined, shape [1, heads, tokens, head_dim].
            key: Likewise, shape [1, kv_heads, tokens, head_dim].
            value: Likewise.
            scaling: Factor on the products.

        Returns:
            Shape [1, tokens, heads, head_dim].
        """


def use_finch_attention(model: PreTrainedModel) -> None:
    """Switches a model to the attention function of this module.

    The model computes the same as with ``sdpa``, also in calls that have nothing to do with Finch.

    Args:
        model: A decoder whose attention goes through transformers' ``AttentionInterface``.
    """
    if not getattr(model, "_supports_sdpa", False):  # attention sinks, for one, which SDPA would leave out
        raise ModelError(f"{type(model).__name__} does not run on SDPA attention, so Finch cannot run it")
    if not model._can_set_attn_implementation():
        raise ModelError(f"{type(model).__name__} does not ask transformers for its attention, so Finch cannot run it")
    if getattr(text_config(model), "attn_logit_softcapping", None) is not None:
        raise ModelError(f"{type(model).__name__} caps its attention scores, which SDPA cannot: Finch cannot run it")
    AttentionInterface.register(ATTENTION_NAME, attention_forward)
    AttentionMaskInterface.register(ATTENTION_NAME, attention_mask)
    model.set_attn_implementation(ATTENTION_NAME)
    seen: dict[int, int] = {}  # layer -> KV heads

    def see(layer: int, query: torch.Tensor, key: torch.Tensor, scaling: float) -> None:
        seen[layer] = key.shape[1]

    with torch.inference_mode():
        model.base_model(
            input_ids=torch.ones(1, 1, dtype=torch.long, device=input_embedding(model).device),
            use_cache=False,
            finch_observer=shown_all_heads(model, see),
        )
    config = text_config(model)
    layers, heads = int(config.num_hidden_layers), getattr(config, "num_key_value_heads", config.num_attention_heads)
    if len(seen) != layers:
        raise ModelError(
            f"{type(model).__name__} shows Finch the attention of {len(seen)} of its {layers} layers, and all are "
            "needed: use Llama, Mistral, Qwen2 or Qwen3"
        )
    if heads is not None and set(seen.values()) != {int(heads)}:  # repeated on their way from the cache
        raise ModelError(f"{type(model).__name__} attends with other keys than it caches: Finch cannot move them")


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    finch_observer: Observer | None = None,
    finch_varlen: VarlenAttention | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention in the signature of transformers' ``AttentionInterface``.

    Args:
        module: The attention module; its ``layer_idx`` goes to the observer.
        query: Shape [batch, heads, queries, head_dim].
        key: Shape [batch, kv_heads, keys, head_dim]; the last ones are those of the query tokens.
        value: Shape [batch, kv_heads, keys, head_dim].
        attention_mask: None for plain causal attention on a cache; any other mask goes to transformers' SDPA.
        dropout: Attention dropout, 0 outside training.
        scaling: Factor on the products; 1/sqrt(head_dim) when None.
        finch_observer: Is shown ``query`` and ``key``.
        finch_varlen: Takes over where the tokens are several sequences; no mask is needed then.
        kwargs: What the model passes besides.

    Returns:
        The output, shape [batch, queries, heads, head_dim], and None in the place of attention weights.
    """
    # Chosen by an indexer (DeepSeek V3.2): only transformers' own functions get the choice as a mask.
    if any(kwargs.get(name) is not None for name in ("indices", "block_indices")):
        raise ModelError("its attention is sparse, chosen by an indexer, which Finch cannot run")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if finch_varlen is not None:
        return finch_varlen.attend(int(module.layer_idx), query, key, value, scaling), None  # type: ignore[arg-type]
    if finch_observer is not None:
        finch_observer(int(module.layer_idx), query, key, scaling)  # type: ignore[arg-type]
    if attention_mask is not None:  # up to transformers 5.1, Persimmon's and StableLM's are one key too long
        attention_mask = attention_mask[..., : key.shape[2]]
    if attention_mask is not None or kwargs.get("is_causal") is False or kwargs.get("softcap") is not None:
        shared = query.shape[2] == 1 and query.shape[1] != key.shape[1] and kwargs.get("softcap") is None
        if shared and attention_mask is not None and attention_mask.shape[1] == 1:
            return one_query_attention(query, key, value, attention_mask, scaling, dropout), None
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    output = causal_attention(query, key, value, scaling, dropout)
    return output.transpose(1, 2).contiguous(), None


def causal_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, dropout: float = 0.0
) -> torch.Tensor:
    """Causal attention of the last tokens of a sequence on all of it.

    Args:
        query: Shape [batch, heads, queries, head_dim]; query ``i`` is key token ``keys - queries + i``.
        key: Shape [batch, kv_heads, keys, head_dim].
        value: Shape [batch, kv_heads, keys, head_dim].
        scaling: Factor on the products.
        dropout: Attention dropout.

    Returns:
        Shape [batch, heads, queries, head_dim].
    """
    queries, keys = query.shape[2], key.shape[2]
    grouped = query.shape[1] != key.shape[1]

    def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any = None, causal: bool = False) -> torch.Tensor:
        return scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scaling, enable_gqa=grouped
        )

    if queries == 1:
        return sdpa(query, key, value)
    if queries == keys:
        return sdpa(query, key, value, causal=True)
    if query.device.type != "cpu":
        return sdpa(query, key, value, mask=causal_lower_right(queries, keys))
    past = keys - queries
    blocks = []
    for start in range(0, queries, _CPU_BLOCK):
        stop = min(start + _CPU_BLOCK, queries)
        seen = past + stop
        mask = torch.ones(stop - start, seen, dtype=torch.bool).tril_(seen - (stop - start))
        blocks.append(sdpa(query[:, :, start:stop], key[:, :, :seen], value[:, :, :seen], mask))
    return torch.cat(blocks, dim=2)


def one_query_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scaling: float,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Masked attention of one query token a sequence where several heads share a key.

    SDPA has no fused kernel for a mask together with shared keys, and repeats every key and value for it. One query
    token of several heads is several query tokens of one head.

    Args:
        query: Shape [batch, heads, 1, head_dim].
        key: Shape [batch, kv_heads, keys, head_dim].
        value: Shape [batch, kv_heads, keys, head_dim].
        mask: Shape [batch or 1, 1, 1, keys]; bool (true is seen), or added to the products.
        scaling: Factor on the products.
        dropout: Attention dropout.

    Returns:
        Shape [batch, 1, heads, head_dim].
    """
    batch, heads, _, head_dim = query.shape
    grouped = query.reshape(batch, key.shape[1], -1, head_dim)  # [batch, kv_heads, heads / kv_heads, head_dim]
    seen = mask.expand(batch, -1, grouped.shape[2], -1)
    output = scaled_dot_product_attention(grouped, key, value, attn_mask=seen, dropout_p=dropout, scale=scaling)
    return output.reshape(batch, 1, heads, -1)


def attention_mask(
    batch_size: int,
    q_length: int | None = None,
    kv_length: int = 0,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    cache_position: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """Mask in the signature of transformers' ``AttentionMaskInterface``.

    Up to transformers 5.2, ``cache_position``, the query tokens' positions, is in the place of ``q_length`` and
    ``q_offset``, see `AppendedLength`.

    Returns:
        None for plain causal attention on a cache, which ``attention_forward`` does without a mask; otherwise
        (padding, sliding windows, static caches) what SDPA needs.
    """
    queries: dict[str, Any] = {"q_length": q_length, "q_offset": q_offset}
    plain = attention_mask is None and mask_function is causal_mask_function and kv_offset == 0
    if cache_position is not None:
        queries = {"cache_position": cache_position}
        q_length = cache_position.shape[0]
        if isinstance(kv_length, AppendedLength):
            q_offset = kv_length - q_length
        else:
            q_offset = int(cache_position[0]) if plain else 0
    if plain and isinstance(q_offset, int) and q_length is not None and q_offset + q_length == kv_length:
        return None
    # SDPA's own reading of a missing mask on a longer cache (upper-left) is not `causal_attention`'s (lower-right).
    kwargs["allow_is_causal_skip"] = kwargs.get("allow_is_causal_skip", True) and q_length == kv_length
    return sdpa_mask(
        batch_size=batch_size,
        kv_length=kv_length,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        **queries,
        **kwargs,
    )
