"""Passages, question and chat template -> token ids, kept apart.

    prefix     template, system prompt, earlier messages, instructions: never evicted
    passages   what is compressed
    question   forwarded after every chunk, and once more before the answer
    tail       end of the template; opens the answer

Retrieved text is untrusted: a control token's text inside a passage or question is tokenised as plain text.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..errors import InputError
from .chat_template import ASSISTANT, SYSTEM, USER, Message, Render, check_messages, frame, plain_frame
from .encoding import Encoder
from .passages import Passage, check_unicode

SYSTEM_PROMPT = "You are a helpful assistant that answers questions from the passages that the user gives."
INSTRUCTIONS = "Answer the question in a few words, using the passages below."
INSTRUCTIONS_WITHOUT_PASSAGES = "Answer the question in a few words."


@dataclass(frozen=True, slots=True)
class PromptSettings:
    """What a prompt says beside passages and question.

    Attributes:
        instructions: Read before the passages; a default that asks for a short answer when None.
        system_prompt: The system message; a default when None, the chat template's own (or none) when empty.
        history: Earlier messages of the conversation, see `Message`; never evicted.
        render: Makes the prompt of messages, control tokens included, in place of the tokenizer's chat template.
        in_own_words: The question brings all words that it needs: no defaults and no label stand around it. It may be
            empty where there are no passages.
        following: The assistant's messages behind the question, which the answer goes on from; never evicted.
    """

    instructions: str | None = None
    system_prompt: str | None = None
    history: Sequence[Mapping[str, object]] = ()
    render: Render | None = None
    in_own_words: bool = False
    following: Sequence[Message] = ()


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids of one call.

    Attributes:
        prefix: Read first, never evicted.
        passages: One list a passage.
        question: The question with its label, forwarded after each chunk.
        own_tokens: Which tokens of ``question`` are the question's own, without its label.
        tail: What stands between the question and the answer.
    """

    prefix: list[int]
    passages: list[list[int]]
    question: list[int]
    own_tokens: slice
    tail: list[int]


def text_to_read(passage: Passage) -> str:
    """What a model reads of a passage: title, text and a blank line; nothing of one without text.

    Args:
        passage: The passage.
    """
    return f"{passage.titled_text}\n\n" if passage.text.strip() else ""


def refine_instructions(instructions: str, answer: str) -> str:
    """Instructions for a better answer than an earlier one.

    Args:
        instructions: Those of the first answer.
        answer: The earlier answer, from other passages.
    """
    return (
        f"{instructions}\n\nAn earlier answer, from other passages, is: {answer}\n"
        "Give a better one if the passages below allow it, else repeat it."
    )


class _Words(NamedTuple):
    """What stands around passages and question: system message, instructions with a blank line, question's label."""

    system: list[Message]
    opening: str
    label: str


def _words(
    question: str, has_passages: bool, instructions: str | None, system_prompt: str | None, in_own_words: bool
) -> _Words:
    """The words of a prompt, defaults filled in, see `PromptSettings`; raises an InputError if nothing is asked."""
    if not isinstance(question, str) or (not question.strip() and (has_passages or not in_own_words)):
        raise InputError("the question is empty: ask one")
    check_unicode(question, "the question")
    if instructions is None and not in_own_words:
        instructions = INSTRUCTIONS if has_passages else INSTRUCTIONS_WITHOUT_PASSAGES
    if system_prompt is None and has_passages and not in_own_words:
        system_prompt = SYSTEM_PROMPT
    # Where nothing stands before the question, the message is the question and needs no label.
    labelled = bool(has_passages or instructions) and not in_own_words
    system = [Message(role=SYSTEM, content=system_prompt)] if system_prompt else []
    return _Words(system, f"{instructions}\n\n" if instructions else "", "Question: " if labelled else "")


