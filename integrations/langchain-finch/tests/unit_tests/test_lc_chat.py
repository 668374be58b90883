from __future__ import annotations

import json
from typing import Any

import langchain_core
import pytest
from langchain_core.documents import Document
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.messages.content import create_plaintext_block, create_text_block
from langchain_core.output_parsers import StrOutputParser
from langchain_core.runnables import ConfigurableField
from langchain_finch import ChatFinch, FinchLLM
from langchain_finch._convert import passages_of
from lc_support import OTHER_QUESTION, QUESTION, SETTINGS, Listener, annotated, ids, kept
from packaging.version import Version

from finch_rag import Finch
from finch_rag.answer import Answer

OPTIONS: dict[str, Any] = {"budget": 60, "chunk_size": 64, "max_new_tokens": 8}


def joined(chunks: list[AIMessageChunk]) -> AIMessageChunk:
    first, *others = chunks
    for chunk in others:
        first = first + chunk
    return first


def ask(shared: Finch, question: str, documents: list[Document], **options: Any) -> Answer:
    return shared.ask(question, passages_of(documents), **{**OPTIONS, **options})


def test_an_answer_tells_where_it_comes_from(chat: ChatFinch, documents: list[Document], shared: Finch) -> None:
    message = chat.bind(documents=documents).invoke(QUESTION)
    expected = ask(shared, QUESTION, documents)
    assert message.content == expected.text
    found = message.response_metadata
    assert found["report"]["kept_tokens"] == expected.report.kept_tokens <= 60
    assert (found["parse_mode"], found["model_provider"], found["model_name"]) == ("apart", "finch", shared.name)
    assert ids(found["citations"]) == [citation.passage_id for citation in expected.citations]
    assert json.loads(json.dumps(found)) == found


def test_usage_counts_what_was_read_kept_and_made(chat: ChatFinch, documents: list[Document]) -> None:
    message = chat.bind(documents=documents).invoke(QUESTION)
    report = message.response_metadata["report"]
    read = report["prefix_tokens"] + report["context_tokens"] + report["question_tokens"]
    assert message.usage_metadata == {
        "input_tokens": read,
        "output_tokens": 8,
        "total_tokens": read + 8,
        "input_token_details": {"kept": report["kept_tokens"]},
    }
    assert report["context_tokens"] > 5 * report["kept_tokens"]


def test_content_is_text_and_blocks_have_citations(chat: ChatFinch, documents: list[Document]) -> None:
    message = chat.bind(documents=documents).invoke(QUESTION)
    [block] = message.content_blocks
    assert message.content_blocks == [block]  # the same each time
    assert block["type"] == "text"
    assert block["text"] == message.content == StrOutputParser().invoke(message)
    first, *_ = annotated(message)
    cited = documents[message.response_metadata["citations"][0]["index"]]
    assert first["type"] == "citation"
    assert (first["title"], first["url"]) == (cited.metadata["title"], cited.metadata["source"])
    assert (first["start_index"], first["end_index"]) == (0, len(message.text))
    assert first["extras"]["passage_id"] == cited.id
    assert first["extras"]["kept_tokens"] == message.response_metadata["citations"][0]["kept_tokens"]


def test_quotes_are_annotations_of_the_sentences_that_rest_on_them(chat: ChatFinch, documents: list[Document]) -> None:
    message = chat.bind(documents=documents, reread=True, budget=120).invoke(QUESTION)
    statements = message.response_metadata["statements"]
    expected = [
        (statement["start"], statement["end"], source["index"], quote["text"], quote["start"], quote["end"])
        for statement in statements
        for source in statement["sources"]
        for quote in source["quotes"]
    ]
    assert expected
    annotations = annotated(message)[len(message.response_metadata["citations"]) :]
    found = []
    for annotation in annotations:
        extras = annotation["extras"]
        places = (extras["quote_start"], extras["quote_end"])
        found.append(
            (annotation["start_index"], annotation["end_index"], extras["index"], annotation["cited_text"], *places)
        )
        document = documents[extras["index"]]
        assert document.page_content[slice(*places)] == annotation["cited_text"]
        assert (annotation["title"], extras["passage_id"]) == (document.metadata["title"], document.id)
    assert found == expected
    assert all(message.text[each["start"] : each["end"]] == each["text"] for each in statements)
    without = chat.bind(documents=documents, reread=True, budget=120, quotes=False).invoke(QUESTION)
    assert without.response_metadata["statements"] == []
    assert len(annotated(without)) == len(without.response_metadata["citations"])


def test_an_answer_without_documents_has_no_annotations(chat: ChatFinch) -> None:
    message = chat.invoke("Hello")
    assert message.content_blocks == [{"type": "text", "text": message.content}]
    assert message.response_metadata["citations"] == []
    assert message.response_metadata["parse_mode"] == "whole"


