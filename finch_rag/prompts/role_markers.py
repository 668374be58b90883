"""Role markers that are plain text, not control tokens: Zephyr's ``<|user|>``, Vicuna's ``USER:``, ``### Response:``.

They are found in what a chat template puts around the messages of two conversations. A literal counts as a marker if it
has at least four characters and is

    a tag             <|assistant|>  <<SYS>>  <start_of_turn>
    a word in square  [INST]  [/INST]
    a heading         ### Instruction:
    a role's label    USER:  GPT4 Correct Assistant:

Line breaks, role names by themselves, and any other words of a template are none. Untrusted text that holds a marker
stays as it is, but is cut into tokens where the marker's own tokens have no border, so that the two never look alike to
a model. Where each character is a token of its own, a character is put in between.
"""

from __future__ import annotations

import itertools
import re
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import ModelError
from .chat_template import ASSISTANT, SYSTEM, USER, Message, frame

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LETTER = r"[^\W\d_]"
_ROLE = "(?:user|human|assistant|system|bot|gpt|model|instruction|response)s?"
_MARKER = re.compile(
    rf"""
      <{{1,3}} (?!\s) [^<>\n]{{0,40}} {_LETTER} [^<>\n]{{0,40}} (?<!\s) >{{1,3}}
    | \[ [^\[\]\n]{{0,40}} {_LETTER} [^\[\]\n]{{0,40}} \]
    | ^ [ ]* \#{{1,6}} [ ]? {_LETTER} [\w ]{{0,40}} :?
    | (?: \b [\w]{{1,20}} [ ] ){{0,3}} \b (?i:{_ROLE}) [ ]? :
    """,
    re.VERBOSE | re.MULTILINE,
)
_LEAST = 4  # characters
_FILLERS = (" ", "_", "~", "·", "^")
_CONVERSATIONS = ((SYSTEM, USER, ASSISTANT, USER), (SYSTEM, USER), (USER,))


@dataclass(frozen=True)
class RoleMarkers:
    """A template's markers.

    Attributes:
        cuts: Of each marker the places where it is cut, ascending; none where every character is a token.
        tokens: Ids of those that are a single token.
        sequences: Token ids of the others as the template has them, as bytes of `packed`.
        filler: Token ids of what is put into such a sequence.
    """

    cuts: dict[str, tuple[int, ...]]
    tokens: frozenset[int]
    sequences: tuple[bytes, ...]
    filler: tuple[int, ...]

    def broken(self, ids: list[int], starts: list[int]) -> tuple[list[int], list[int]]:
        """Tokens among which no marker's tokens stand.

        Args:
            ids: Of a text.
            starts: Where each begins; empty where that is not asked for.

        Returns:
            The same lists where nothing had to be changed.
        """
        whole = packed(ids) if self.sequences else b""
        found = sorted({place + 1 for sequence in self.sequences for place in _places(whole, sequence)})
        if not found:
            return ids, starts
        new_ids: list[int] = []
        new_starts: list[int] = []
        for first, stop in itertools.pairwise([0, *found, len(ids)]):
            new_ids += [*ids[first:stop], *self.filler]
            new_starts += [*starts[first:stop], *starts[stop : stop + 1] * len(self.filler)]
        return new_ids[: -len(self.filler)], new_starts


def packed(ids: Sequence[int]) -> bytes:
    """Token ids as bytes, in which sequences are found fast.

    Args:
        ids: Token ids.
    """
    return array("q", ids).tobytes()


def _places(ids: bytes, sequence: bytes) -> Iterable[int]:
    """Where a sequence begins among token ids, both of them as bytes."""
    size = array("q").itemsize
    place = ids.find(sequence)
    while place >= 0:
        if place % size == 0:
            yield place // size
        place = ids.find(sequence, place + 1)


