"""FinchLLM: a completion model that reads all documents of a prompt in one call."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun, Callbacks
from langchain_core.language_models import BaseLLM
from langchain_core.outputs import Generation, GenerationChunk, LLMResult
from pydantic import Field, PrivateAttr

from finch_rag import AnswerStream

from ._settings import FinchSettings
from ._streaming import AnyStream, achunks, chunks, outcome_of


class FinchLLM(FinchSettings, BaseLLM):
    """A local Hugging Face model that reads far more documents than its window holds, and cites them.

    A drop-in for any chain: documents and question are found in LangChain's own prompts; better, hand the documents
    over apart, with ``bind(documents=docs)`` or `create_finch_documents_chain`. The model is loaded at the first call,
    and shared by all instances with the same settings of loading.

    A generation's ``generation_info`` has the citations, the report and the finish reason.

    Args:
        model: A hub id, a folder, a GGUF file or "embedded".
        engine: A `finch_rag.Finch` to use; settings that are left out are then its own.
        budget: Document tokens kept per layer; derived from the window when None.
        max_new_tokens: The most tokens of an answer; 128 when None. LangChain's name, ``max_tokens``, is the same.
        settings: All other fields, see the README.

    Raises:
        SettingsError: If there is no model, or a setting is unknown or cannot work.

    Example:
        >>> llm = FinchLLM(model="embedded", budget=256)
        >>> (prompt | llm.bind(documents=docs)).invoke({"question": "Who signed it?"})
    """

    # finch-rag's name is the one that a completion model shows; LangChain's is taken too.
    max_tokens: int | None = Field(default=None, alias="max_new_tokens", description="The most tokens of an answer.")

    _call: dict[str, Any] = PrivateAttr(default_factory=dict)  # of a copy that makes one call

    @property
    def _llm_type(self) -> str:
        return "finch"

    @property
    def _identifying_params(self) -> Mapping[str, Any]:
        return {**super()._identifying_params, **self._call}

    def generate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        callbacks: Callbacks | list[Callbacks] = None,
        **kwargs: Any,
    ) -> LLMResult:
        """Answers prompts, from LangChain's cache where it has them.

        Args:
            prompts: The prompts.
            stop: Texts that end an answer.
            callbacks: See `BaseLLM.generate`.
            kwargs: ``tags``, ``metadata``, ``run_name`` and ``run_id`` of `BaseLLM.generate`; options of the call.
        """
        return BaseLLM.generate(self._for_call(kwargs), prompts, self._stop_of(stop), callbacks, **kwargs)

    async def agenerate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        callbacks: Callbacks | list[Callbacks] = None,
        **kwargs: Any,
    ) -> LLMResult:
        """Like `generate`, for an event loop.

        Args:
            prompts: See `generate`.
            stop: See `generate`.
            callbacks: See `generate`.
            kwargs: See `generate`.
        """
        return await BaseLLM.agenerate(self._for_call(kwargs), prompts, self._stop_of(stop), callbacks, **kwargs)

    def _for_call(self, kwargs: dict[str, Any]) -> FinchLLM:
        """A copy that a call's options identify too: the cache asks the model who it is, and not what the call says.

        Without it an answer from other documents, or at another temperature, would be taken from the cache.
        """
        of_langchain = ("tags", "metadata", "run_name", "run_id")
        options = {name: value for name, value in kwargs.items() if name not in of_langchain}
        copy = self.model_copy()
        copy._call = self._call_params(options)
        return copy

    def _generate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        # LangChain hands over the first prompt's callbacks only; the others' tokens are none of that run's.
        managers = [run_manager] + [None] * len(prompts)
        return _result(
            [
                list(self._stream(prompt, stop, manager, **kwargs))
                for prompt, manager in zip(prompts, managers, strict=False)
            ]
        )

    async def _agenerate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        managers = [run_manager] + [None] * len(prompts)
        return _result(
            [
                [chunk async for chunk in self._astream(prompt, stop, manager, **kwargs)]
                for prompt, manager in zip(prompts, managers, strict=False)
            ]
        )

    def _stream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[GenerationChunk]:
        return chunks(self._open(prompt, stop, kwargs), run_manager, _piece, _last)

    def _astream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[GenerationChunk]:
        return achunks(lambda: self._open(prompt, stop, kwargs), run_manager, _piece, _last)

    def _open(self, prompt: str, stop: Sequence[str] | None, kwargs: dict[str, Any]) -> AnswerStream:
        passages, options = self._request(stop, kwargs)
        return self.engine.stream_chat(prompt, self._storable(passages, options), **options)


def _piece(delta: str) -> GenerationChunk:
    return GenerationChunk(text=delta)


def _last(stream: AnyStream) -> GenerationChunk:
    """A chunk without text that says where the answer came from."""
    return GenerationChunk(text="", generation_info=outcome_of(stream))


def _result(answers: list[list[GenerationChunk]]) -> LLMResult:
    generations = [
        Generation(text="".join(chunk.text for chunk in chunks), generation_info=chunks[-1].generation_info)
        for chunks in answers
    ]
    return LLMResult(generations=[[generation] for generation in generations], llm_output=_usage(generations))


def _usage(generations: list[Generation]) -> dict[str, Any]:
    """What a call of several prompts took, in the words of LangChain's trackers."""
    reports = [(generation.generation_info or {})["report"] for generation in generations]
    read = sum(report["prefix_tokens"] + report["context_tokens"] + report["question_tokens"] for report in reports)
    new = sum(report["new_tokens"] for report in reports)
    return {
        "model_name": reports[0]["model"] if reports else "",
        "token_usage": {"prompt_tokens": read, "completion_tokens": new, "total_tokens": read + new},
    }