class PromptBuilder(Encoder):
    """Builds prompts for one tokenizer. Safe to share between threads.

    Args:
        tokenizer: With a chat template, which is then used, or without.
    """

    def build(
        self,
        question: str,
        passages: Sequence[Passage],
        instructions: str | None = None,
        system_prompt: str | None = None,
        history: Sequence[Mapping[str, object]] = (),
        render: Render | None = None,
        encoded: list[list[int]] | None = None,
        in_own_words: bool = False,
        following: Sequence[Message] = (),
    ) -> Prompt:
        """Token ids for a question over passages.

        Args:
            question: The question.
            passages: Checked passages, possibly none; one without text gets no tokens.
            instructions: See `PromptSettings`.
            system_prompt: See `PromptSettings`.
            history: See `PromptSettings`.
            render: See `PromptSettings`.
            encoded: Token ids of the passages, where an earlier prompt has them.
            in_own_words: See `PromptSettings`.
            following: See `PromptSettings`.

        Raises:
            InputError: If the question is empty or not text, or the history cannot be used.
            ModelError: If the chat template cannot be used.
        """
        words = _words(question, bool(passages), instructions, system_prompt, in_own_words)
        label, question = words.label, question.strip()
        messages = [
            *words.system,
            *check_messages(history, (USER, ASSISTANT), "history message"),
            Message(role=USER, content=""),
            *following,
        ]
        for message in messages:
            check_unicode(message["content"], f"a {message['role']} message")
        head, tail = self._frame(messages, len(messages) - 1 - len(following), bool(label), render)
        if not question and not tail:
            raise InputError("the question is empty, and no chat template opens an answer: ask one")
        prefix = head + self.encode([words.opening])[0]
        if encoded is None:
            encoded = self.encode([text_to_read(passage) for passage in passages])
        # The label ends in a space that most tokenizers join to the next word: encode both, then find the border.
        label_ids = self.encode([label.rstrip()])[0]
        question_ids = self.encode([label + question])[0]
        start = len(label_ids) if question_ids[: len(label_ids)] == label_ids else 0
        return Prompt(prefix, encoded, question_ids, slice(start, len(question_ids)), tail)

    def messages(
        self,
        question: str,
        passages: Sequence[Passage],
        instructions: str | None = None,
        system_prompt: str | None = None,
    ) -> list[Message]:
        """The prompt that `build` makes, as messages, for another program that has the same chat template.

        Args:
            question: The question.
            passages: See `build`.
            instructions: See `PromptSettings`.
            system_prompt: See `PromptSettings`.

        Returns:
            The user's message with all passages, behind a system message where the chat template takes one.

        Raises:
            InputError: If the question is empty or not text.
            ModelError: If the chat template cannot be used.
        """
        words = _words(question, bool(passages), instructions, system_prompt, in_own_words=False)
        texts = "".join(map(text_to_read, passages))
        asked = Message(role=USER, content=f"{words.opening}{texts}{words.label}{question.strip()}")
        messages = [*words.system, asked]
        for message in messages:
            check_unicode(message["content"], f"the {message['role']} message")
        if self.tokenizer.chat_template:
            with self._lock:
                messages, _ = frame(self.tokenizer, messages)
        return messages

    def _frame(
        self, messages: list[Message], asked: int, labelled: bool, render: Render | None
    ) -> tuple[list[int], list[int]]:
        """Token ids before and after the question's message, the other messages included."""
        behind = len(messages) - asked  # counted from the end, as a system message may move into another
        if self.tokenizer.chat_template or render is not None:
            with self._lock:
                messages, texts = frame(self.tokenizer, messages, render)
            ids = self._trusted(texts[0])
        else:
            with self._lock:
                ids = list(self.tokenizer("")["input_ids"])  # what the tokenizer puts before any text
            while ids and ids[-1] == self.tokenizer.eos_token_id != self.tokenizer.bos_token_id:
                ids.pop()
            texts = plain_frame(messages, asked, labelled)
            ids += self.encode([texts[0]])[0]
        asked = len(messages) - behind
        pieces = [
            self.encode([message["content"]])[0] + self._trusted(text)
            for message, text in zip(messages[:asked], texts[1:], strict=False)
        ]
        # What the template moved into the question's message stands before its own text.
        pieces.append(self.encode([messages[asked]["content"]])[0])
        tail = self._trusted(texts[asked + 1])
        for message, text in zip(messages[asked + 1 :], texts[asked + 2 :], strict=True):
            tail += self.encode([message["content"]])[0] + self._trusted(text)
        return [*ids, *itertools.chain.from_iterable(pieces)], tail

    def _trusted(self, text: str) -> list[int]:
        """Token ids of the template's own text, whose control tokens are meant."""
        with self._lock:
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
