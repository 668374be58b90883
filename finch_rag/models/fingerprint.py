"""Identifies a model by what it computes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from .inspection import input_embedding, text_config
from .parallel import is_spread

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_EMBEDDING_ROWS = 256
_SAMPLES = 1024  # numbers of each matrix, evenly spread
_SCALES = ("SCB", "absmax")  # what bitsandbytes calls the scales of a weight, in eight and in four bits

# Settings that change what the same weights compute. A configuration lacks those that its architecture does not have.
_SETTINGS = (
    "model_type num_hidden_layers num_attention_heads num_key_value_heads head_dim hidden_size intermediate_size "
    "vocab_size hidden_act hidden_activation rms_norm_eps layer_norm_eps layer_norm_epsilon norm_eps "
    "partial_rotary_factor sliding_window use_sliding_window max_window_layers layer_types no_rope_layers "
    "attention_multiplier residual_multiplier embedding_multiplier logits_scaling logit_scale "
    "query_pre_attn_scalar attention_bias mlp_bias attn_logit_softcapping final_logit_softcapping"
).split()


def fingerprint(model: PreTrainedModel) -> str:
    """Identifies a model, whatever dtype and devices it is loaded in; quantised weights are others than plain ones.

    Hashes what of the configuration changes the computation (sizes, rope, norms, windows, multipliers), all vectors,
    and of each matrix the first row and numbers spread over all of it, in bfloat16, or as packed.

    Args:
        model: A loaded model.

    Returns:
        16 hexadecimal digits.
    """
    digest = hashlib.sha256(json.dumps(_configuration(text_config(model)), sort_keys=True).encode())
    embedding = input_embedding(model)
    first, parts = torch.empty(0), []
    for parameter, weight in _weights(model):
        if parameter is embedding:
            first = weight[:_EMBEDDING_ROWS].cpu()
        if weight.numel():
            parts.append(_sample(weight))
    for part in (first[:_EMBEDDING_ROWS], *parts):
        found = part.detach().to("cpu", torch.bfloat16 if part.is_floating_point() else part.dtype)
        digest.update(found.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _configuration(config: Any) -> dict[str, Any]:
    settings = {name: _setting(config, name) for name in _SETTINGS}
    rope = getattr(config, "rope_parameters", None) or {}
    settings["rope"] = {name: value for name, value in rope.items() if value is not None}
    return {name: value for name, value in settings.items() if value is not None}


def _setting(config: Any, name: str) -> Any:
    """A setting; of a configuration whose layers differ in it, which refuses to name one, that of each layer."""
    try:
        return getattr(config, name, None)
    except Exception:  # transformers has a class of its own for it, in some of its releases
        return [getattr(config.per_layer_config[layer], name, None) for layer in range(config.num_hidden_layers)]


def _sample(weight: torch.Tensor) -> torch.Tensor:
    """A vector, or a matrix's first row and some numbers spread over the whole of it, shape [numbers]."""
    if weight.element_size() == 1:
        weight = weight.view(torch.uint8)  # few operations know floats of eight bits
    if weight.dim() < 2:
        return weight.reshape(-1)
    flat = weight.reshape(-1)
    spread = torch.linspace(0, flat.shape[0] - 1, min(_SAMPLES, flat.shape[0]), dtype=torch.float64).round().long()
    return torch.cat((weight.flatten(0, -2)[0], flat[spread.to(flat.device)]))


def _weights(model: PreTrainedModel) -> Iterator[tuple[torch.nn.Parameter | None, torch.Tensor]]:
    """Each parameter, once, with its value, and scales that are no parameters.

    accelerate keeps parameters that it offloads elsewhere until a module runs.
    """
    seen: set[int] = set()
    for module in model.modules():
        own = {n: p for n, p in module.named_parameters(recurse=False) if id(p) not in seen}
        seen.update(map(id, own.values()))
        if any(parameter.is_meta for parameter in own.values()):
            from accelerate.utils import align_module_device

            with align_module_device(module, torch.device("cpu")):
                values = {name: getattr(module, name).detach() for name in own}
        else:
            values = {name: parameter.detach() for name, parameter in own.items()}
        for name, value in values.items():
            if is_spread(value):  # over the processes that share the model, all of which are here
                values[name] = value.full_tensor()
        for name, parameter in own.items():
            value = values[name]
            if hasattr(value, "__tensor_flatten__"):  # torchao's classes know few operations
                yield from ((None, part) for part in _parts(value))
                continue
            yield parameter, value
            if not value.is_floating_point():
                yield from ((None, scales) for scales in _scales(module, parameter))


def _parts(weight: Any) -> Iterator[torch.Tensor]:
    """The plain tensors of which a tensor of another class is made."""
    if not hasattr(weight, "__tensor_flatten__"):
        yield weight
        return
    for name in weight.__tensor_flatten__()[0]:
        yield from _parts(getattr(weight, name))


def _scales(module: torch.nn.Module, parameter: torch.nn.Parameter) -> Iterator[torch.Tensor]:
    """The scales that bitsandbytes keeps beside a weight, and from the first use on in its module's state."""
    packing = getattr(parameter, "quant_state", None)
    for owner in (parameter, getattr(module, "state", None), packing, getattr(packing, "state2", None)):
        found = (vars(owner).get(name) for name in _SCALES if hasattr(owner, "__dict__"))
        yield from (scales for scales in found if isinstance(scales, torch.Tensor))
