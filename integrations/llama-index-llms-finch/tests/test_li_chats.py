"""Agents, and chats without documents: tools, a long system prompt and a long history are read whole."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from li_fixtures import Says
from li_support import QUESTION, FixedRetriever, engine, finch_llm, listening, nodes, reports, whole_text
from llama_index.core.agent import ReActAgent, ReActChatFormatter
from llama_index.core.chat_engine import SimpleChatEngine
from llama_index.core.chat_engine.types import AgentChatResponse
from llama_index.core.llms import ChatMessage
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.tools import FunctionTool

from finch_rag.prompts.builder import Prompt
from finch_rag.prompts.parsing import ParsedPrompt
from tests.small import chat_tokenizer, texts

CHAT_OR_NOT = pytest.mark.parametrize("is_chat_model", [True, False])


def tool(n: int, called: list[int]) -> FunctionTool:
    def look_up(year: int) -> str:
        called.append(n)
        return f"tool {n} knows nothing of {year}"

    return FunctionTool.from_defaults(
        look_up, name=f"archive_{n}", description=f"Looks up what archive number {n} of the town holds for a year."
    )


def test_an_agent_with_seven_tools_is_read_whole_and_calls_one(
    says: Says, requests: list[ParsedPrompt], read: list[Prompt]
) -> None:
    says(
        'Thought: I need a tool.\nAction: archive_5\nAction Input: {"year": 1874}',
        "Thought: I can answer without using any more tools.\nAnswer: Clara Novak",
    )
    called: list[int] = []
    tools: list[Any] = [tool(n, called) for n in range(7)]

    async def run() -> Any:
        return await ReActAgent(tools=tools, llm=finch_llm(max_new_tokens=100)).run(QUESTION)

    assert str(asyncio.run(run())) == "Clara Novak"
    assert called == [5]
    assert [(request.parse_mode, request.passages) for request in requests] == 2 * [("whole", [])]
    assert requests[0].question == QUESTION
    header = str(ReActChatFormatter().format(tools, [])[0].content)
    assert all(f"archive number {n} of the town" in header for n in range(7))
    assert requests[0].system_prompt == header.strip()
    assert header.strip() in whole_text(read[0])
    assert "Observation: tool 5 knows nothing of 1874" in whole_text(read[1])


def of_tokens(count: int) -> str:
    """A text of that many tokens."""
    words = " ".join(texts(500))
    encoded = chat_tokenizer()(words)["input_ids"][:count]
    text = str(chat_tokenizer().decode(encoded))
    assert len(chat_tokenizer()(text)["input_ids"]) == count
    return text


@CHAT_OR_NOT
@pytest.mark.parametrize("chatting", [True, False])
def test_a_long_system_prompt_is_kept_whole(
    chatting: bool, is_chat_model: bool, requests: list[ParsedPrompt], read: list[Prompt]
) -> None:
    system_prompt = of_tokens(1374)
    llm = finch_llm(is_chat_model=is_chat_model, system_prompt=system_prompt)
    with listening() as events:
        if chatting:
            assert str(SimpleChatEngine.from_defaults(llm=llm).chat(QUESTION))
        else:
            assert str(RetrieverQueryEngine.from_args(FixedRetriever(nodes(40)), llm=llm).query(QUESTION))
    (report,) = reports(events)
    assert requests[0].system_prompt == system_prompt.strip()
    assert requests[0].question == QUESTION
    assert system_prompt.strip() in str(chat_tokenizer().decode(read[0].prefix or read[0].question))
    assert report["parse_mode"] == ("whole" if chatting else "llama-index/text-qa")
    assert report["prefix_tokens"] + report["question_tokens"] > 1374
    assert (report["kept_tokens"] < report["context_tokens"]) == (not chatting)  # only of the nodes


@CHAT_OR_NOT
def test_a_chat_of_five_thousand_tokens_is_read_whole(
    is_chat_model: bool, requests: list[ParsedPrompt], read: list[Prompt]
) -> None:
    turns = texts(200, longest=40)[:130]
    history = [ChatMessage(role="user" if n % 2 == 0 else "assistant", content=text) for n, text in enumerate(turns)]
    made = SimpleChatEngine.from_defaults(llm=finch_llm(is_chat_model=is_chat_model), chat_history=history)
    with listening() as events:
        response = made.chat(QUESTION)
    assert isinstance(response, AgentChatResponse)
    assert response.response
    assert len(made.chat_history) == 132
    (report,) = reports(events)
    assert (report["parse_mode"], report["context_tokens"], report["notes"]) == ("whole", 0, [])
    assert requests[0].question == QUESTION
    assert [message["content"] for message in requests[0].history] == turns
    assert all(text in whole_text(read[0]) for text in turns)
    assert 5000 < report["prefix_tokens"] + report["question_tokens"] < engine().window
