from __future__ import annotations

import asyncio
import io
from pathlib import Path
from typing import Any

import pytest
from li_support import QUESTION, finch_llm, nodes, passages
from llama_index.core.base.llms.types import (
    AudioBlock,
    CitableBlock,
    DocumentBlock,
    ImageBlock,
    ThinkingBlock,
    VideoBlock,
)
from llama_index.core.llms import ChatMessage, TextBlock
from llama_index.core.schema import ImageNode, NodeWithScore, TextNode
from llama_index.llms.finch import FinchRerank, PassagesMessage

from finch_rag import InputError, Passage
from finch_rag.prompts.parsing import ParsedPrompt
from tests.small import texts


def chatted(*blocks: Any, **options: Any) -> Any:
    return finch_llm().chat([ChatMessage(role="user", blocks=[*blocks, TextBlock(text=QUESTION)])], **options)


def read(requests: list[ParsedPrompt]) -> list[tuple[str, str | None, str | None]]:
    """Text, id and title of what was read; the question must be the question."""
    assert (requests[-1].question, requests[-1].parse_mode) == (QUESTION, "apart")
    return [(passage.text, passage.id, passage.title) for passage in requests[-1].passages]


def test_citable_blocks_are_read_as_passages(requests: list[ParsedPrompt]) -> None:
    document = DocumentBlock(data=b"The pier is old.", title="ignored: the block's own counts")
    response = chatted(
        CitableBlock(title="Notes", source="a", content=[TextBlock(text="The bridge"), TextBlock(text="is old.")]),
        CitableBlock(title="", source="", content=[document]),
        quotes=False,
    )
    assert read(requests) == [("The bridge\nis old.", "a", "Notes"), ("The pier is old.", None, None)]
    assert [citation["passage_id"] for citation in response.additional_kwargs["citations"]].count("a") == 1
    sources = [block.source for block in response.message.blocks[1:]]
    assert sorted(sources) == ["1", "a"]  # one without an id is named by its place


def test_documents_are_read_as_passages(requests: list[ParsedPrompt], tmp_path: Path) -> None:
    file = tmp_path / "pier.txt"
    file.write_text("Der Pier ist für alle da.", encoding="utf-8")
    chatted(
        DocumentBlock(data=b"The bridge is old.", title="Notes"),
        DocumentBlock(data=io.BytesIO(b"The pier is new."), title="More notes"),
        DocumentBlock(path=str(file), title="File"),
    )
    assert read(requests) == [
        ("The bridge is old.", None, "Notes"),
        ("The pier is new.", None, "More notes"),
        ("Der Pier ist für alle da.", None, "File"),
    ]


def test_a_document_without_a_title_has_none(requests: list[ParsedPrompt]) -> None:
    chatted(DocumentBlock(data=b"The bridge is old."))
    assert read(requests) == [("The bridge is old.", None, None)]


def test_a_passages_message_takes_texts_passages_and_nodes(requests: list[ParsedPrompt]) -> None:
    given: list[Any] = [
        "The bridge is old.",
        Passage("The pier is new.", id="p", title="Pier"),
        Passage("No id."),
        nodes(1)[0],
    ]
    message = PassagesMessage(QUESTION, given)
    assert message.content == QUESTION
    finch_llm().chat([message])
    assert read(requests) == [
        ("The bridge is old.", "0", None),
        ("The pier is new.", "p", "Pier"),
        ("No id.", "2", None),
        (f"page: 0\n\n{texts(1)[0]}", "n0", "notes-0.md"),
    ]


def test_what_is_hidden_from_llms_is_never_read(requests: list[ParsedPrompt]) -> None:
    metadata = {"title": "Secret", "file_name": "a.md", "page": "7"}
    hidden = TextNode(text="The bridge is old.", metadata=metadata, excluded_llm_metadata_keys=["title", "page"])
    finch_llm().chat([PassagesMessage(QUESTION, [NodeWithScore(node=hidden)])])
    (passage,) = requests[0].passages
    assert (passage.title, passage.text) == ("a.md", "The bridge is old.")


