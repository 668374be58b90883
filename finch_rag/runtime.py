"""What executes requests: a model with its rotation, retrieval heads and CUDA graphs. Safe to share between threads.

`finch_rag.resolving` makes the requests, `finch_rag.reading` reads their passages.
"""

from __future__ import annotations

import secrets
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from .decode.constraint import JsonConstraint, JsonConstraints
from .decode.cuda_graphs import CudaGraphs
from .decode.generation import Decoder, Writer, end_tokens
from .decode.sampling import Sampling
from .errors import InputError, ModelError
from .heads.found_once import FoundOnce
from .heads.pairs import AloneHeads, Heads
from .heads.stored import resolve_alone_heads, resolve_heads
from .models import compiling
from .models.attention import use_finch_attention
from .models.fingerprint import fingerprint
from .models.inspection import input_embedding, positions_of, text_config, window_of
from .models.kept_cache import KeptCache
from .models.own_attention import use_own_attention
from .models.own_cache import check_steps, goes_on_in_chunks, probe_logits
from .models.parallel import TensorParallel
from .models.processes import check_gil, check_not_forked
from .models.rope import KeyRotation
from .prefill.alone import AloneReader
from .prefill.own_reader import reader_of
from .prefill.planning import RetrievalHeads, chunk_within, default_chunk_size
from .prompts.builder import PromptBuilder
from .prompts.passages import Passage
from .request import Cancellation, Progress, Request, no_progress
from .store.opening import OpenStores

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_SEED_BITS = 63  # of the seed of answers that nobody has given one, where several processes must draw the same


