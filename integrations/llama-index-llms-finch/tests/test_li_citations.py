"""What an answer rests on, as citation blocks of its message: where they come, and that nothing else sees them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from li_fixtures import Says
from li_support import QUESTION, FixedRetriever, finch_llm, nodes, passages, whole_text
from llama_index.core.agent import ReActAgent
from llama_index.core.base.llms.types import DocumentBlock
from llama_index.core.chat_engine import CondensePlusContextChatEngine, SimpleChatEngine, types
from llama_index.core.llms import ChatMessage, ChatResponse, CitationBlock, TextBlock
from llama_index.core.memory import ChatMemoryBuffer, ChatSummaryMemoryBuffer, Memory
from llama_index.llms.finch import FinchLLM, PassagesMessage

from finch_rag.prompts.builder import Prompt
from finch_rag.prompts.parsing import ParsedPrompt

MESSAGE = PassagesMessage(QUESTION, passages())
SAID = "Clara Novak built the bridge. It was opened in 1874."
HOW = pytest.mark.parametrize("how", ["chat", "stream_chat", "achat", "astream_chat"])


def quoting_llm(**settings: Any) -> FinchLLM:
    """An LLM that keeps so much that there is something to quote."""
    return finch_llm(**{"budget": 200, "cutoff": 0, "max_new_tokens": 60, **settings})


def responses(llm: FinchLLM, how: str, messages: Sequence[ChatMessage] = (MESSAGE,), **options: Any) -> Any:
    """The responses of a call, one or a stream's."""

    async def run() -> list[ChatResponse]:
        made = await getattr(llm, how)(messages, **options)
        return [each async for each in made] if isinstance(made, AsyncIterator) else [made]

    if how.startswith("a"):
        return asyncio.run(run())
    made = getattr(llm, how)(messages, **options)
    return [made] if isinstance(made, ChatResponse) else list(made)


def citations(message: ChatMessage) -> list[CitationBlock]:
    """The blocks behind a message's text; there must be such, and nothing else."""
    text, *blocks = message.blocks
    assert isinstance(text, TextBlock)
    assert message.content == text.text
    assert blocks
    cited = [block for block in blocks if isinstance(block, CitationBlock)]
    assert cited == blocks
    return cited


def cited_text(block: CitationBlock) -> str:
    assert isinstance(block.cited_content, TextBlock)
    return block.cited_content.text


# Quotes


@HOW
def test_each_sentence_that_a_statement_rests_on_is_a_block_in_the_last_response(how: str, says: Says) -> None:
    says(SAID)
    *earlier, last = responses(quoting_llm(), how)
    assert last.message.content == SAID
    expected = [
        (quote["text"], source["index"], statement["text"], round(100 * quote["share"]))
        for statement in last.additional_kwargs["statements"]
        for source in statement["sources"]
        for quote in source["quotes"]
    ]
    found = []
    for block in citations(last.message):
        place = block.additional_location_info
        passage = passages()[place["index"]]
        assert passage.text[place["start"] : place["end"]] == cited_text(block)
        assert (block.source, block.title) == (passage.id, passage.title)
        statement = SAID[place["statement_start"] : place["statement_end"]]
        found.append((cited_text(block), place["index"], statement, place["share_percent"]))
    assert found == expected
    assert {statement for _, _, statement, _ in found} == set(SAID.replace(". ", ".\n").split("\n"))
    assert all(0 < share <= 100 for _, _, _, share in found)
    assert len(earlier) > 1 or "stream" not in how
    for piece in earlier:
        assert piece.message.blocks == [TextBlock(text=piece.message.content)]


def test_a_passage_without_id_and_title_is_named_by_its_place() -> None:
    documents = [DocumentBlock(data=passage.text.encode()) for passage in passages()]
    message = ChatMessage(role="user", blocks=[*documents, TextBlock(text=QUESTION)])
    for block in citations(quoting_llm().chat([message]).message):
        assert (block.source, block.title) == (str(block.additional_location_info["index"]), "")
        assert "start" in block.additional_location_info


# No quotes


@HOW
@pytest.mark.parametrize("options", [{"quotes": False}, {"selection": "token", "budget": 60}])
def test_without_quotes_there_is_a_block_for_each_passage_that_was_kept(how: str, options: dict[str, Any]) -> None:
    last = responses(finch_llm(max_new_tokens=2), how, **options)[-1]
    kept = last.additional_kwargs["citations"]
    blocks = citations(last.message)
    assert len(blocks) == len(kept) == last.additional_kwargs["report"]["passages_kept"]
    for block, citation in zip(blocks, kept, strict=True):
        passage = passages()[citation["index"]]
        assert (cited_text(block), block.source, block.title) == (passage.text, passage.id, passage.title)
        told = {name: citation[name] for name in ("index", "kept_tokens", "passage_tokens")}
        assert block.additional_location_info == told


