"""Passages, question and chat template -> token ids, kept apart.

    prefix     template, system prompt, earlier messages, instructions: never evicted
    passages   what is compressed
    question   forwarded after every chunk, and once more before the answer
    tail       end of the template; opens the answer

Retrieved text is untrusted: a control token's text inside a passage or question is tokenised as plain text.
"""

from __future__ import annotations

import itertools
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import InputError
from .chat_template import ASSISTANT, SYSTEM, USER, Message, Render, check_messages, frame, plain_frame
from .passages import Passage, check_unicode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SYSTEM_PROMPT = "You are a helpful assistant that answers questions from the passages that the user gives."
INSTRUCTIONS = "Answer the question in a few words, using the passages below."
INSTRUCTIONS_WITHOUT_PASSAGES = "Answer the question in a few words."

# White space, also as tokenizers write it: runs of it are added tokens of some, and text.
_WHITE_SPACE = " \t\n\r\u2581\u0120\u010a\u0109"


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


class PromptBuilder:
    """Builds prompts for one tokenizer. Safe to share between threads.

    Args:
        tokenizer: With a chat template, which is then used, or without.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._lock = threading.Lock()  # fast tokenizers refuse concurrent use with "Already borrowed"
        control = {
            token.content: token_id
            for token_id, token in tokenizer.added_tokens_decoder.items()
            if len(token.content) > 1 and token.content.strip(_WHITE_SPACE)
        }
        control |= dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
        self.control_ids = frozenset(control.values())
        longest_first = sorted(filter(None, control), key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

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
        if not isinstance(question, str) or (not question.strip() and (passages or not in_own_words)):
            raise InputError("the question is empty: ask one")
        check_unicode(question, "the question")
        if instructions is None and not in_own_words:
            instructions = INSTRUCTIONS if passages else INSTRUCTIONS_WITHOUT_PASSAGES
        if system_prompt is None and passages and not in_own_words:
            system_prompt = SYSTEM_PROMPT
        # Where nothing stands before the question, the message is the question and needs no label.
        labelled = bool(passages or instructions) and not in_own_words
        label, question = "Question: " if labelled else "", question.strip()
        system = [Message(role=SYSTEM, content=system_prompt)] if system_prompt else []
        messages = [
            *system,
            *check_messages(history, (USER, ASSISTANT), "history message"),
            Message(role=USER, content=""),
            *following,
        ]
        for message in messages:
            check_unicode(message["content"], f"a {message['role']} message")
        head, tail = self._frame(messages, len(messages) - 1 - len(following), labelled, render)
        if not question and not tail:
            raise InputError("the question is empty, and no chat template opens an answer: ask one")
        opening = f"{instructions}\n\n" if instructions else ""
        prefix = head + self.encode([opening])[0]
        if encoded is None:
            texts = [f"{passage.titled_text}\n\n" if passage.text.strip() else "" for passage in passages]
            encoded = self.encode(texts)
        # The label ends in a space that most tokenizers join to the next word: encode both, then find the border.
        label_ids = self.encode([label.rstrip()])[0]
        question_ids = self.encode([label + question])[0]
        start = len(label_ids) if question_ids[: len(label_ids)] == label_ids else 0
        return Prompt(prefix, encoded, question_ids, slice(start, len(question_ids)), tail)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of untrusted texts: control tokens inside them stay plain text.

        Args:
            texts: Any texts.

        Returns:
            One list a text, none of which holds a control token's id.
        """
        pieces = [list(self._without_control(text)) for text in texts]
        flat = [piece for parts in pieces for piece in parts]
        if not flat:
            return []
        encoded = iter(self._encode_pieces(flat))
        return [[token for _ in parts for token in next(encoded)] for parts in pieces]

    def _encode_pieces(self, pieces: Sequence[str]) -> list[list[int]]:
        """Token ids of texts that hold no control token as it is written.

        A normaliser may still make one of look-alike characters. Such a text is cut in two until none is made, so that
        the text stays; only a single character that stands for a control token is left out.
        """
        with self._lock:
            encoded: list[list[int]] = self.tokenizer(list(pieces), add_special_tokens=False)["input_ids"]
        hit = [place for place, tokens in enumerate(encoded) if not self.control_ids.isdisjoint(tokens)]
        halves = [half for place in hit for half in _halves(pieces[place])]
        if not halves:
            return encoded
        again = iter(self._encode_pieces([half for half in halves if half]) if any(halves) else ())
        for place in hit:
            encoded[place] = [token for half in _halves(pieces[place]) if half for token in next(again)]
        return encoded

    @contextmanager
    def alone(self) -> Iterator[PreTrainedTokenizerBase]:
        """The tokenizer, which no other thread uses meanwhile."""
        with self._lock:
            yield self.tokenizer

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of generated tokens, without control tokens."""
        with self._lock:
            text = self.tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)

    def _without_control(self, text: str) -> Iterator[str]:
        """Cuts a text behind the first character of each control token in it, so that no piece holds one."""
        start = 0
        while self._control is not None and (match := self._control.search(text, start)):
            yield text[start : match.start() + 1]
            start = match.start() + 1
        yield text[start:]

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


def _halves(text: str) -> tuple[str, str]:
    """A text in two parts; both are empty where it is a single character."""
    middle = len(text) // 2
    return (text[:middle], text[middle:]) if middle else ("", "")
