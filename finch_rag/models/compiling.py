"""Fused kernels by ``torch.compile``, for those who ask for them: they cost seconds before the first answer.

Norms and the gated MLP are bound by memory: run operation by operation, they write every intermediate result. Compiled,
each is a kernel or two. Attention stays as it is, where an observer may look in; so no graph breaks, and one compiled
code serves all layers and chunk lengths.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def compile_layers(model: PreTrainedModel) -> None:
    """Compiles every decoder layer's parts but its attention, at their first use.

    Args:
        model: A model with a list of decoder layers.

    Raises:
        ModelError: If it has none.
    """
    layers: Any = getattr(model.base_model, "layers", None)
    if layers is None:
        raise ModelError(f"{type(model).__name__} has no list of layers to compile: leave compile_layers out")
    for layer in layers:
        for part in layer.children():
            if not hasattr(part, "layer_idx"):  # the mark of an attention module, see `finch_rag.models.attention`
                part.compile(dynamic=True)
