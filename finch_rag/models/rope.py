"""Re-rotation: cached keys at new positions.

Rotary embeddings (RoFormer, arXiv 2104.09864) rotate each pair of a key's elements by ``position * inv_freq``, so a key
gets from one position to another by the difference of the two angles. The angles come from the model's own
``inv_freq``, which already holds any scaling (linear, Llama-3, YaRN). A factor that the model puts on cos and
sin (YaRN, long RoPE) is in the key already and is not applied again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache

from ..errors import ModelError
from .inspection import input_embedding, text_part

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PROBE_DISTANCE = 1000  # positions between the probe's two keys, where the window is that long


@dataclass(frozen=True, slots=True)
class ReRotation:
    """Cosine and sine of the angles between two positions, float32, each of shape [tokens, pairs]."""

    cos: torch.Tensor
    sin: torch.Tensor


@dataclass(frozen=True, slots=True)
class KeyRotation:
    """How one model rotates its keys.

    Attributes:
        inv_freq: Radians per position of each pair of elements, float32, shape [pairs].
        interleaved: Pairs are neighbours (GPT-J, GLM, Cohere) instead of the two halves (Llama, Qwen, Mistral).
        rotates: Whether each layer rotates at all; some models have layers without positions.
        shapes: KV heads of each layer, with the head_dim of its keys and that of its values.
    """

    inv_freq: torch.Tensor
    interleaved: bool
    rotates: tuple[bool, ...]
    shapes: tuple[tuple[int, int, int], ...] = ()

    def on(self, device: torch.device) -> KeyRotation:
        """The same with its frequencies on a device, so that re-rotation there copies nothing.

        Args:
            device: Where positions will be.
        """
        return replace(self, inv_freq=self.inv_freq.to(device))

    def between(self, old: torch.Tensor, new: torch.Tensor) -> ReRotation:
        """The re-rotation from positions to others, the same in every layer.

        Args:
            old: Positions at which the keys were rotated, shape [tokens].
            new: Positions that they get, shape [tokens].
        """
        inv_freq = self.inv_freq.to(new.device)
        # Each angle is rounded as the model rounds it, so that the difference leaves what the model would compute.
        angle = new.float()[:, None] * inv_freq - old.float()[:, None] * inv_freq
        return ReRotation(angle.cos(), angle.sin())

    def re_rotate(self, keys: torch.Tensor, re_rotation: ReRotation, layer: int) -> torch.Tensor:
        """Keys as they would be at other positions.

        Computed in float32 and rounded once, to the dtype of ``keys``.

        Args:
            keys: Rotated keys, shape [..., tokens, head_dim].
            re_rotation: From their positions to the new ones.
            layer: Index of the layer that they belong to.

        Returns:
            Same shape and dtype as ``keys``.
        """
        if not self.rotates[layer]:
            return keys
        cos, sin = re_rotation.cos.to(keys.device), re_rotation.sin.to(keys.device)
        pairs = self.inv_freq.shape[0]
        rotary = keys[..., : 2 * pairs].float()
        first, second = (rotary[..., 0::2], rotary[..., 1::2]) if self.interleaved else rotary.split(pairs, dim=-1)
        rotated = (first * cos - second * sin, second * cos + first * sin)
        rotary = torch.stack(rotated, dim=-1).flatten(-2) if self.interleaved else torch.cat(rotated, dim=-1)
        return torch.cat((rotary.to(keys.dtype), keys[..., 2 * pairs :]), dim=-1)

    @classmethod
    def of(cls, model: PreTrainedModel, window: int) -> KeyRotation:
        """Reads the rotation off a model and proves it on the model's own keys.

        One forward pass of a single token at two positions (as a batch of two) gives each layer's key at both; the
        rotation found must give one from the other.

        Args:
            model: A decoder-only model.
            window: Positions that the model has.

        Raises:
            ModelError: If the model has no rotary positions, or rotates in a way that is not supported.
        """
        name = type(model).__name__
        frequencies = [b for n, b in text_part(model).named_buffers() if n.endswith("inv_freq") and "original" not in n]
        if not frequencies or any(not torch.equal(f.cpu(), frequencies[0].cpu()) for f in frequencies):
            found = f"{len(frequencies)} different sets of rotary frequencies" if frequencies else "no rotary positions"
            raise ModelError(
                f"{name} has {found}; Finch re-rotates cached keys and needs exactly one: use a model "
                "with rotary positions, such as Llama, Mistral, Qwen2 or Qwen3"
            )
        inv_freq = frequencies[0].detach().float().cpu()
        distance = min(_PROBE_DISTANCE, window - 1)
        old, new = torch.tensor([0]), torch.tensor([distance])
        try:
            at_old, at_new, shapes = _probe_keys(model, distance)
        except Exception as error:  # a cache of its own, layers without keys: whatever a model trips over
            raise ModelError(f"{name} does not run on a plain key/value cache: use Llama or Qwen") from error
        if len({keys.shape for keys in at_old}) != 1 or at_old[0].shape[-1] < 2 * inv_freq.shape[0]:
            raise ModelError(f"{name} caches keys of several shapes: use Llama, Mistral, Qwen2 or Qwen3")
        for interleaved in (False, True):
            guess = cls(inv_freq, interleaved, (True,) * len(at_old))
            re_rotation = guess.between(old, new)
            rotates = []
            for layer, (before, after) in enumerate(zip(at_old, at_new, strict=True)):
                if _close(guess.re_rotate(before, re_rotation, layer), after):
                    rotates.append(True)
                elif _close(before, after):
                    rotates.append(False)
            if len(rotates) == len(at_old) and any(rotates):
                return cls(inv_freq, interleaved, tuple(rotates), shapes)
        raise ModelError(
            f"{name} rotates its keys in a way that Finch does not know: use Llama, Mistral, Qwen2 or Qwen3"
        )


def _probe_keys(
    model: PreTrainedModel, distance: int
) -> tuple[list[torch.Tensor], list[torch.Tensor], tuple[tuple[int, int, int], ...]]:
    """One token's key in every layer at position 0 and at ``distance``, each float32 [kv_heads, 1, head_dim].

    And the shapes of what each layer caches, see `KeyRotation`.
    """
    cache = DynamicCache()
    device = input_embedding(model).device
    with torch.inference_mode():
        model.base_model(
            input_ids=torch.ones(2, 1, dtype=torch.long, device=device),
            position_ids=torch.tensor([[0], [distance]], device=device),
            past_key_values=cache,
            use_cache=True,
        )
    layers: list[Any] = list(cache.layers)
    keys = [layer.keys.float().cpu() for layer in layers]  # each [2, kv_heads, 1, head_dim]
    shapes = tuple((layer.keys.shape[1], layer.keys.shape[-1], layer.values.shape[-1]) for layer in layers)
    return [k[0] for k in keys], [k[1] for k in keys], shapes


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal within what a model in bfloat16 rounds; a wrong rotation is off by the size of the keys themselves."""
    return bool((a - b).abs().max() <= 0.05 * b.abs().max())
