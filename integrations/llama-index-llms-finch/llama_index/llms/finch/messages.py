"""LlamaIndex's nodes, blocks and messages <-> Finch's passages and messages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from llama_index.core.base.llms.types import (
    AudioBlock,
    ChatMessage,
    CitableBlock,
    DocumentBlock,
    ImageBlock,
    MessageRole,
    TextBlock,
    VideoBlock,
)
from llama_index.core.bridge.pydantic import Field
from llama_index.core.schema import NodeWithScore

from finch_rag import InputError, Passage
from finch_rag.adapters import ASSISTANT, SYSTEM, Message

from .nodes import passage_of

_ROLES = {MessageRole.DEVELOPER: SYSTEM, MessageRole.CHATBOT: ASSISTANT, MessageRole.MODEL: ASSISTANT}
_TOOL_ROLES = (MessageRole.TOOL, MessageRole.FUNCTION)
_UNTITLED = "input_document"  # LlamaIndex's title of a document that was given none
_OPTIONS = "finch"  # key of a message's options among its additional_kwargs


class PassageBlock(CitableBlock):
    """A citable block that says more of its passage, for a store; where it is written down, this is left out.

    Attributes:
        metadata: The passage's.
        is_numbered: Whether ``source`` is the passage's place, and no id of its own.
    """

    metadata: dict[str, Any] = Field(default_factory=dict, exclude=True)
    is_numbered: bool = Field(default=False, exclude=True)

    def __eq__(self, other: object) -> bool:
        """Whether the other is the same block, as it is written down."""
        return isinstance(other, CitableBlock) and self.model_dump() == other.model_dump()


class PassagesMessage(ChatMessage):
    """A user's message that brings passages: one citable block each, and the question.

    Args:
        question: The question.
        passages: Texts, finch-rag's `Passage` objects or LlamaIndex's nodes with scores.
        instructions: Read before the passages, in place of the LLM's own; those when None.
        notes: Said in the report.
        data: Fields of `ChatMessage`.
    """

    def __init__(
        self,
        question: str | None = None,
        passages: Iterable[str | Passage | NodeWithScore] = (),
        instructions: str | None = None,
        notes: Sequence[str] = (),
        **data: Any,
    ) -> None:
        if question is not None:
            blocks = [citable_block(passage, place) for place, passage in enumerate(passages)]
            data["blocks"] = [*blocks, TextBlock(text=question)]
        options: dict[str, Any] = {} if instructions is None else {"instructions": instructions}
        if notes:
            options["notes"] = list(notes)
        if options:
            data["additional_kwargs"] = {**data.get("additional_kwargs", {}), _OPTIONS: options}
        super().__init__(**data)


def citable_block(item: str | Passage | NodeWithScore, place: int) -> PassageBlock:
    """A passage as LlamaIndex's citable block, whose ``source`` is the passage's id, or its place.

    Args:
        item: A text, a passage or a node.
        place: Its place among the passages.
    """
    passage = passage_of(item) if isinstance(item, NodeWithScore) else item
    if isinstance(passage, str):
        passage = Passage(passage)
    content: list[Any] = [TextBlock(text=passage.text)]
    return PassageBlock(
        title=passage.title or "",
        source=str(place) if passage.id is None else passage.id,
        content=content,
        metadata=dict(passage.metadata),
        is_numbered=passage.id is None,
    )


class Conversation(NamedTuple):
    """What messages hold.

    Attributes:
        messages: Their texts.
        passages: What their blocks bring, and what tools found.
        options: What the last of them says of the call.
    """

    messages: list[Message]
    passages: list[Passage]
    options: dict[str, Any]


def split_messages(messages: Sequence[ChatMessage], *, own_ids: bool = False) -> Conversation:
    """The texts of messages, and the passages that their blocks bring.

    What a tool found is a passage.

    Args:
        messages: A conversation.
        own_ids: Leave passages without an id that have none but their place, which a store would take for one.

    Raises:
        InputError: If a block is neither text nor a document of text.
    """
    texts: list[Message] = []
    passages: list[Passage] = []
    for message in messages:
        found = (_block_passage(block, own_ids) for block in message.blocks)
        passages += [passage for passage in found if passage is not None]
        if message.role in _TOOL_ROLES:
            if message.content and message.content.strip():
                passages.append(_found_by_tool(message))
            continue
        role = _ROLES.get(message.role, message.role.value)
        texts.append(Message(role=role, content=message.content or ""))
    options = messages[-1].additional_kwargs.get(_OPTIONS, {}) if messages else {}
    return Conversation(texts, passages, dict(options))


def _found_by_tool(message: ChatMessage) -> Passage:
    named = message.additional_kwargs
    return Passage(message.content or "", id=named.get("tool_call_id"), title=named.get("name"))


def _block_passage(block: Any, own_ids: bool) -> Passage | None:
    """The passage of a citable block or a document; None for blocks that are no passages."""
    if isinstance(block, CitableBlock):
        text = "\n".join(part.text if isinstance(part, TextBlock) else _document_text(part) for part in block.content)
        if isinstance(block, PassageBlock):
            source = None if own_ids and block.is_numbered else block.source
            return Passage(text, id=source or None, title=block.title or None, metadata=block.metadata)
        return Passage(text, id=block.source or None, title=block.title or None)
    if isinstance(block, DocumentBlock):
        return Passage(_document_text(block), title=None if block.title == _UNTITLED else block.title)
    if isinstance(block, (AudioBlock, ImageBlock, VideoBlock)):
        raise InputError(f"{type(block).__name__} in a message: Finch reads text, pass TextBlock or CitableBlock")
    return None  # text, or what only other models know


def _document_text(block: Any) -> str:
    if not isinstance(block, DocumentBlock):
        raise InputError(f"{type(block).__name__} in a passage: Finch reads text, pass its text as a TextBlock")
    try:
        return bytes(block.resolve_document().read()).decode()
    except UnicodeDecodeError as error:
        raise InputError(f"the document {block.title!r} is not UTF-8 text: extract its text first") from error
    except (OSError, ValueError) as error:
        raise InputError(f"the document {block.title!r} cannot be read: {error}") from error