def test_output_version_v1_puts_the_blocks_into_the_content(folder: str, documents: list[Document]) -> None:
    chat = ChatFinch(model=folder, output_version="v1", **SETTINGS)
    message = chat.bind(documents=documents).invoke(QUESTION)
    plain = ChatFinch(model=folder, **SETTINGS).bind(documents=documents).invoke(QUESTION)
    assert message.content == plain.content_blocks
    assert message.text == plain.content
    chunks: list[Any] = list(chat.bind(documents=documents).stream(QUESTION))
    [block] = joined(chunks).content_blocks
    assert block == {**plain.content_blocks[0], "index": 0}
    assert StrOutputParser().invoke(message) == plain.content


def test_streaming_adds_up_to_the_whole_message(chat: ChatFinch, documents: list[Document]) -> None:
    bound = chat.bind(documents=documents)
    whole: Any = bound.invoke(QUESTION)
    chunks: list[Any] = list(bound.stream(QUESTION))
    full = joined(chunks)
    assert full.content == whole.content
    assert full.usage_metadata == whole.usage_metadata
    assert [chunk.usage_metadata is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].chunk_position == "last"
    assert full.content_blocks == whole.content_blocks
    times = ("prefill_seconds", "decode_seconds", "quote_seconds")
    for metadata in (full.response_metadata, whole.response_metadata):
        for name in times:
            metadata["report"].pop(name)
    assert full.response_metadata == whole.response_metadata


async def test_async_calls_give_the_same(chat: ChatFinch, documents: list[Document]) -> None:
    bound = chat.bind(documents=documents)
    whole = bound.invoke(QUESTION)
    awaited = await bound.ainvoke(QUESTION)
    assert (awaited.content, awaited.content_blocks) == (whole.content, whole.content_blocks)
    chunks: list[Any] = [chunk async for chunk in bound.astream(QUESTION)]
    full = joined(chunks)
    assert (full.content, full.usage_metadata) == (whole.content, whole.usage_metadata)
    both = await bound.abatch([QUESTION, OTHER_QUESTION])
    assert both[0].content == whole.content


def test_batch_answers_each_question(chat: ChatFinch, documents: list[Document], shared: Finch) -> None:
    questions: list[Any] = [QUESTION, OTHER_QUESTION, "what is a canal?"]
    answers = chat.bind(documents=documents).batch(questions)
    assert [a.content for a in answers] == [ask(shared, q, documents).text for q in questions]


def test_invoke_tells_each_piece(chat: ChatFinch) -> None:
    listener = Listener()
    message = chat.invoke("Hello", config={"callbacks": [listener]})
    [tokens] = listener.tokens.values()
    assert "".join(tokens) == message.content
    assert len(tokens) > 1
    assert listener.chunks[0].message.content == tokens[0]


def test_stream_tells_each_piece_once(chat: ChatFinch) -> None:
    listener = Listener()
    chunks = list(chat.stream("Hello", config={"callbacks": [listener]}))
    assert "".join(next(iter(listener.tokens.values()))) == "".join(str(chunk.content) for chunk in chunks)


def test_the_conversation_is_read_in_its_order(chat: ChatFinch, shared: Finch, documents: list[Document]) -> None:
    messages: list[BaseMessage] = [
        SystemMessage("Be brief."),
        HumanMessage("Where is the harbour?"),
        AIMessage("In Elmsworth."),
        HumanMessage(QUESTION),
    ]
    history = [
        {"role": "user", "content": "Where is the harbour?"},
        {"role": "assistant", "content": "In Elmsworth."},
    ]
    expected = ask(shared, QUESTION, documents, history=history, system_prompt="Be brief.")
    assert chat.bind(documents=documents).invoke(messages).content == expected.text
    assert ask(shared, QUESTION, documents).text != expected.text


def test_plain_text_blocks_are_passages(chat: ChatFinch, documents: list[Document]) -> None:
    blocks = [
        create_plaintext_block(document.page_content, title=document.metadata["title"], url=document.metadata["source"])
        for document in documents
    ]
    message = chat.invoke([HumanMessage(content_blocks=[*blocks, create_text_block(QUESTION)])])
    bound = chat.bind(documents=documents).invoke(QUESTION)
    assert message.content == bound.content
    cited = message.response_metadata["citations"]
    assert ids(cited) == [blocks[citation["index"]]["id"] for citation in cited]
    assert [citation["source"] for citation in cited] == [c["source"] for c in bound.response_metadata["citations"]]


def test_passages_of_an_earlier_turn_are_read_again(chat: ChatFinch, documents: list[Document]) -> None:
    blocks = [create_plaintext_block(document.page_content) for document in documents]
    messages = [
        HumanMessage(content_blocks=[*blocks, create_text_block("Where is the harbour?")]),
        AIMessage("In Elmsworth."),
        HumanMessage(QUESTION),
    ]
    report = chat.bind(documents=documents[:2]).invoke(messages).response_metadata["report"]
    assert report["passages"] == len(documents) + 2


