"""A decoding step as one CUDA graph.

A step of one token launches some hundred small kernels, and launching them takes the CPU several times as long as
running them takes the GPU. Their shapes never change, so the launches are recorded once and replayed. What does change
lives in tensors: the token, its position, and keys and values in buffers of fixed size, of which a mask hides what is
not filled yet. A step may serve several answers at once, each a row of a batch at a position of its own. What is
recorded is the model's own forward, or for one answer of a model that `finch_rag.fused_step` knows its fewer kernels.

A recorded step is kept and used again by every answer that fits into its buffers.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from .attention import input_embedding
from .fused_step import FusedStep, can_fuse

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .cache import CompressedCache

_SIZE_STEP = 512  # buffers come in multiples of this, so that most answers meet a step of their size
_LARGEST = 16_384  # beyond, the second copy of keys and values costs more than it saves
_SPARE = 2  # times as many columns as needed cost a step little: weights are most of what it reads
_KEPT = 2  # recorded steps that an engine keeps
_WARM_UPS = 2  # steps before the recording, in which libraries allocate what they need

_log = logging.getLogger(__name__)


class FixedLayer(CacheLayerMixin):
    """One layer's keys and values; a step writes at a position that a tensor holds.

    Args:
        keys: Buffer, shape [answers, kv_heads, capacity, head_dim].
        values: Buffer of the same shape, up to its head_dim.
        position: Where each answer's next token goes, shape [answers].
    """

    is_sliding = False

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, position: torch.Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self._position = position
        self._rows = torch.arange(keys.shape[0], device=keys.device)
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing is left to do."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes a token of each answer, shape [answers, kv_heads, 1, head_dim]; returns the whole buffers."""
        keys, values = self.keys, self.values
        if keys is None or values is None:
            raise RuntimeError("a layer of fixed size lost its buffers")
        keys[self._rows, :, self._position] = key_states[:, :, 0]
        values[self._rows, :, self._position] = value_states[:, :, 0]
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """All columns: the mask hides those that are not filled."""
        return self.get_max_length(), 0

    def get_seq_length(self) -> int:
        """Not known outside the device."""
        return 0

    def get_max_length(self) -> int:
        """The capacity."""
        return 0 if self.keys is None else self.keys.shape[2]

    def get_max_cache_shape(self) -> int:
        """The capacity, by the name that it had at first in transformers 5."""
        return self.get_max_length()