class Runtime:
    """Executes requests on one model. A request keeps nothing in it.

    Args:
        model: A decoder-only transformers model. It is switched to Finch's attention function, which computes what SDPA
            computes; where Finch cannot move its keys, to a window in front of its own.
        tokenizer: Its tokenizer.
        name: Name in reports; the model's own when None.
        heads: Heads that rank passages, checked; see `finch_rag.Finch`.
        alone_heads: Likewise, of passages that are read alone.
        compile_layers: See `finch_rag.Finch`.
        held: Stay below the sliding window of some layers, so that the loop can run.

    Attributes:
        window: Positions of the model; those in which its attention is plain causal attention, where the loop runs.
        no_loop: Why the loop cannot run, so that passages are read alone by the model's own attention; empty where it
            can.
        shared: The processes that share the model; None where this one has all of it.
        prompts: Builds its prompts.
        graphs: Its decoding steps as CUDA graphs.
        stores: The stores that calls name by their folders.

    Raises:
        ModelError: If Finch cannot run the model.
        SettingsError: If Python runs without its global interpreter lock.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str | None = None,
        heads: Heads = "auto",
        alone_heads: AloneHeads = "auto",
        compile_layers: bool = False,
        held: bool = False,
    ) -> None:
        if getattr(model.config, "is_encoder_decoder", False):
            raise ModelError(f"{type(model).__name__} is an encoder-decoder; Finch runs decoder-only models")
        self.model, self.tokenizer = model, tokenizer
        self.heads, self.alone_heads = heads, alone_heads
        self.name = name or str(getattr(model, "name_or_path", "") or type(model).__name__)
        self.no_loop, self._in_chunks = "", True
        self.shared = TensorParallel.of(model)
        if self.shared is not None:
            self.shared.check_heads()
            if compile_layers:
                raise ModelError("compile_layers is not supported under tensor parallelism: leave it out")
        self._rotation: KeyRotation | None = None
        check_gil()
        self.check_process()
        expected = probe_logits(model)
        try:
            self.window = window_of(text_config(model), held=held)
            rotation = KeyRotation.of(model, self.window)
            use_finch_attention(model)
            check_steps(model, expected)
            self._rotation = rotation
        except ModelError as reason:
            if self.shared is not None:
                raise ModelError(
                    f"{reason}; its own attention is not supported under tensor parallelism: use device_map in place "
                    "of tp_plan"
                ) from reason
            use_own_attention(model)
            check_steps(model, expected)
            self._in_chunks = goes_on_in_chunks(model, expected)
            self.no_loop, self.window = str(reason), positions_of(text_config(model))
        self.prompts = PromptBuilder(tokenizer)
        self.graphs = CudaGraphs(model)
        self._constraints = JsonConstraints(self.prompts, self._end_tokens)
        if compile_layers:
            compiling.compile_layers(model)
        self._loop_heads: FoundOnce[RetrievalHeads | None] = FoundOnce()
        self.support_weights: FoundOnce[tuple[float, ...] | ModelError] = FoundOnce()  # see `finch_rag.quotes.support`
        self._alone_reader: FoundOnce[AloneReader] = FoundOnce()
        self.stores = OpenStores(self)

    def check_process(self) -> None:
        """Raises in a process that was forked since the model computed, where a call would hang.

        Raises:
            InputError: See `finch_rag.models.processes`.
        """
        check_not_forked(input_embedding(self.model).device)

    @property
    def rotation(self) -> KeyRotation:
        """How the model rotates keys.

        Raises:
            InputError: If its keys cannot be moved.
        """
        if self._rotation is None:
            raise InputError(f"{self.name} cannot be read by the loop: {self.no_loop}")
        return self._rotation

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the model."""
        return fingerprint(self.model)

    @cached_property
    def _end_tokens(self) -> frozenset[int]:
        return end_tokens(self.model, self.tokenizer)

    @property
    def usual_chunk_size(self) -> int:
        """Document tokens that the model scans well in one step, by its device, its size and the memory free now."""
        device = input_embedding(self.model).device
        chunk_size = default_chunk_size(device.type, text_config(self.model))
        if device.type != "cuda":
            return chunk_size
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch's, for later
        free = torch.cuda.mem_get_info(device)[0] + unused
        chunk_size = chunk_within(free, chunk_size, text_config(self.model), self.model.dtype.itemsize)
        return chunk_size if self.shared is None else self.shared.least(chunk_size)

    @property
    def prompt_chunk_size(self) -> int | None:
        """The most tokens of a prompt that are read in one pass; None where it must be read in one."""
        return self.usual_chunk_size if self._in_chunks else None

    @cached_property
    def alone_prefix(self) -> list[int]:
        """What stands before a passage that is read alone: Finch's own prefix, so that it holds for every call."""
        return self.prompts.build("x", [Passage("x")]).prefix

    def retrieval_heads(
        self, on_progress: Progress = no_progress, cancellation: Cancellation | None = None
    ) -> RetrievalHeads | None:
        """The heads that rank passages in the loop, by layer; None when all are summed. Found on the first call.

        Args:
            on_progress: Told of the stage "heads", and of the examples done and in all.
            cancellation: Asked after each example.
        """
        wanted = Cancellation() if cancellation is None else cancellation

        def find() -> RetrievalHeads | None:
            told = wanted.telling("heads", on_progress)
            return resolve_heads(self.heads, self.model, self.tokenizer, self.name, told)

        return self._loop_heads.get(find, wanted.check)

    def alone_reader(
        self, on_progress: Progress = no_progress, cancellation: Cancellation | None = None
    ) -> AloneReader:
        """What reads passages alone, with the heads that rank them. They are found on the first call if need be.

        Args:
            on_progress: See `retrieval_heads`.
            cancellation: See `retrieval_heads`.
        """
        wanted = Cancellation() if cancellation is None else cancellation

        def find() -> AloneReader:
            told = wanted.telling("heads", on_progress)
            return self.reader_with(resolve_alone_heads(self.alone_heads, self.model, self.tokenizer, self.name, told))

        return self._alone_reader.get(find, wanted.check)

    def reader_with(self, heads: RetrievalHeads) -> AloneReader:
        """What reads passages alone, with some heads.

        Args:
            heads: By layer.
        """
        return reader_of(self.model, self.alone_prefix, heads)

    def constraint(self, sampling: Sampling) -> JsonConstraint | None:
        """What holds one answer to a JSON schema; None where it is free text.

        Args:
            sampling: How tokens are chosen.

        Raises:
            InputError: If an answer cannot be held to the schema.
            MissingExtraError: If llguidance is not installed.
            ModelError: If the tokenizer is one that llguidance cannot read.
        """
        return None if sampling.json_schema is None else self._constraints.of(sampling.json_schema)

    def writer(self, sampling: Sampling) -> Writer:
        """What makes an answer of the model's logits.

        Args:
            sampling: How tokens are chosen.
        """
        if self.shared is not None and sampling.temperature > 0 and sampling.seed is None:
            sampling = replace(sampling, seed=self.shared.agreed(secrets.randbits(_SEED_BITS)))
        return Writer(sampling, self._end_tokens, self.prompts.decode, self.constraint(sampling))

    def decoder(self, cache: KeptCache, request: Request) -> Decoder:
        """The generation of a request's answer.

        Args:
            cache: With room for question and answer; they are appended to it.
            request: The request.
        """
        return Decoder(
            self.model,
            cache,
            request.answer_prompt,
            self.writer(request.sampling),
            new_tokens=request.sampling.max_new_tokens,
            graphs=self.graphs,
            cancelled=request.cancellation.is_cancelled,
            chunk_size=self.prompt_chunk_size,
        )