def role_markers(tokenizer: PreTrainedTokenizerBase, control: re.Pattern[str] | None) -> RoleMarkers | None:
    """The plain-text markers of a tokenizer's chat template.

    Args:
        tokenizer: The tokenizer, which nobody else uses meanwhile.
        control: Matches its control tokens.

    Returns:
        None where it has none, or no chat template that can be used.
    """
    texts = dict.fromkeys(text for roles in _CONVERSATIONS for text in _around(tokenizer, roles))
    pieces = [piece for text in texts for piece in (control.split(text) if control else [text])]
    markers = sorted({found for piece in pieces for found in markers_in(piece)})
    cuts = {own: own_cuts for own in markers if (own_cuts := _cuts(tokenizer, own, pieces)) is not None}
    sequences = {ids for own in markers for ids in _sequences(tokenizer, own, pieces, whole=own in cuts)}
    if not sequences:
        return None
    alone = frozenset(token for ids in sequences if len(ids) == 1 for token in ids)
    used = {token for ids in sequences for token in ids}
    fillers = [tuple(_ids(tokenizer, filler)) for filler in _FILLERS]
    filler = next((ids for ids in fillers if ids and used.isdisjoint(ids)), fillers[0])
    return RoleMarkers(cuts, alone, tuple(packed(ids) for ids in sorted(sequences) if len(ids) > 1), filler)


def markers_in(text: str) -> list[str]:
    """The markers in what a template puts around messages.

    Args:
        text: Without control tokens.
    """
    found = (match[0].strip() for match in _MARKER.finditer(text))
    return [marker for marker in found if len(marker) >= _LEAST]


def _around(tokenizer: PreTrainedTokenizerBase, roles: Sequence[str]) -> list[str]:
    if not tokenizer.chat_template:
        return []
    try:
        return frame(tokenizer, [Message(role=role, content="") for role in roles])[1]
    except ModelError:  # it is told where a prompt is made
        return []


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids of a text, and where each begins and ends; nothing where the tokenizer does not tell."""
    if not getattr(tokenizer, "is_fast", False):
        return _ids(tokenizer, text), []
    told = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return list(told["input_ids"]), [(int(start), int(end)) for start, end in told["offset_mapping"]]


def _shown(
    tokenizer: PreTrainedTokenizerBase, marker: str, pieces: Sequence[str]
) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """The tokens of a marker wherever it stands, with their places in it."""
    found = []
    for piece in dict.fromkeys((marker, *pieces)):
        ids, spans = _tokens(tokenizer, piece)
        if piece == marker and not spans:
            found.append((ids, spans))
        for match in re.finditer(re.escape(marker), piece):
            own = [n for n, (start, end) in enumerate(spans) if start < match.end() and end > match.start()]
            if own:
                shifted = [(spans[n][0] - match.start(), spans[n][1] - match.start()) for n in own]
                found.append(([ids[n] for n in own], shifted))
    return found


def _cuts(tokenizer: PreTrainedTokenizerBase, marker: str, pieces: Sequence[str]) -> tuple[int, ...] | None:
    """Where a marker is cut, so that each way of its tokens is broken; None where one of them cannot be."""
    chosen: list[int] = []
    for _, spans in _shown(tokenizer, marker, pieces):
        borders = {border for span in spans for border in span}
        inside = [place for place in range(1, len(marker)) if place not in borders]
        if not spans or not inside:
            return None
        if not set(chosen) & set(inside):
            chosen.append(inside[0])
    return tuple(sorted(chosen))


def _sequences(
    tokenizer: PreTrainedTokenizerBase, marker: str, pieces: Sequence[str], *, whole: bool
) -> list[tuple[int, ...]]:
    """Token ids of a marker, each way that they stand in.

    Where it is not cut in untrusted text, tokens that are not the marker's alone are left out: others may stand there.
    """
    found = []
    for ids, spans in _shown(tokenizer, marker, pieces):
        if spans and not whole:
            own = [token for token, span in zip(ids, spans, strict=True) if span[0] >= 0 and span[1] <= len(marker)]
            ids = own if len(own) > 1 else ids
        found.append(tuple(ids))
    return found
