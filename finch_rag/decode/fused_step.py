"""A decoding step as few kernels, for the models whose every operation is known here.

transformers runs a layer of a Llama as some fifty kernels, and for one token most of their time is spent between them.
Here it is six for one answer: normed queries, keys and values; attention and its join; the output's product with the
residual; the gated products; the last product with the residual. For several answers the products are the library's,
and attention reads of each cache only what is filled. What the operations are is written down once more, so only exact
classes are taken, with plain weights; everything else decodes by its own forward.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .kernels.products import Linear, Norm

_MODELS = (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_LEAST_HEAD_DIM = 16  # the fewest columns that a matrix unit takes


def can_fuse(model: PreTrainedModel) -> bool:
    """Whether `FusedStep` computes what a model computes.

    Args:
        model: Any model.
    """
    if type(model) not in _MODELS or importlib.util.find_spec("triton") is None:
        return False
    linears = [model.get_output_embeddings()]
    for layer in _layers(model):
        linears += [getattr(layer.self_attn, name) for name in _PROJECTIONS]
        linears += [layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj]
    head_dim = _layers(model)[0].self_attn.head_dim
    return (
        model.config.hidden_act in ("silu", "swish")
        and head_dim >= _LEAST_HEAD_DIM
        and head_dim & (head_dim - 1) == 0
        and all(_is_plain(linear) for linear in linears)
    )


def _is_plain(linear: Any) -> bool:
    """Whether a product is one of a dense matrix: neither quantised nor with an adapter."""
    if type(linear) is not torch.nn.Linear:
        return False
    weight = linear.weight
    return type(weight) is torch.nn.Parameter and weight.is_floating_point() and weight.is_contiguous()


@dataclass(frozen=True, slots=True)
class _Layer:
    attention_norm: Norm
    qkv: Sequence[Linear]
    scaling: float
    head_norms: tuple[Norm, Norm] | None
    output: Linear
    mlp_norm: Norm
    gate: Linear
    up: Linear
    down: Linear


class FusedStep:
    """One token of each of some answers through a model, by the kernels of `finch_rag.decode.kernels`.

    Args:
        model: One that `can_fuse` accepts.
        answers: Answers that it serves.

    Raises:
        ImportError: If Triton cannot be imported.
    """

    def __init__(self, model: PreTrainedModel, answers: int = 1) -> None:
        from . import row_products
        from .kernels import attention, products  # not needed without a GPU, nor there

        base: Any = model.base_model
        self._kernels, self._attention = products, attention
        self._products: Any = products if answers == 1 else row_products
        self._embed = base.embed_tokens
        self._rotary = base.rotary_emb
        self._layers = [self._layer(layer) for layer in base.layers]
        self._norm, self._head = self._norm_of(base.norm), self._linear_of(model.get_output_embeddings())
        heads, kv_heads = int(model.config.num_attention_heads), int(model.config.num_key_value_heads)
        first = self._layers[0]
        attended = first.output.weight.shape[1]

        def rows(size: int, dtype: torch.dtype = model.dtype) -> torch.Tensor:
            return torch.empty(*([] if answers == 1 else [answers]), size, dtype=dtype, device=model.device)

        self._qkv = rows(sum(linear.weight.shape[0] for linear in first.qkv))
        self._attended = rows(attended)
        self._inner = rows(first.gate.weight.shape[0])
        self._logits = rows(self._head.weight.shape[0], torch.float32)
        self._partial = attention.Partial.empty(answers, heads, kv_heads, attended // heads, model.device)

    def __call__(
        self, tokens: torch.Tensor, position: torch.Tensor, cache: Sequence[tuple[torch.Tensor, torch.Tensor]]
    ) -> torch.Tensor:
        """Appends a token to each answer's cache.

        Args:
            tokens: Their ids, shape [answers, 1].
            position: Their places in the caches, shape [answers].
            cache: Keys and values of every layer, buffers of shape [answers, kv_heads, capacity, head_dim].

        Returns:
            Logits after them, float32, shape [answers, vocabulary]; overwritten by the next call.
        """
        products = self._products
        embedded = self._embed(tokens)  # [answers, 1, hidden]
        rotary = self._rotary(embedded, position[:, None])
        hidden = embedded.view(*self._qkv.shape[:-1], -1)  # one answer's as a row alone
        for layer, (keys, values) in zip(self._layers, cache, strict=True):
            products.linear(hidden, layer.qkv, self._qkv, norm=layer.attention_norm)
            self._attention.attend(
                self._qkv,
                rotary,
                keys,
                values,
                position,
                self._partial,
                self._attended,
                layer.scaling,
                layer.head_norms,
            )
            products.linear(self._attended, [layer.output], hidden, add=True)
            products.gated_linear(hidden, layer.gate, layer.up, self._inner, layer.mlp_norm)
            products.linear(self._inner, [layer.down], hidden, add=True)
        products.linear(hidden, [self._head], self._logits, norm=self._norm)
        return self._logits.view(len(tokens), -1)

    def _layer(self, layer: Any) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        has_norms = hasattr(attention, "q_norm")
        return _Layer(
            self._norm_of(layer.input_layernorm),
            [self._linear_of(linear) for linear in (attention.q_proj, attention.k_proj, attention.v_proj)],
            float(attention.scaling),
            (self._norm_of(attention.q_norm), self._norm_of(attention.k_norm)) if has_norms else None,
            self._linear_of(attention.o_proj),
            self._norm_of(layer.post_attention_layernorm),
            self._linear_of(mlp.gate_proj),
            self._linear_of(mlp.up_proj),
            self._linear_of(mlp.down_proj),
        )

    def _norm_of(self, norm: Any) -> Norm:
        return self._kernels.Norm(norm.weight, float(norm.variance_epsilon))

    def _linear_of(self, linear: torch.nn.Linear) -> Linear:
        return self._kernels.Linear(linear.weight, linear.bias)


def _layers(model: PreTrainedModel) -> Any:
    base: Any = model.base_model
    return base.layers
