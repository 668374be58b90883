"""What an engine tells about itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .heads.pairs import AloneHeads, Heads, HeadUse
from .models.processes import Uncopied
from .prefill.planning import ChunkSize, Prior, RetrievalHeads, Strategy
from .prefill.selection import Selection
from .prompts.builder import PromptBuilder
from .request import Progress
from .runtime import Runtime
from .settings import Settings
from .store.store import PassageStore

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class EngineAttributes(Uncopied):
    """Settings and model of an engine, read-only.

    Attributes:
        settings: What a call does where its options do not say otherwise.
        runtime: Executes the calls.
    """

    settings: Settings
    runtime: Runtime

    def count_tokens(self, text: str) -> int:
        """Tokens of a text as Finch reads it."""
        return len(self.prompts.encode([text])[0])

    def retrieval_heads(self, use: HeadUse = "loop") -> RetrievalHeads | None:
        """The heads that rank passages, by layer; None when all are summed. Found on the first call if need be.

        Args:
            use: "loop", or "alone" for passages that are read alone.
        """
        if use == "alone":
            return self.runtime.alone_reader(self.settings.on_progress).heads
        return self.runtime.retrieval_heads(self.settings.on_progress)

    @property
    def store(self) -> PassageStore | None:
        """The engine's own store, opened if need be; None where it scans."""
        return self.runtime.stores.at(self.settings.store, self.settings.on_progress)

    @property
    def heads(self) -> Heads:
        """The heads as they were asked for; `retrieval_heads` says which ones they are."""
        return self.runtime.heads

    @property
    def alone_heads(self) -> AloneHeads:
        """Those for passages read alone, as they were asked for."""
        return self.runtime.alone_heads

    @property
    def fingerprint(self) -> str:
        """Identifies the model."""
        return self.runtime.fingerprint

    @property
    def model(self) -> PreTrainedModel:
        """The model."""
        return self.runtime.model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer."""
        return self.runtime.tokenizer

    @property
    def name(self) -> str:
        """Its name in reports."""
        return self.runtime.name

    @property
    def window(self) -> int:
        """Positions that the model has."""
        return self.runtime.window

    @property
    def prompts(self) -> PromptBuilder:
        """Builds the model's prompts."""
        return self.runtime.prompts

    @property
    def budget(self) -> int | None:
        """Document tokens kept per layer; None where the window decides."""
        return self.settings.reading.budget

    @property
    def chunk_size(self) -> ChunkSize:
        """Document tokens scanned per step."""
        return self.settings.reading.chunk_size

    @property
    def strategy(self) -> Strategy:
        """How passages are ranked."""
        return self.settings.reading.strategy

    @property
    def selection(self) -> Selection:
        """What is kept."""
        return self.settings.reading.selection

    @property
    def reread(self) -> bool:
        """Whether the best passages are prefilled again."""
        return self.settings.reading.reread

    @property
    def prior(self) -> Prior:
        """What the retriever's order counts."""
        return self.settings.reading.prior

    @property
    def rounds(self) -> int | None:
        """How often passages are ranked; None leaves it to the device."""
        return self.settings.reading.rounds

    @property
    def cutoff(self) -> float | None:
        """The part of the best passage's attention below which a passage is left out; None for the default."""
        return self.settings.reading.cutoff

    @property
    def support(self) -> bool:
        """Whether it is judged how well the passages support an answer."""
        return self.settings.support or self.settings.min_support is not None

    @property
    def min_support(self) -> float | None:
        """The least support of an answer that is not withheld; None withholds none."""
        return self.settings.min_support

    @property
    def quotes(self) -> bool:
        """Whether the sentences are found that an answer rests on."""
        return self.settings.quotes

    @property
    def max_new_tokens(self) -> int:
        """The most tokens of an answer."""
        return self.settings.sampling.max_new_tokens

    @property
    def instructions(self) -> str | None:
        """Read before the passages; None for the default."""
        return self.settings.prompt.instructions

    @property
    def system_prompt(self) -> str | None:
        """The system message; None for the default."""
        return self.settings.prompt.system_prompt

    @property
    def on_progress(self) -> Progress:
        """Told of a stage, and of its steps done and in all."""
        return self.settings.on_progress