def test_nodes_without_text_are_skipped_and_counted() -> None:
    blank = [
        NodeWithScore(node=TextNode(text=" \n", id_="blank", metadata={"page": "1"})),
        NodeWithScore(node=ImageNode()),
    ]
    found = [blank[0], *nodes(3), blank[1]]
    response = finch_llm().chat([PassagesMessage(QUESTION, found)])
    report = response.additional_kwargs["report"]
    assert report["notes"] == ["2 of 5 passages had no text: skipped"]
    assert {citation["index"] for citation in response.additional_kwargs["citations"]} <= {1, 2, 3}
    ranked = FinchRerank(llm=finch_llm()).postprocess_nodes(found, query_str=QUESTION)
    assert [node.score for node in ranked[-2:]] == [0, 0]


def test_a_passages_message_goes_into_any_of_the_four_chats(requests: list[ParsedPrompt]) -> None:
    message, llm = PassagesMessage(QUESTION, passages(3)), finch_llm(max_new_tokens=1)

    async def run() -> None:
        await llm.achat([message])
        async for _ in await llm.astream_chat([message]):
            pass

    llm.chat([message])
    list(llm.stream_chat([message]))
    asyncio.run(run())
    assert [len(request.passages) for request in requests] == [3, 3, 3, 3]


def test_a_passages_message_survives_json() -> None:
    message = PassagesMessage(QUESTION, passages(2))
    again = PassagesMessage.model_validate_json(message.model_dump_json())
    assert again == message
    assert ChatMessage.model_validate_json(message.model_dump_json()).blocks == message.blocks


def test_passages_are_read_from_every_message_of_a_conversation(requests: list[ParsedPrompt]) -> None:
    earlier = PassagesMessage("what is this?", ["The bridge is old."])
    finch_llm().chat([earlier, ChatMessage(role="assistant", content="Notes."), PassagesMessage(QUESTION, ["New."])])
    assert [text for text, _, _ in read(requests)] == ["The bridge is old.", "New."]
    assert requests[0].history == [
        {"role": "user", "content": "what is this?"},
        {"role": "assistant", "content": "Notes."},
    ]


def test_an_answer_with_its_citation_blocks_goes_back_into_the_conversation(requests: list[ParsedPrompt]) -> None:
    llm, first = finch_llm(), PassagesMessage("what is this?", passages())
    answer = llm.chat([first]).message
    assert len(answer.blocks) > 1
    llm.chat([first, answer, ChatMessage(content=QUESTION)])
    assert len(read(requests)) == 12  # what was cited is not read twice
    assert requests[-1].history[1] == {"role": "assistant", "content": answer.content}


def test_roles_and_blocks_that_only_other_models_know_are_taken(requests: list[ParsedPrompt]) -> None:
    thought = ChatMessage(role="chatbot", blocks=[ThinkingBlock(content="hm"), TextBlock(text="Notes.")])
    finch_llm().chat(
        [
            ChatMessage(role="developer", content="Be brief."),
            ChatMessage(content="hi"),
            thought,
            ChatMessage(content="so?"),
        ]
    )
    assert requests[0].system_prompt == "Be brief."
    assert requests[0].history[1] == {"role": "assistant", "content": "Notes."}


IMAGE = ImageBlock(image=b"\x89PNG", image_mimetype="image/png")


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (IMAGE, "ImageBlock in a message"),
        (AudioBlock(audio=b"x", format="wav"), "AudioBlock in a message"),
        (VideoBlock(video=b"x", video_mimetype="video/mp4"), "VideoBlock in a message"),
        (CitableBlock(title="", source="", content=[IMAGE]), "ImageBlock in a passage"),
        (DocumentBlock(data=b"\xff\xfe\x00 \xd8", title="scan.pdf"), "'scan.pdf' is not UTF-8"),
        (DocumentBlock(path="/no/such/file", title="gone"), "'gone' cannot be read"),
    ],
)
def test_what_cannot_be_read_is_an_input_error_of_one_line(block: Any, reason: str) -> None:
    with pytest.raises(InputError, match=reason) as caught:
        chatted(block)
    assert "\n" not in str(caught.value)


def test_what_a_tool_found_is_a_passage(requests: list[ParsedPrompt]) -> None:
    named = {"tool_call_id": "call-1", "name": "weather"}
    found = [
        ChatMessage(role="tool", content="It rains.", additional_kwargs=named),
        ChatMessage(role="function", content="It snows."),
        ChatMessage(role="tool", content=" "),
    ]
    finch_llm().chat([*found, ChatMessage(content=QUESTION)])
    assert requests[-1].passages == [Passage("It rains.", "call-1", "weather"), Passage("It snows.")]
    assert requests[-1].question == QUESTION