def test_what_a_tool_found_is_read_and_cited(chat: ChatFinch, documents: list[Document]) -> None:
    call = AIMessage("", tool_calls=[{"name": "search", "args": {"query": "bridge"}, "id": "c1"}])
    expected = chat.invoke(QUESTION, documents=documents)
    for result in (
        ToolMessage("the documents", artifact=documents, tool_call_id="c1"),
        ToolMessage(content="one text of all documents", artifact=documents, tool_call_id="c1", name="search"),
    ):
        message = chat.invoke([HumanMessage(QUESTION), call, result])
        assert message.content == expected.content
        assert message.response_metadata["citations"] == expected.response_metadata["citations"]
    said: Any = chat.invoke([HumanMessage(QUESTION), call, ToolMessage("Clara Novak.", tool_call_id="c1")])
    assert ids(said.response_metadata["citations"]) == ["c1"]


def test_a_call_without_documents_is_noted(chat: ChatFinch, llm: FinchLLM, documents: list[Document]) -> None:
    note = "no documents were given: answered without any"

    def notes(model: ChatFinch | FinchLLM, asked: Any, **options: Any) -> Any:
        if isinstance(model, ChatFinch):
            return model.invoke(asked, **options).response_metadata["report"]["notes"]
        [[generation]] = model.generate([asked], **options).generations
        return (generation.generation_info or {})["report"]["notes"]

    for model in (chat, llm):
        assert notes(model, QUESTION, documents=[], notes=["mine"]) == ["mine", note]
        assert notes(model, QUESTION) == []
        assert notes(model, QUESTION, documents=documents) == []
    block = create_plaintext_block(documents[0].page_content)
    assert notes(chat, [HumanMessage(content_blocks=[block, create_text_block(QUESTION)])], documents=[]) == []


def test_a_conversations_system_message_replaces_the_models(folder: str, documents: list[Document]) -> None:
    chat = ChatFinch(model=folder, system_prompt="Answer in French.", **SETTINGS)
    plain = ChatFinch(model=folder, **SETTINGS)
    own: list[BaseMessage] = [SystemMessage("Be brief."), HumanMessage(QUESTION)]

    def text(model: ChatFinch, messages: list[BaseMessage], **options: Any) -> Any:
        return model.invoke(messages, documents=documents, **options).content

    assert text(chat, own) == text(plain, own)
    assert text(chat, [HumanMessage(QUESTION)]) == text(
        plain, [SystemMessage("Answer in French."), HumanMessage(QUESTION)]
    )
    # What a call says itself is the last word.
    assert text(plain, own, system_prompt="Answer in French.") == text(chat, [HumanMessage(QUESTION)])


def test_configurable_fields_keep_engine_and_streaming(chat: ChatFinch, monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[str] = []
    load = Finch.from_pretrained

    def recorded(model: str, **settings: Any) -> Finch:
        loads.append(model)
        return load(model, **settings)

    monkeypatch.setattr(Finch, "from_pretrained", recorded)
    fresh = ChatFinch(**{**chat.model_dump(), "device": "cpu"})  # another engine than that of the other tests
    length = ConfigurableField(id="length")
    configured = fresh.configurable_fields(max_tokens=length).with_config(configurable={"length": 4})
    assert len(list(configured.stream("Hello"))) > 2
    short: Any = configured.invoke("Hello")
    assert short.usage_metadata["output_tokens"] == 4
    long: Any = fresh.invoke("Hello")
    assert long.usage_metadata["output_tokens"] == 8
    assert len(loads) == 1


def test_events_of_version_3_have_citations(chat: ChatFinch, documents: list[Document]) -> None:
    if Version(langchain_core.__version__) < Version("1.4"):
        pytest.skip(f"langchain-core {langchain_core.__version__} has no events of version 3, 1.4 has")
    stream = chat.bind(documents=documents).stream_events(QUESTION, version="v3")
    events = list(stream)
    message = stream.output
    whole = chat.bind(documents=documents).invoke(QUESTION)
    assert annotated(message) == annotated(whole) != []
    assert message.usage_metadata == whole.usage_metadata
    assert sum(event["event"] == "content-block-delta" for event in events) > 1


def test_kept_tokens_are_those_of_the_citations(chat: ChatFinch, documents: list[Document]) -> None:
    message = chat.bind(documents=documents).invoke(QUESTION)
    assert message.usage_metadata is not None
    details: dict[str, Any] = dict(message.usage_metadata["input_token_details"])
    assert details["kept"] == kept(message.response_metadata["citations"])


def test_both_models_tokenise_alike(chat: ChatFinch, llm: FinchLLM) -> None:
    assert chat.get_token_ids("the harbour") == llm.get_token_ids("the harbour")
    assert chat.get_num_tokens_from_messages([HumanMessage("the harbour")]) > llm.get_num_tokens("the harbour")
