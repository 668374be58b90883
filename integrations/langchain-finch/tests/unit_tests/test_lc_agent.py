"""The README's recipe: an agent whose middleware retrieves, and passes documents to the model."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import AgentMiddleware, ModelRequest, ModelResponse, wrap_model_call
from langchain_core.documents import Document
from langchain_core.messages import AIMessage
from langchain_core.tools import tool
from langchain_finch import ChatFinch
from lc_support import OTHER_QUESTION, QUESTION, Fixed, Listener, annotated


@pytest.fixture
def retriever(documents: list[Document]) -> Fixed:
    return Fixed(found=documents)


def recipe(retriever: Fixed) -> Any:
    @wrap_model_call
    def with_documents(request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], ModelResponse[Any]]) -> Any:
        documents = retriever.invoke(request.messages[-1].text)
        return handler(request.override(model_settings={**request.model_settings, "documents": documents}))

    return with_documents


def test_documents_reach_the_model_and_citations_come_back(
    chat: ChatFinch, retriever: Fixed, documents: list[Document]
) -> None:
    listener = Listener()
    agent: Any = create_agent(chat, tools=[], middleware=[recipe(retriever)])
    state = agent.invoke({"messages": [("user", QUESTION)]}, config={"callbacks": [listener]})
    answer = state["messages"][-1]
    assert isinstance(answer, AIMessage)
    assert answer.response_metadata["report"]["passages"] == len(documents)
    assert annotated(answer)[0]["extras"]["passage_id"].startswith("doc-")
    assert answer.content == chat.invoke(QUESTION, documents=documents).content
    assert listener.calls == 1


def test_a_second_turn_reads_the_first(chat: ChatFinch, retriever: Fixed, documents: list[Document]) -> None:
    agent: Any = create_agent(chat, tools=[], middleware=[recipe(retriever)], system_prompt="Be brief.")
    state = agent.invoke({"messages": [("user", QUESTION)]})
    state = agent.invoke({"messages": [*state["messages"], ("user", OTHER_QUESTION)]})
    conversation = [("system", "Be brief."), *state["messages"][:-1]]
    assert state["messages"][-1].content == chat.invoke(conversation, documents=documents).content


def test_an_agent_streams_the_models_pieces(chat: ChatFinch, retriever: Fixed) -> None:
    agent: Any = create_agent(chat, tools=[], middleware=[recipe(retriever)])
    streamed = agent.stream({"messages": [("user", QUESTION)]}, stream_mode="messages")
    pieces = [str(chunk.content) for chunk, _ in streamed]
    assert len(pieces) > 2
    whole = agent.invoke({"messages": [("user", QUESTION)]})["messages"][-1]
    assert "".join(pieces) == whole.content


async def test_the_recipe_for_an_event_loop(chat: ChatFinch, retriever: Fixed, documents: list[Document]) -> None:
    @wrap_model_call
    async def with_documents(
        request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], Awaitable[ModelResponse[Any]]]
    ) -> Any:
        found = await retriever.ainvoke(request.messages[-1].text)
        return await handler(request.override(model_settings={**request.model_settings, "documents": found}))

    middleware: AgentMiddleware[Any, Any] = with_documents
    agent: Any = create_agent(chat, tools=[], middleware=[middleware])
    state = await agent.ainvoke({"messages": [("user", QUESTION)]})
    assert state["messages"][-1].response_metadata["report"]["passages"] == len(documents)


def test_an_agent_with_tools_is_refused_in_one_line(chat: ChatFinch) -> None:
    @tool
    def weather(place: str) -> str:
        """The weather at a place."""
        return place

    agent: Any = create_agent(chat, tools=[weather])
    with pytest.raises(NotImplementedError, match="ChatFinch calls no tools"):
        agent.invoke({"messages": [("user", QUESTION)]})