@HOW
def test_an_answer_from_no_passages_is_text_alone(how: str) -> None:
    message = responses(finch_llm(), how, [ChatMessage(content=QUESTION)])[-1].message
    assert message.blocks == [TextBlock(text=message.content)]


@HOW
def test_citation_blocks_can_be_left_out(how: str) -> None:
    cited, bare = (responses(quoting_llm(citation_blocks=asked), how)[-1] for asked in (True, False))
    assert citations(cited.message)
    assert bare.message.blocks == [TextBlock(text=cited.message.content)]
    assert bare.additional_kwargs["statements"] == cited.additional_kwargs["statements"] != []


# The framework


def test_an_answer_survives_json() -> None:
    message = quoting_llm().chat([MESSAGE]).message
    again = ChatMessage.model_validate_json(message.model_dump_json())
    assert again.blocks == message.blocks
    assert citations(again)


@pytest.mark.parametrize("kind", [ChatMemoryBuffer, ChatSummaryMemoryBuffer, Memory])
@pytest.mark.parametrize("streams", [True, False])
def test_a_chat_engine_remembers_an_answer_and_reads_its_text_alone(
    streams: bool, kind: Any, says: Says, requests: list[ParsedPrompt], read: list[Prompt]
) -> None:
    says(SAID)
    memory = kind.from_defaults(token_limit=3000)
    memory.set([PassagesMessage("what is this?", passages()), ChatMessage(role="assistant", content="Notes.")])
    engine = SimpleChatEngine.from_defaults(llm=quoting_llm(), memory=memory)
    for question in (QUESTION, "and when?"):
        answered = "".join(engine.stream_chat(question).response_gen) if streams else str(engine.chat(question))
        assert answered == SAID
    assert [len(request.passages) for request in requests] == [12, 12]
    assert requests[-1].history[-2:] == [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": SAID},
    ]
    for passage in passages():  # once, as a passage; what was quoted of it is not read again
        assert whole_text(read[-1]).count(passage.text) == 1
    assert streams or citations(engine.chat_history[-1])
    if isinstance(memory, Memory):
        store: Any = memory.sql_store
        asyncio.run(store._async_engine.dispose())  # else the connection is found open when it is collected


def test_a_chat_engine_over_nodes_remembers_text_alone(
    says: Says, requests: list[ParsedPrompt], read: list[Prompt]
) -> None:
    says(SAID)
    engine = CondensePlusContextChatEngine.from_defaults(FixedRetriever(nodes()), llm=quoting_llm())
    for question in (QUESTION, "and when?"):
        assert str(engine.chat(question)) == SAID
    assert len(requests) == 3  # the second question is condensed
    assert requests[-1].history == [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": SAID}]
    for passage in requests[-1].passages:
        assert whole_text(read[-1]).count(passage.text) == 1


def test_quotes_take_no_room_in_a_memory() -> None:
    message = quoting_llm().chat([MESSAGE]).message
    assert citations(message)
    bare = ChatMessage(role="assistant", content=message.content)
    assert Memory.from_defaults()._estimate_token_count(message) == Memory.from_defaults()._estimate_token_count(bare)


def test_setting_the_text_of_an_answer_leaves_its_citations() -> None:
    message = quoting_llm().chat([MESSAGE]).message
    before = citations(message)
    message.content = "Nobody."
    assert message.content == "Nobody."
    assert citations(message) == before


def test_a_chat_engine_that_sets_the_text_of_a_streamed_answer_goes_on(
    says: Says, monkeypatch: pytest.MonkeyPatch
) -> None:
    def as_before_0_14_24(message: ChatMessage, content: str) -> None:
        message.content = content

    monkeypatch.setattr(types, "_set_message_content", as_before_0_14_24, raising=False)
    says(SAID)
    engine = SimpleChatEngine.from_defaults(llm=quoting_llm(), chat_history=[MESSAGE])
    for question in (QUESTION, "and when?"):
        assert "".join(engine.stream_chat(question).response_gen) == SAID
    assert citations(engine.chat_history[-1])


def test_an_agent_hands_the_citations_on(says: Says) -> None:
    says(f"Thought: I can answer without using any more tools.\nAnswer: {SAID}")

    async def run() -> Any:
        agent = ReActAgent(tools=[], llm=quoting_llm(max_new_tokens=120))
        return await agent.run("and when?", chat_history=[MESSAGE])

    output = asyncio.run(run())
    assert str(output) == SAID
    assert citations(output.response)
