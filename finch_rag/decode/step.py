"""What every decoding step in buffers of fixed size has: token and position in tensors, and a CUDA graph on a GPU."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from ..models.kept_cache import KeptCache

_SPARE = 2  # times as many tokens as needed cost a step little: weights are most of what it reads
_WARM_UPS = 2  # steps before the capture, in which libraries allocate what they need


class Step(ABC):
    """Decodes token by token.

    Args:
        answers: Answers that it serves.
        capacity: Tokens that its buffers hold for each.
        device: Of the model.
    """

    def __init__(self, answers: int, capacity: int, device: torch.device) -> None:
        self.answers, self.capacity = answers, capacity
        self._position = torch.zeros(answers, dtype=torch.long, device=device)
        self._tokens = torch.zeros(answers, 1, dtype=torch.long, device=device)
        self._moves = torch.ones(
            answers, dtype=torch.long, device=device
        )  # 0 where no answer is: it stays in its place
        self._places = torch.arange(capacity, device=device)
        self._logits: torch.Tensor | None = None
        self._graph: torch.cuda.CUDAGraph | None = None

    @property
    def captured(self) -> bool:
        """Whether it runs as a CUDA graph."""
        return self._graph is not None

    def serves(self, answers: int, tokens: int) -> bool:
        """Whether so many answers of so many tokens run on it without much waste."""
        return self.answers == answers and tokens <= self.capacity <= _SPARE * tokens

    def replaces(self, other: Step) -> bool:
        """Whether it serves whatever another, smaller step does, so that only one of them need be kept."""
        return self.capacity > other.capacity and self.serves(other.answers, other.capacity)

    @abstractmethod
    def load(self, caches: Sequence[KeptCache]) -> None:
        """Goes on from caches, which are copied.

        Args:
            caches: One an answer, of at most ``capacity`` tokens.
        """

    @torch.inference_mode()
    def __call__(self, tokens: Sequence[int]) -> torch.Tensor:
        """Appends a token to each answer; logits after it.

        Args:
            tokens: Their ids.

        Returns:
            Float32, shape [answers, vocabulary]; overwritten by the next call.
        """
        self._tokens.copy_(torch.tensor(tokens)[:, None])
        if self._graph is None or self._logits is None:
            return self._step()
        self._graph.replay()
        return self._logits

    def _step(self) -> torch.Tensor:
        logits = self._forward()
        self._position.add_(self._moves)
        return logits

    @abstractmethod
    def _forward(self) -> torch.Tensor:
        """Runs the model on the tokens at their positions; logits, float32, shape [answers, vocabulary]."""

    @torch.inference_mode()
    def _capture(self, device: torch.device) -> None:
        """Records the step where the device is a CUDA device."""
        if device.type != "cuda":
            return
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
