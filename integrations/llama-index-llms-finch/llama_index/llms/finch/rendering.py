"""The user's own ways to make a prompt of messages, in place of the tokenizer's chat template."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llama_index.core.base.llms.generic_utils import messages_to_prompt as generic_messages_to_prompt
from llama_index.core.base.llms.types import ChatMessage, MessageRole
from llama_index.core.llms.llm import default_completion_to_prompt
from llama_index.core.prompts import BasePromptTemplate

from finch_rag.adapters import Message, Render

_MARK = "FinchCompletionGoesHere"

MessagesToPrompt = Callable[[Sequence[ChatMessage]], str]
CompletionToPrompt = Callable[[str], str]


def messages_render(convert: MessagesToPrompt | None) -> Render | None:
    """What renders the messages of a chat; None for the tokenizer's chat template.

    Args:
        convert: ``messages_to_prompt`` of an LLM.
    """
    if convert is None or convert is generic_messages_to_prompt:  # LlamaIndex's default, which knows no model
        return None
    return lambda messages: convert(
        [ChatMessage(role=MessageRole(message["role"]), content=message["content"]) for message in messages]
    )


def completion_render(convert: CompletionToPrompt | None, wrapper: BasePromptTemplate | None) -> Render | None:
    """What renders a flat prompt; None for the tokenizer's chat template.

    Args:
        convert: ``completion_to_prompt`` of an LLM.
        wrapper: Its ``query_wrapper_prompt``.
    """
    if convert is default_completion_to_prompt:
        convert = None
    if convert is None and wrapper is None:
        return None

    def wrapped(text: str) -> str:
        text = text if convert is None else convert(text)
        return text if wrapper is None else wrapper.format(query_str=text)

    def render(messages: Sequence[Message]) -> str:
        if not any(message["role"] == "assistant" for message in messages):
            return wrapped(messages[-1]["content"])
        turns = "\n".join(f"{message['role']}: {message['content']}" for message in messages)
        return wrapped(f"{turns}\nassistant: ")

    return render


def unformatted(prompt: str, extend: Callable[[str], str], convert: CompletionToPrompt | None) -> str:
    """A prompt without what `LLM.predict` has put around it, which is put there again, control tokens as such.

    Args:
        prompt: With it.
        extend: Puts the system prompt and the wrapper of queries around a prompt.
        convert: ``completion_to_prompt`` of the LLM.
    """
    for around in (extend(_MARK), (convert or default_completion_to_prompt)(_MARK)):
        before, _, after = around.partition(_MARK)
        prompt = prompt.removeprefix(before).removesuffix(after)
    return prompt
