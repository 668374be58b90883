"""Objects of pydantic classes: JSON that is forced where llguidance is installed."""

from __future__ import annotations

from typing import Any, Literal

import llama_index.llms.finch.prompting
import pytest
from li_support import QUESTION, finch_llm
from llama_index.core import PromptTemplate, __version__
from llama_index.core.llms import ChatMessage
from llama_index.llms.finch import FinchLLM
from packaging.version import Version
from pydantic import BaseModel

from finch_rag import Finch, InputError

PROMPT = PromptTemplate("{question}")


class Lamp(BaseModel):
    """A lamp; everything in it ends by itself, so that random weights come to an end, too."""

    lit: bool
    colours: tuple[Literal["red", "green"], Literal["red", "green"]]


@pytest.fixture
def llm() -> FinchLLM:
    return finch_llm(max_new_tokens=200)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The options of each call of an engine."""
    calls: list[dict[str, Any]] = []
    stream = Finch.stream_chat

    def recorded(finch: Finch, messages: Any, passages: Any = (), **options: Any) -> Any:
        calls.append(options)
        return stream(finch, messages, passages, **options)

    monkeypatch.setattr(Finch, "stream_chat", recorded)
    return calls


async def test_random_weights_answer_by_a_class_in_every_way(llm: FinchLLM) -> None:
    expected = llm.structured_predict(Lamp, PROMPT, question=QUESTION)
    assert isinstance(expected, Lamp)
    assert await llm.astructured_predict(Lamp, PROMPT, question=QUESTION) == expected
    structured = llm.as_structured_llm(Lamp)
    assert isinstance(structured.chat([ChatMessage(QUESTION)]).raw, Lamp)
    assert isinstance((await structured.achat([ChatMessage(QUESTION)])).raw, Lamp)
    flat = finch_llm(max_new_tokens=200, is_chat_model=False)
    assert isinstance(flat.structured_predict(Lamp, PROMPT, question=QUESTION), Lamp)


async def test_an_object_comes_in_pieces(llm: FinchLLM) -> None:
    if Version(__version__) < Version("0.14.22"):
        pytest.skip(f"llama-index-core {__version__} streams objects of models with tools only, 0.14.22 of others too")
    expected = llm.structured_predict(Lamp, PROMPT, question=QUESTION)
    streamed: list[Any] = list(llm.stream_structured_predict(Lamp, PROMPT, question=QUESTION))
    assert Lamp.model_validate(streamed[-1].model_dump()) == expected
    pieces = await llm.astream_structured_predict(Lamp, PROMPT, question=QUESTION)
    assert [piece async for piece in pieces][-1].model_dump() == streamed[-1].model_dump()


def test_options_of_the_call_come_first(llm: FinchLLM, seen: list[dict[str, Any]]) -> None:
    llm.structured_predict(Lamp, PROMPT, {"temperature": 2.0, "seed": 1}, question=QUESTION)
    assert (seen[-1]["temperature"], seen[-1]["seed"]) == (2.0, 1)
    assert set(seen[-1]["json_schema"]["properties"]) == {"lit", "colours"}
    with pytest.raises(ValueError, match="json"):
        llm.structured_predict(Lamp, PROMPT, {"json_schema": None, "max_tokens": 8}, question=QUESTION)
    assert "json_schema" not in seen[-1]


def test_a_call_may_name_a_json_schema(llm: FinchLLM) -> None:
    schema = {"enum": ["red", "green"]}
    assert llm.complete(QUESTION, json_schema=schema).text in ('"red"', '"green"')
    assert llm.chat([ChatMessage(QUESTION)], json_schema=schema).message.content in ('"red"', '"green"')
    with pytest.raises(InputError, match="json_schema"):
        llm.complete(QUESTION, json_schema="a schema")


def test_without_the_extra_json_is_only_asked_for(
    llm: FinchLLM, seen: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama_index.llms.finch.prompting, "can_force_json", lambda: False)
    with pytest.raises(ValueError, match="json"):
        llm.structured_predict(Lamp, PROMPT, {"max_tokens": 8}, question=QUESTION)
    assert "json_schema" not in seen[-1]
