"""Decoding steps of a model as CUDA graphs, kept and lent to one answer, or one group of answers, at a time."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from ..models.cache import CompressedCache
from ..models.kept_cache import KeptCache
from ..models.parallel import TensorParallel
from .fused_step import can_fuse
from .own_step import OwnStep
from .static_step import StaticStep
from .step import Step

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SIZE_STEP = 512  # buffers come in multiples of this, so that most answers meet a step of their size
LARGEST = 16_384  # tokens; beyond, the second copy of keys and values costs more than it saves
MOST_IDLE = 2  # steps that an engine keeps

_log = logging.getLogger(__name__)


class CudaGraphs:
    """CUDA graphs of one model's decoding step.

    Args:
        model: Steps are captured where all of it is on one CUDA device, and no other process has a part of it.

    Attributes:
        model: The model.
        enabled: Whether steps are lent; without a CUDA device they run in their static buffers, uncaptured.
        fused: Whether a step runs by `FusedStep`.
        idle: Steps that wait for an answer.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        devices = {parameter.device for parameter in model.parameters()}
        one_device = len(devices) == 1 and next(iter(devices)).type == "cuda"
        self.enabled = one_device and TensorParallel.of(model) is None
        self.fused = self.enabled and can_fuse(model)
        self.idle: list[Step] = []
        self._lock = threading.Lock()

    @contextmanager
    def lend(self, caches: Sequence[KeptCache], new_tokens: int) -> Iterator[Step | None]:
        """A step that goes on from caches; None where plain forward passes have to do.

        Args:
            caches: What each answer has read so far, at least one; one alone where it is the model's own kind.
            new_tokens: The most tokens that will follow.
        """
        step = self.take(caches[0], len(caches), max(cache.length for cache in caches) + new_tokens)
        try:
            if step is not None:
                step.load(caches)
            yield step
        finally:
            if step is not None:
                self.give_back(step)

    def take(self, like: KeptCache, answers: int, tokens: int) -> Step | None:
        """A step which is the caller's until it is given back; None where plain forward passes have to do.

        Args:
            like: A cache of the model, for the shapes.
            answers: That it serves.
            tokens: That it must hold for each.
        """
        capacity = -(-tokens // SIZE_STEP) * SIZE_STEP
        if not self.enabled or capacity > LARGEST:
            return None
        with self._lock:
            fitting = [step for step in self.idle if step.serves(answers, capacity)]
            step = min(fitting, key=lambda step: step.capacity, default=None)
            if step is not None:
                self.idle.remove(step)
        try:
            return step or self._make(like, answers, capacity)
        except RuntimeError as error:
            name = type(self.model).__name__
            if _is_out_of_memory(error):  # that may pass: the next answer tries again, with the memory of idle steps
                with self._lock:
                    self.idle.clear()
                _log.warning("there is no memory for a CUDA graph of %s: this answer is decoded without", name)
                return None
            self.enabled = False  # a layer that asks the device for a value, a library that cannot be captured
            _log.warning("%s cannot be captured as a CUDA graph, so it decodes slower: %s", name, error)
            return None

    def give_back(self, step: Step) -> None:
        """Keeps a step for the next answer.

        Args:
            step: That `take` has handed out.
        """
        with self._lock:
            others = [other for other in self.idle if not step.replaces(other)]
            self.idle = [step, *others][:MOST_IDLE]

    def _make(self, like: KeptCache, answers: int, capacity: int) -> Step:
        if not isinstance(like, CompressedCache):
            return OwnStep(self.model, like, capacity)
        if self.fused:
            try:
                return StaticStep(self.model, like, answers, capacity, fused=True)
            except Exception as error:  # Triton raises what its compilers do; it needs a C compiler, too
                if _is_out_of_memory(error):
                    raise
                self.fused = False
                _log.warning(
                    "%s decodes by its own kernels, which is slower, because Triton's failed: %s",
                    type(self.model).__name__,
                    error,
                )
        return StaticStep(self.model, like, answers, capacity)


def _is_out_of_memory(error: BaseException | None) -> bool:
    """Whether memory ran out; a capture that ends by it may raise another error on top."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError):
            return True
        error = error.__cause__ or error.__context__
    return False
