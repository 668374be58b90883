"""What a chat template puts around messages, as texts between which the messages' own texts go.

The messages are rendered with marks in their places, so that a template's control tokens, which are meant, can be told
from those inside a message, which are not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

from jinja2 import TemplateError

from ..errors import InputError, ModelError
from .deadline import within
from .passages import check_unicode
from .trial import what_is_wrong

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CURE = "pass a tokenizer with another chat_template, or set it to None for a plain prompt"
SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
_THOUGHT = "<think>"  # what opens a thought of DeepSeek R1, QwQ and others
_SECONDS = 2.0  # that a prompt may take to be made; a template takes about a millisecond
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
        if render is None:
            # A variable that many templates know; others pass it over.
            return answer_at_once(rendered(tokenizer, marked, enable_thinking=False))
        try:
            return render(marked)
        except TemplateError as error:
            raise _failed(tokenizer, error) from error

    try:
        return list(messages), _around_marks(apply, messages, tokenizer)
    except _RunawayError:
        raise
    except ModelError:
        if messages[0]["role"] != SYSTEM:
            raise
    # Some templates know no system role, or drop it: its text then opens the user's first message.
    return frame(tokenizer, without_system(messages), render)


class _RunawayError(ModelError):
    """A template that does not come to its end: it is not tried with other messages."""


def rendered(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], **variables: Any) -> str:
    """What a tokenizer's chat template makes of messages, with the start of an answer behind them.

    A template is a program of strangers: it is tried out in a process of its own before (`finch_rag.prompts.trial`),
    and is stopped where it then takes longer all the same.

    Args:
        tokenizer: With a chat template.
        messages: The messages.
        variables: Further variables of the template.

    Raises:
        ModelError: If the template fails, makes no text, or does not come to its end.
    """
    turns = [{"role": message["role"], "content": message["content"]} for message in messages]
    template: object = tokenizer.chat_template
    if isinstance(template, Mapping):
        template = template.get("default")
    if isinstance(template, str):
        tokens = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
        if wrong := what_is_wrong(template, tuple(sorted(tokens.items()))):
            raise _RunawayError(f"the chat template of {type(tokenizer).__name__} cannot be used: {wrong}; {_CURE}")
    try:
        made: object = within(
            _SECONDS,
            lambda: tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **variables),
        )
    except TimeoutError as error:
        raise _RunawayError(
            f"the chat template of {type(tokenizer).__name__} cannot be used: {error}; {_CURE}"
        ) from error
    except Exception as error:  # a program of strangers fails in its own ways
        raise _failed(tokenizer, error) from error
    if not isinstance(made, str):
        raise ModelError(
            f"the chat template of {type(tokenizer).__name__} makes {type(made).__name__}, not text; {_CURE}"
        )
    return made


def _failed(tokenizer: PreTrainedTokenizerBase, error: Exception) -> ModelError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return ModelError(f"the chat template of {type(tokenizer).__name__} fails: {reason}")


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
                f"the chat template of {type(tokenizer).__name__} does not show each message once; {_CURE}"
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
