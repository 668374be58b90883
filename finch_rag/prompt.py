"""Passages, question and chat template -> token ids, kept apart.

    prefix     template, system prompt, earlier messages, instructions: never evicted
    passages   what is compressed
    question   forwarded after every chunk, and once more before the answer
    tail       end of the template; opens the answer

Retrieved text is untrusted: a control token's text inside a passage or question is tokenised as plain text.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .chat_template import SYSTEM, USER, Message, Render, check_history, frame, plain_frame
from .errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SYSTEM_PROMPT = "You are a helpful assistant that answers questions from the passages that the user gives."
INSTRUCTIONS = "Answer the question in a few words, using the passages below."
INSTRUCTIONS_WITHOUT_PASSAGES = "Answer the question in a few words."


@dataclass(frozen=True, slots=True)
class Passage:
    """A retrieved text.

    Attributes:
        text: The text that the model reads.
        id: The caller's id, handed back in citations.
        title: Read before the text, and handed back in citations.
        metadata: The caller's; Finch does not look at it.
    """

    text: str
    id: str | None = None
    title: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids of one call.

    Attributes:
        prefix: Read first, never evicted.
        passages: One list a passage.
        question: The question with its label, forwarded after each chunk.
        question_rows: Which tokens of ``question`` are the question's own.
        tail: What stands between the question and the answer.
    """

    prefix: list[int]
    passages: list[list[int]]
    question: list[int]
    question_rows: slice
    tail: list[int]


def as_passages(passages: Iterable[str | Passage]) -> list[Passage]:
    """Checks what a caller passes as passages.

    Args:
        passages: Strings or `Passage` objects.

    Raises:
        InputError: If one of them is empty or not text; the message has its index.
    """
    if isinstance(passages, (str, Passage)):
        raise InputError("passages is a single text: pass a list of texts or of Passage objects")
    if not isinstance(passages, Iterable):
        raise InputError(f"passages is {type(passages).__name__}: pass a list of texts or of Passage objects")
    checked = []
    for index, item in enumerate(passages):
        passage = item if isinstance(item, Passage) else Passage(item)
        if not isinstance(passage.text, str):
            raise InputError(f"passage {index} is {type(passage.text).__name__}, not text: pass a str or a Passage")
        if not passage.text.strip():
            raise InputError(f"passage {index} is empty: leave it out, or give it text")
        _check_unicode(f"{passage.title or ''}{passage.text}", f"passage {index}")
        checked.append(passage)
    return checked


def _check_unicode(text: str, what: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{what} holds half a surrogate pair: decode it with errors='replace' first") from error


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
            if len(token.content) > 1 and not token.content.isspace()
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
    ) -> Prompt:
        """Token ids for a question over passages.

        Args:
            question: The question.
            passages: Checked passages, possibly none.
            instructions: Read before the passages; a default that asks for a short answer when None.
            system_prompt: The system message; a default when None, the chat template's own (or none) when empty.
            history: Earlier messages of the conversation, see `Message`; never evicted.
            render: Used in place of the tokenizer's chat template, see `finch_rag.chat_template.frame`.
            encoded: Token ids of the passages, where an earlier prompt has them.

        Raises:
            InputError: If the question is empty or not text, or the history cannot be used.
            ModelError: If the chat template cannot be used.
        """
        if not isinstance(question, str) or not question.strip():
            raise InputError("the question is empty: ask one")
        _check_unicode(question, "the question")
        if instructions is None:
            instructions = INSTRUCTIONS if passages else INSTRUCTIONS_WITHOUT_PASSAGES
        if system_prompt is None and passages:
            system_prompt = SYSTEM_PROMPT
        # Where nothing stands before the question, the message is the question and needs no label.
        label, question = "Question: " if passages or instructions else "", question.strip()
        system = [Message(role=SYSTEM, content=system_prompt)] if system_prompt else []
        messages = [*system, *check_history(history), Message(role=USER, content="")]
        for message in messages:
            _check_unicode(message["content"], f"a {message['role']} message")
        head, tail = self._frame(messages, bool(label), render)
        opening = f"{instructions}\n\n" if instructions else ""
        prefix = head + self.encode([opening])[0]
        if encoded is None:
            encoded = self.encode([f"{p.title}\n{p.text}\n\n" if p.title else f"{p.text}\n\n" for p in passages])
        # The label ends in a space that most tokenizers join to the next word: encode both, then find the border.
        label_ids = self.encode([label.rstrip()])[0]
        question_ids = self.encode([label + question])[0]
        own = len(label_ids) if question_ids[: len(label_ids)] == label_ids else 0
        return Prompt(prefix, encoded, question_ids, slice(own, len(question_ids)), tail)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of untrusted texts: control tokens inside them stay plain text.

        Args:
            texts: Any texts.

        Returns:
            One list a text, none of which holds a control token's id.
        """
        pieces = [self._without_control(text) for text in texts]
        flat = [piece for parts in pieces for piece in parts]
        if not flat:
            return []
        with self._lock:
            encoded = iter(self.tokenizer(flat, add_special_tokens=False)["input_ids"])
        # A normaliser may still make a control token of look-alike characters; such a token is left out.
        return [[t for _ in parts for t in next(encoded) if t not in self.control_ids] for parts in pieces]

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of generated tokens, without control tokens."""
        with self._lock:
            text = self.tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)

    def _without_control(self, text: str) -> list[str]:
        """Cuts a text behind the first character of each control token in it, so that no piece holds one."""
        pieces = []
        while self._control is not None and (match := self._control.search(text)):
            pieces.append(text[: match.start() + 1])
            text = text[match.start() + 1 :]
        return [*pieces, text]

    def _frame(self, messages: list[Message], labelled: bool, render: Render | None) -> tuple[list[int], list[int]]:
        """Token ids before and after the last message, earlier messages included."""
        if self.tokenizer.chat_template or render is not None:
            with self._lock:
                messages, texts = frame(self.tokenizer, messages, render)
            ids = self._trusted(texts[0])
        else:
            with self._lock:
                ids = list(self.tokenizer("")["input_ids"])  # what the tokenizer puts before any text
            while ids and ids[-1] == self.tokenizer.eos_token_id != self.tokenizer.bos_token_id:
                ids.pop()
            texts = plain_frame(messages, labelled)
            ids += self.encode([texts[0]])[0]
        for message, text in zip(messages[:-1], texts[1:-1], strict=True):
            ids += self.encode([message["content"]])[0] + self._trusted(text)
        # What the template moved into the last message stands before its own text.
        ids += self.encode([messages[-1]["content"]])[0]
        return ids, self._trusted(texts[-1])

    def _trusted(self, text: str) -> list[int]:
        """Token ids of the template's own text, whose control tokens are meant."""
        with self._lock:
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