class FixedStep:
    """Decodes token by token in buffers of fixed size.

    Args:
        model: A model on one device that runs Finch's attention.
        like: A cache of the model, for the shapes.
        answers: Answers that a step serves.
        capacity: Tokens that the buffers hold for each.
        fused: Whether to run it by `FusedStep`, which takes one answer.
    """

    def __init__(
        self, model: PreTrainedModel, like: CompressedCache, answers: int, capacity: int, fused: bool = False
    ) -> None:
        device = input_embedding(model).device
        self.answers, self.capacity = answers, capacity
        self._model = model
        self._position = torch.zeros(answers, dtype=torch.long, device=device)
        self._tokens = torch.zeros(answers, 1, dtype=torch.long, device=device)
        self._columns = torch.arange(capacity, device=device)
        self._buffers: list[tuple[torch.Tensor, torch.Tensor]] = []  # keys and values of each layer
        for layer in like.layers:
            if layer.keys is None or layer.values is None:
                raise RuntimeError("the cache is empty")
            # Zeros, because a masked column's weight of 0 does not hide a NaN in its value.
            keys, values = (b.new_zeros(answers, b.shape[1], capacity, b.shape[3]) for b in (layer.keys, layer.values))
            self._buffers.append((keys, values))
        self._cache = Cache(layers=[FixedLayer(keys, values, self._position) for keys, values in self._buffers])
        self._logits: torch.Tensor | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._fused = FusedStep(model) if fused else None
        if device.type == "cuda":
            self._record(device)

    def serves(self, answers: int, tokens: int) -> bool:
        """Whether so many answers of so many tokens run on it without much waste."""
        return self.answers == answers and tokens <= self.capacity <= _SPARE * tokens

    def replaces(self, other: FixedStep) -> bool:
        """Whether it serves whatever another, smaller step does, so that only one of them need be kept."""
        return self.capacity > other.capacity and self.serves(other.answers, other.capacity)

    @torch.inference_mode()
    def load(self, caches: Sequence[CompressedCache]) -> None:
        """Goes on from caches, which are copied.

        Args:
            caches: One an answer, of at most ``capacity`` tokens.
        """
        for row, cache in enumerate(caches):
            for (keys, values), its in zip(self._buffers, cache.layers, strict=True):
                for buffer, states in ((keys, its.keys), (values, its.values)):
                    if states is not None:
                        buffer[row, :, : cache.length].copy_(states[0, :, : cache.length])
            self._position[row] = cache.length

    @torch.inference_mode()
    def __call__(self, tokens: Sequence[int]) -> torch.Tensor:
        """Appends a token to each answer; logits after it.

        Args:
            tokens: Their ids.

        Returns:
            Float32, shape [answers, vocabulary]; overwritten by the next call.
        """
        self._tokens.copy_(torch.tensor(tokens)[:, None])
        if self._graph is None:
            return self._step()
        self._graph.replay()
        if self._logits is None:
            raise RuntimeError("the step was not recorded")
        return self._logits

    def _step(self) -> torch.Tensor:
        logits = self._forward() if self._fused is None else self._fused(self._tokens, self._position, self._buffers)
        self._position.add_(1)
        return logits

    def _forward(self) -> torch.Tensor:
        hidden = (self._columns > self._position[:, None])[:, None, None]  # [answers, 1, 1, capacity]
        # Added to the products: of a mask of truth values SDPA would make this anew in every layer.
        mask = torch.zeros_like(hidden, dtype=self._model.dtype).masked_fill_(hidden, float("-inf"))
        output = self._model(
            input_ids=self._tokens,
            attention_mask=mask,
            position_ids=self._position[:, None],
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: torch.Tensor = output.logits[:, -1].float()
        return logits

    @torch.inference_mode()
    def _record(self, device: torch.device) -> None:
        with torch.cuda.device(device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(_WARM_UPS):
                    self._step()
            torch.cuda.current_stream().wait_stream(side)
            self._position.zero_()
            graph = torch.cuda.CUDAGraph()
            # Other threads may allocate meanwhile, in streams of their own.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._logits = self._step()
            self._graph = graph


class StepGraphs:
    """Recorded steps of one model, lent to one answer, or one group of them, at a time.

    Args:
        model: Steps are recorded where all of it is on one CUDA device.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        devices = {parameter.device for parameter in model.parameters()}
        self._usable = len(devices) == 1 and next(iter(devices)).type == "cuda"
        self._fused = self._usable and can_fuse(model)
        self._free: list[FixedStep] = []
        self._lock = threading.Lock()

    @contextmanager
    def lend(self, caches: Sequence[CompressedCache], new_tokens: int) -> Iterator[FixedStep | None]:
        """A step that goes on from caches; None where plain forward passes have to do.

        Args:
            caches: What each answer has read so far, at least one.
            new_tokens: The most tokens that will follow.
        """
        step = self._take(caches, max(cache.length for cache in caches) + new_tokens)
        try:
            yield step
        finally:
            if step is not None:
                with self._lock:
                    others = [other for other in self._free if not step.replaces(other)]
                    self._free = [step, *others][:_KEPT]

    def _take(self, caches: Sequence[CompressedCache], tokens: int) -> FixedStep | None:
        capacity = -(-tokens // _SIZE_STEP) * _SIZE_STEP
        if not self._usable or capacity > _LARGEST:
            return None
        with self._lock:
            fitting = [step for step in self._free if step.serves(len(caches), capacity)]
            step = min(fitting, key=lambda step: step.capacity, default=None)
            if step is not None:
                self._free.remove(step)
        try:
            step = step or self._make(caches[0], len(caches), capacity)
        except RuntimeError as error:  # a layer that asks the device for a value, a library that cannot be recorded
            self._usable = False
            _log.warning(
                "%s cannot be recorded as a CUDA graph, so it decodes slower: %s", type(self._model).__name__, error
            )
            return None
        step.load(caches)
        return step

    def _make(self, like: CompressedCache, answers: int, capacity: int) -> FixedStep:
        if self._fused and answers == 1:
            try:
                return FixedStep(self._model, like, answers, capacity, fused=True)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # Triton raises what its compilers do; it needs a C compiler, too
                self._fused = False
                _log.warning(
                    "%s decodes by its own kernels, which is slower, because Triton's failed: %s",
                    type(self._model).__name__,
                    error,
                )
        return FixedStep(self._model, like, answers, capacity)
