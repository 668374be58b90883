"""What a chat template puts around messages, as texts between which the messages' own texts go.

The messages are rendered with marks in their places, so that a template's control tokens, which are meant, can be told
from those inside a message, which are not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, TypedDict

from jinja2 import TemplateError

from ..errors import InputError, ModelError
from .passages import check_unicode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
_THOUGHT = "<think>"  # what opens a thought of DeepSeek R1, QwQ and others
_CHANNELS, _FINAL_CHANNEL = "<|start|>assistant", "<|channel|>final<|message|>"  # of gpt-oss


class Message(TypedDict):
    """One turn of a conversation, as chat templates take it.

    Attributes:
        role: "system", "user" or "assistant".
        content: Its text.
    """

    role: str
    content: str


Render = Callable[[Sequence[Message]], str]  # messages, the last of them the user's -> prompt with control tokens


def check_messages(messages: Iterable[Mapping[str, object]], roles: Sequence[str], what: str) -> list[Message]:
    """Messages of a conversation, checked.

    Args:
        messages: Dictionaries with "role" and "content".
        roles: The roles that they may have.
        what: What to call one of them in an error.

    Raises:
        InputError: If one of them has another role or no text; the error has its index.
    """
    checked = []
    for index, message in enumerate(messages):
        role, content = (message.get("role"), message.get("content")) if isinstance(message, Mapping) else (None, None)
        if not isinstance(role, str) or role not in roles:
            listed = f"{', '.join(map(repr, roles[:-1]))} or {roles[-1]!r}"
            raise InputError(f"{what} {index} has the role {role!r}: use {listed}")
        if not isinstance(content, str):
            raise InputError(f"{what} {index} is {type(content).__name__}, not text: pass a str as content")
        check_unicode(content, f"{what} {index}")
        checked.append(Message(role=role, content=content))
    return checked


def frame(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], render: Render | None = None
) -> tuple[list[Message], list[str]]:
    """The texts that a chat template puts around messages.

    Args:
        tokenizer: With a chat template, which is used where ``render`` is None.
        messages: One of them is the user's.
        render: Used in place of the tokenizer's template.

    Returns:
        The messages as the template takes them (a system message may have moved into the user's first), and the texts
        before, between and after them, one more than messages.

    Raises:
        ModelError: If the template fails, or does not show each message once.
    """

    def apply(marked: Sequence[Message]) -> str:
        if render is not None:
            return render(marked)
        rendered = tokenizer.apply_chat_template(
            [{"role": m["role"], "content": m["content"]} for m in marked],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,  # a variable that many templates know; others pass it over
        )
        return answer_at_once(str(rendered))

    try:
        return list(messages), _around_marks(apply, messages, tokenizer)
    except (TemplateError, ModelError) as error:
        if messages[0]["role"] != SYSTEM:
            if isinstance(error, ModelError):
                raise
            reason = " ".join(str(error).split())
            raise ModelError(f"the chat template of {type(tokenizer).__name__} fails: {reason}") from error
    # Some templates know no system role, or drop it: its text then opens the user's first message.
    return frame(tokenizer, without_system(messages), render)


def answer_at_once(prompt: str) -> str:
    """A prompt that opens an answer, and not a thought before it: answers are short, and made of the passages.

    Args:
        prompt: As a template renders it.
    """
    opening = prompt.rstrip()
    if opening.endswith(_THOUGHT):
        return f"{opening}\n\n</think>\n\n"
    return prompt + _FINAL_CHANNEL if opening.endswith(_CHANNELS) else prompt


def without_system(messages: Sequence[Message]) -> list[Message]:
    """The same with the system message, which comes first, at the start of the user's first message."""
    system, *rest = messages
    opening, *others = rest
    return [Message(role=opening["role"], content=f"{system['content']}\n\n{opening['content']}"), *others]


def _around_marks(
    apply: Callable[[Sequence[Message]], str], messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase
) -> list[str]:
    marks = [f"FinchMessage{number}GoesHere" for number in range(len(messages))]
    rest = apply([Message(role=m["role"], content=mark) for m, mark in zip(messages, marks, strict=True)])
    texts = []
    for mark in marks:
        before, found, rest = rest.partition(mark)
        if not found or mark in rest or any(other in before for other in marks):
            raise ModelError(
                f"the chat template of {type(tokenizer).__name__} does not show each message once; pass a tokenizer "
                "with another chat_template, or set it to None for a plain prompt"
            )
        texts.append(before)
    return [*texts, rest]


def plain_frame(messages: Sequence[Message], asked: int, labelled: bool) -> list[str]:
    """What stands around messages for a model without chat template: a transcript of questions and answers.

    Args:
        messages: The conversation.
        asked: Which of them asks.
        labelled: Whether that message has a question's label, so that an answer's label should follow it.
    """

    def opening(place: int, role: str) -> str:
        if role == ASSISTANT:
            return "\nAnswer: "
        label = "Question: " if role == USER and place != asked else ""  # the question's message brings its own
        return f"\n\n{label}" if place else label

    openings = [opening(place, message["role"]) for place, message in enumerate(messages)]
    return [*openings, "\nAnswer:" if labelled or asked < len(messages) - 1 else ""]
