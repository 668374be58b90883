"""What a tokenizer's chat template does in its own way, as users are told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import ModelError
from .builder import PromptBuilder
from .chat_template import ASSISTANT, SYSTEM, USER, Message, rendered
from .passages import Passage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARK, _OTHER = "FinchMessageGoesHere", "FinchOtherMessageGoesHere"


def peculiarities(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What is peculiar to a tokenizer's prompts, and what Finch does about it; short phrases.

    Args:
        tokenizer: The tokenizer.

    Raises:
        ModelError: If its chat template cannot be used.
    """
    return [
        _beginning(tokenizer),
        *(_roles(tokenizer) if tokenizer.chat_template else ["no chat template: plain text"]),
    ]


def doubled_beginning(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether prompts begin with the token of a beginning twice, which spoils what a model reads.

    Args:
        tokenizer: The tokenizer.
    """
    return _beginnings(tokenizer) > 1


def _beginning(tokenizer: PreTrainedTokenizerBase) -> str:
    count = _beginnings(tokenizer)
    return f"begins with {tokenizer.bos_token}" + (f" {count} times" if count > 1 else "") if count else "no BOS token"


def _beginnings(tokenizer: PreTrainedTokenizerBase) -> int:
    prefix = PromptBuilder(tokenizer).build("x", [Passage("x")]).prefix
    count = 0
    while count < len(prefix) and prefix[count] == tokenizer.bos_token_id:
        count += 1
    return count


def _roles(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    def shown(*messages: Message) -> str:
        """What a template makes of messages; nothing where it refuses them."""
        try:
            return rendered(tokenizer, messages)
        except ModelError:
            return ""

    user = Message(role=USER, content=_MARK)
    found = []
    if _OTHER not in shown(Message(role=SYSTEM, content=_OTHER), user):
        found.append("no system role: the system prompt opens the user's message")
    elif _has_system_of_its_own(shown(user), shown(Message(role=SYSTEM, content=_OTHER), user)):
        found.append("a system message of its own where none is given")
    if _OTHER not in shown(Message(role=USER, content=_OTHER), user):
        found.append("turns of user and assistant must alternate")
    answered = shown(user, Message(role=ASSISTANT, content=_OTHER), user)
    if _OTHER not in answered:
        found.append("earlier answers are not shown")
    return found


def _has_system_of_its_own(without: str, given: str) -> bool:
    """Whether a prompt without system message has about the text in front that one with such a message has."""
    in_front: Sequence[str] = (without.partition(_MARK)[0], given.partition(_MARK)[0])
    opening = given.partition(_OTHER)[0]
    return bool(opening) and in_front[0].startswith(opening) and len(in_front[0]) > len(opening)
