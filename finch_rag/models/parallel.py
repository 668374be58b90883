"""A model whose layers several processes share, by a tensor parallel plan of transformers.

Every process makes the same calls, and has some heads of every layer, with their keys and values in its caches. Hidden
states and logits are whole in each of them. What looks at attention is shown all heads: they are gathered before it
looks, so each process ranks by the same numbers, keeps the same passages and writes the same tokens. What a process
could decide by itself (a random seed, its free memory, a file of its own) is agreed on.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import transformers
from torch import distributed

from ..errors import ModelError
from .inspection import input_embedding, text_config

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel

Agreed = TypeVar("Agreed")


class TensorParallel:
    """The processes that share a model. All of them call its methods, in the same order.

    Args:
        mesh: The processes, in one dimension.
        heads: Query heads of a layer.
        kv_heads: Key heads of a layer.
        device: This process's.

    Attributes:
        processes: How many they are.
        first: Whether this is the one that writes files.
    """

    def __init__(self, mesh: DeviceMesh, heads: int, kv_heads: int, device: torch.device) -> None:
        self._group = mesh.get_group()
        self._heads, self._kv_heads, self._device = heads, kv_heads, device
        self.processes = mesh.size()
        self.first = mesh.get_local_rank() == 0

    @classmethod
    def of(cls, model: PreTrainedModel) -> TensorParallel | None:
        """The processes that share a model; None where this one has all of it.

        Args:
            model: A loaded model.

        Raises:
            ModelError: If its weights do not say what of them is where, or are spread in more than one way.
        """
        if not (distributed.is_available() and distributed.is_initialized()):
            return None
        if (getattr(model, "tp_size", None) or 1) < 2:
            return None
        name, config = type(model).__name__, text_config(model)
        weights: Iterator[Any] = model.parameters()
        mesh = next((weight.device_mesh for weight in weights if is_spread(weight)), None)
        if mesh is None:
            raise ModelError(
                f"the weights of {name} do not tell how transformers {transformers.__version__} has spread them: "
                "update transformers, or use device_map in place of tp_plan"
            )
        if mesh.ndim != 1 or mesh.size() != distributed.get_world_size():
            raise ModelError(
                f"{name} is spread over {distributed.get_world_size()} processes in more ways than by tensor "
                "parallelism: start as many processes as share its heads, or use device_map"
            )
        heads, kv_heads = int(config.num_attention_heads), getattr(config, "num_key_value_heads", None)
        return cls(mesh, heads, int(kv_heads or heads), input_embedding(model).device)

    def check_heads(self) -> None:
        """Raises where the heads cannot be shared evenly.

        Raises:
            ModelError: If so, with both numbers.
        """
        if self._kv_heads % self.processes:
            raise ModelError(
                f"{self.processes} processes cannot share evenly the key heads of a layer, which has {self._kv_heads}: "
                "start a number of processes that divides them, or use device_map in place of tp_plan"
            )

    def all_queries(self, query: torch.Tensor) -> torch.Tensor:
        """The queries of all heads.

        Args:
            query: Of this process's heads, shape [batch, heads, queries, head_dim].
        """
        return self._gathered(query, self._heads)

    def all_keys(self, key: torch.Tensor) -> torch.Tensor:
        """The keys of all heads.

        Args:
            key: Of this process's heads, shape [batch, kv_heads, keys, head_dim].
        """
        return self._gathered(key, self._kv_heads)

    def _gathered(self, states: torch.Tensor, heads: int) -> torch.Tensor:
        if states.shape[1] == heads:  # the plan leaves attention whole
            return states
        parts = [torch.empty_like(states, memory_format=torch.contiguous_format) for _ in range(self.processes)]
        distributed.all_gather(parts, states.contiguous(), group=self._group)
        return torch.cat(parts, dim=1)

    def least(self, number: int) -> int:
        """The least of the processes' numbers.

        Args:
            number: This process's.
        """
        found = torch.tensor(number, device=self._device)
        distributed.all_reduce(found, distributed.ReduceOp.MIN, group=self._group)
        return int(found)

    def agreed(self, value: Agreed) -> Agreed:
        """The first process's value.

        Args:
            value: This process's, of plain Python types.
        """
        values = [value]
        first = distributed.get_global_rank(self._group, 0)
        distributed.broadcast_object_list(values, first, group=self._group, device=self._device)
        return values[0]


def is_spread(weight: Any) -> bool:
    """Whether a weight is one process's part of a larger one, which knows the others.

    Args:
        weight: Any tensor.
    """
    if not distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(weight, DTensor)


def writes_files(model: PreTrainedModel) -> bool:
    """Whether this process writes what is kept of a model: of those that share it, the first does.

    Args:
        model: A loaded model.
    """
    shared = TensorParallel.of(model)
    return shared is None or shared.first


def agreed(model: PreTrainedModel, value: Agreed) -> Agreed:
    """What all processes that share a model go on with; the value itself where this one has all of it.

    Args:
        model: A loaded model.
        value: See `TensorParallel.agreed`.
    """
    shared = TensorParallel.of(model)
    return value if shared is None else shared.agreed(value)
