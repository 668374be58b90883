from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_finch import ChatFinch, FinchLLM
from lc_support import QUESTION, SETTINGS, Listener, one_line

from finch_rag import FinchError, InputError, ModelError, WindowError
from finch_rag.cache import CompressedCache
from finch_rag.decode import Decoder

BOTH = pytest.mark.parametrize("kind", [ChatFinch, FinchLLM])

CALLS: list[tuple[dict[str, Any], type[FinchError], str]] = [
    ({"documents": []}, InputError, "there are no documents: the retriever found nothing"),
    ({"documents": [Document("a"), Document("")]}, InputError, "document 1 has no text"),
    ({"documents": "a text"}, InputError, "documents is str: pass a list"),
    ({"budget": 0}, InputError, "budget is 0: the least is 1 token"),
    ({"budget": "many"}, InputError, "budget is 'many': input should be a valid integer"),
    ({"budget": 10**6}, WindowError, "budget 1000000 is too large"),
    ({"chunk_size": 10**6}, WindowError, "chunk_size 1000000 is too large"),
    ({"max_tokens": 10**6}, WindowError, "the question takes"),
    ({"max_tokens": 0}, InputError, "max_new_tokens is 0: the least is 1"),
    ({"temperature": -1}, InputError, "temperature is -1"),
    ({"temperature": "hot"}, InputError, "temperature is 'hot': input should be a valid number"),
    ({"selection": "word"}, InputError, "selection is 'word': input should be 'passage' or 'token'"),
    ({"stop": [""]}, InputError, "a stop string is empty"),
    ({"top_p": 0}, InputError, "top_p is 0"),
    ({"documents": ["a text"] * 9, "max_context_tokens": 10}, InputError, "the passages have"),
    ({"bugdet": 5}, InputError, "unknown option bugdet: use documents, budget"),
    ({"model": "other"}, InputError, "unknown option model: use documents, budget"),
    ({"max_tokens": 5, "max_new_tokens": 5}, InputError, "max_new_tokens and max_tokens are the same setting"),
]


async def each_way(asker: Any, asked: Any, error: type[FinchError], said: str, **options: Any) -> None:
    """Asks in each way that LangChain has; each must raise the same, in one line."""
    with pytest.raises(error) as invoked:
        asker.invoke(asked, **options)
    with pytest.raises(error) as streamed:
        list(asker.stream(asked, **options))
    with pytest.raises(error) as awaited:
        await asker.ainvoke(asked, **options)
    with pytest.raises(error) as astreamed:
        [piece async for piece in asker.astream(asked, **options)]
    with pytest.raises(error) as batched:
        asker.batch([asked], **options)
    for raised in (invoked, streamed, awaited, astreamed, batched):
        assert one_line(raised).startswith(said)


@BOTH
@pytest.mark.parametrize(("options", "error", "said"), CALLS, ids=[said for *_, said in CALLS])
async def test_bad_options_reach_the_caller_in_one_line(
    kind: Any, folder: str, options: dict[str, Any], error: type[FinchError], said: str
) -> None:
    await each_way(kind(model=folder, **{**SETTINGS, "max_tokens": None}), QUESTION, error, said, **options)


@BOTH
async def test_an_empty_question_is_told(kind: Any, folder: str) -> None:
    model = kind(model=folder, **SETTINGS)
    await each_way(model, "  ", InputError, "the question is empty: ask one", documents=["a text"])


async def test_a_tool_message_is_told(chat: ChatFinch) -> None:
    messages = [HumanMessage("hello"), ToolMessage("1874", tool_call_id="1")]
    await each_way(chat, messages, InputError, "message 1 is a tool message, which Finch cannot read")


@BOTH
async def test_an_unknown_model_is_told_at_the_first_call(kind: Any) -> None:
    model = kind(model="no/such-model")
    await each_way(model, QUESTION, ModelError, "cannot load the model 'no/such-model'")
    with pytest.raises(ModelError):
        model.get_num_tokens("text")


def test_tools_are_refused_in_one_line(chat: ChatFinch) -> None:
    with pytest.raises(NotImplementedError, match="ChatFinch calls no tools") as raised:
        chat.bind_tools([])
    one_line(raised)


def test_unknown_arguments_of_structured_output_are_told(chat: ChatFinch) -> None:
    with pytest.raises(InputError, match="unknown argument tools") as raised:
        chat.with_structured_output({"title": "T", "type": "object", "properties": {}}, tools=[])
    one_line(raised)


@BOTH
def test_errors_are_told_to_callbacks(kind: Any, folder: str) -> None:
    listener = Listener()
    with pytest.raises(InputError):
        kind(model=folder).invoke(QUESTION, budget=0, config={"callbacks": [listener]})
    assert [type(error) for error in listener.errors] == [InputError]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One item a token that is generated."""
    made: list[int] = []
    logits = Decoder._logits

    def counted(decoder: Decoder, token_ids: list[int]) -> Any:
        made.append(len(made))
        return logits(decoder, token_ids)

    monkeypatch.setattr(Decoder, "_logits", counted)
    return made


def long_answer(kind: Any, folder: str, documents: list[Document]) -> Any:
    return kind(model=folder, **{**SETTINGS, "max_tokens": 2000}).bind(documents=documents)


async def freed(caches: weakref.WeakSet[CompressedCache]) -> bool:
    for _ in range(100):
        gc.collect()
        if not caches:
            return True
        await asyncio.sleep(0.02)
    return False


@BOTH
async def test_a_cancelled_stream_ends_the_generation(
    kind: Any,
    folder: str,
    documents: list[Document],
    steps: list[int],
    caches: weakref.WeakSet[CompressedCache],
) -> None:
    pieces: list[Any] = []

    async def consume() -> None:
        async for piece in long_answer(kind, folder, documents).astream(QUESTION):
            pieces.append(piece)

    task = asyncio.create_task(consume())
    while len(pieces) < 3:
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await freed(caches)
    made = len(steps)
    await asyncio.sleep(0.1)
    assert len(steps) == made < 1000


@BOTH
async def test_a_cancelled_call_ends_the_generation(
    kind: Any,
    folder: str,
    documents: list[Document],
    steps: list[int],
    caches: weakref.WeakSet[CompressedCache],
) -> None:
    task = asyncio.create_task(long_answer(kind, folder, documents).ainvoke(QUESTION))
    while len(steps) < 3:
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await freed(caches)
    made = len(steps)
    await asyncio.sleep(0.1)
    assert len(steps) == made < 1000


@BOTH
async def test_a_stream_that_is_left_ends_the_generation(
    kind: Any,
    folder: str,
    documents: list[Document],
    steps: list[int],
    caches: weakref.WeakSet[CompressedCache],
) -> None:
    async for _ in long_answer(kind, folder, documents).astream(QUESTION):
        break
    assert await freed(caches)
    for _ in long_answer(kind, folder, documents).stream(QUESTION):
        break
    assert await freed(caches)
    assert len(steps) < 100


@BOTH
async def test_a_call_that_is_cancelled_while_it_reads_stops_reading(
    kind: Any, folder: str, documents: list[Document], caches: weakref.WeakSet[CompressedCache]
) -> None:
    read: list[int] = []
    reading, go_on = threading.Event(), threading.Event()

    def progress(stage: str, done: int, total: int) -> None:
        read.append(done)
        reading.set()
        go_on.wait(10)

    model = kind(model=folder, **SETTINGS).bind(documents=documents, on_progress=progress)
    task = asyncio.create_task(model.ainvoke(QUESTION))
    await asyncio.to_thread(reading.wait, 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    go_on.set()
    assert await freed(caches)
    assert len(read) == 1
