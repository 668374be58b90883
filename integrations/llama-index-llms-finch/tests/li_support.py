"""What the tests of the LlamaIndex package share: an engine, nodes, a retriever, listeners."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events.llm import (
    LLMChatEndEvent,
    LLMChatStartEvent,
    LLMCompletionEndEvent,
    LLMCompletionStartEvent,
)
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle, TextNode
from llama_index.llms.finch import FinchLLM
from llama_index_instrumentation import get_dispatcher
from llama_index_instrumentation.base import BaseEvent

from finch_rag import Finch, Passage
from finch_rag.prompts.builder import Prompt
from tests.small import chat_tokenizer, small_model, texts

QUESTION = "who built the bridge?"
OTHER_QUESTION = "when was the lighthouse lit?"
STARTS = (LLMChatStartEvent, LLMCompletionStartEvent)
ENDS = (LLMChatEndEvent, LLMCompletionEndEvent)


def new_engine(**settings: Any) -> Finch:
    """An engine on a small model whose window has room for the long instructions of LlamaIndex's prompts."""
    chosen = {"budget": 60, "chunk_size": 512, "heads": [(0, 1), (1, 2)], "max_new_tokens": 8, **settings}
    return Finch(small_model(max_position_embeddings=8192), chat_tokenizer(), name="small", **chosen)


@cache
def engine() -> Finch:
    """One of them for all tests, which must not change it."""
    return new_engine()


def finch_llm(**settings: Any) -> FinchLLM:
    """An LLM on the shared engine that answers in eight tokens."""
    return FinchLLM(**{"engine": engine(), "max_new_tokens": 8, **settings})


def passages(count: int = 12) -> list[Passage]:
    return [Passage(text, id=f"p{n}", title=f"Notes {n}") for n, text in enumerate(texts(count))]


def nodes(count: int = 12) -> list[NodeWithScore]:
    """Nodes with metadata, as a retriever finds them: the best first."""
    return [
        NodeWithScore(
            node=TextNode(text=text, id_=f"n{n}", metadata={"file_name": f"notes-{n}.md", "page": n}), score=1 / (n + 1)
        )
        for n, text in enumerate(texts(count))
    ]


def shown(found: Sequence[NodeWithScore]) -> list[str]:
    """The texts that nodes show to LLMs."""
    return [node.node.get_content(MetadataMode.LLM) for node in found]


class FixedRetriever(BaseRetriever):
    """Finds the same nodes whatever is asked."""

    def __init__(self, found: Sequence[NodeWithScore]) -> None:
        self._found = list(found)
        super().__init__()

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return list(self._found)


@contextmanager
def listening() -> Iterator[list[Any]]:
    """The instrumentation events of a block."""
    seen: list[BaseEvent] = []

    class Listener(BaseEventHandler):
        def handle(self, event: BaseEvent, **_: Any) -> None:
            seen.append(event)

    dispatcher, listener = get_dispatcher(), Listener()
    dispatcher.add_event_handler(listener)
    try:
        yield seen
    finally:
        dispatcher.event_handlers.remove(listener)


def calls(events: Sequence[Any]) -> int:
    """LLM calls among instrumentation events."""
    return sum(type(event) in STARTS for event in events)


def reports(events: Sequence[Any]) -> list[dict[str, Any]]:
    """The reports of the LLM calls that came to their end."""
    return [event.response.raw["report"] for event in events if type(event) in ENDS]


@contextmanager
def on_each_pass(finch: Finch, hook: Callable[[], None]) -> Iterator[None]:
    """Calls ``hook`` before each forward pass of the engine's model."""
    handle = finch.model.model.register_forward_pre_hook(lambda *_: hook())
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def counted_passes(finch: Finch) -> Iterator[list[None]]:
    """A list that grows by one with each forward pass."""
    passes: list[None] = []
    with on_each_pass(finch, lambda: passes.append(None)):
        yield passes


async def cancelled_during(finch: Finch, at_pass: int, work: Callable[[], Coroutine[Any, Any, Any]]) -> int:
    """Cancels ``work`` while its forward pass number ``at_pass`` runs; forward passes until all threads are done."""
    reached, cancelled = threading.Event(), threading.Event()
    passes: list[None] = []

    def hook() -> None:
        passes.append(None)
        if len(passes) == at_pass:
            reached.set()
            cancelled.wait(10)

    with on_each_pass(finch, hook):
        task = asyncio.create_task(work())
        await asyncio.to_thread(reached.wait, 10)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        was_cancelled = task.cancelled()
        cancelled.set()
        await asyncio.get_running_loop().shutdown_default_executor()
    assert was_cancelled
    return len(passes)


def whole_text(prompt: Prompt) -> str:
    """A prompt as the model reads it, with its control tokens."""
    ids = [*prompt.prefix, *(token for passage in prompt.passages for token in passage), *prompt.question, *prompt.tail]
    return str(chat_tokenizer().decode(ids, skip_special_tokens=False))


def wrapped(prompt: str) -> str:
    """A ``completion_to_prompt`` with control tokens."""
    return f"<|im_start|>user\nPlease: {prompt}<|im_end|>\n<|im_start|>assistant\n"
