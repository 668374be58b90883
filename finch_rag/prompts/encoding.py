"""Texts -> token ids. Retrieved text is untrusted: a control token's text inside it is tokenised as plain text.

So is the text of a role marker that is no control token, see `finch_rag.prompts.role_markers`.
"""

from __future__ import annotations

import re
import threading
from bisect import insort
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from .role_markers import RoleMarkers, role_markers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# White space, also as tokenizers write it: runs of it are added tokens of some, and text.
_WHITE_SPACE = " \t\n\r\u2581\u0120\u010a\u0109"


class Encoder:
    """Texts -> token ids and back, by one tokenizer. Safe to share between threads.

    Args:
        tokenizer: The tokenizer.

    Attributes:
        tokenizer: The tokenizer.
        control_ids: Of the tokens that no untrusted text becomes.
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
        self._control_texts = sorted(filter(None, control), key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, self._control_texts))) if self._control_texts else None

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
        found = [[token for _ in parts for token in next(encoded).ids] for parts in pieces]
        markers = self._markers
        return found if markers is None else [markers.broken(ids, [])[0] for ids in found]

    def encode_with_starts(self, texts: Sequence[str]) -> list[tuple[list[int], list[int]]] | None:
        """Like `encode`, with the place in the text where each token begins.

        Args:
            texts: Any texts.

        Returns:
            Token ids and their first characters, those of a token's leading white space included, of each text; None
            where the tokenizer does not tell them.
        """
        if not getattr(self.tokenizer, "is_fast", False):
            return None
        pieces = [list(self._without_control(text)) for text in texts]
        encoded = iter(self._encode_pieces([piece for parts in pieces for piece in parts], with_starts=True))
        found = []
        for parts in pieces:
            ids: list[int] = []
            starts: list[int] = []
            before = 0
            for part in parts:
                piece = next(encoded)
                ids += piece.ids
                starts += [before + start for start in piece.starts]
                before += len(part)
            found.append((ids, starts) if self._markers is None else self._markers.broken(ids, starts))
        return found

    def _encode_pieces(self, pieces: Sequence[str], with_starts: bool = False) -> list[_Piece]:
        """Token ids of texts that hold no control token as it is written.

        A normaliser may still make one of look-alike characters. Such a text is cut in two until none is made, so that
        the text stays; only a single character that stands for a control token is left out.
        """
        if not pieces:
            return []
        options = {"return_offsets_mapping": True} if with_starts else {}
        with self._lock:
            told = self.tokenizer(list(pieces), add_special_tokens=False, **options)
        offsets = told["offset_mapping"] if with_starts else [()] * len(pieces)
        encoded = [
            _Piece(list(ids), [start for start, _ in own]) for ids, own in zip(told["input_ids"], offsets, strict=True)
        ]
        hit = [place for place, piece in enumerate(encoded) if not self._never.isdisjoint(piece.ids)]
        halves = [half for place in hit for half in _halves(pieces[place])]
        if not halves:
            return encoded
        again = iter(self._encode_pieces([half for half in halves if half], with_starts))
        for place in hit:
            ids: list[int] = []
            starts: list[int] = []
            before = 0
            for half in _halves(pieces[place]):
                piece = next(again) if half else _Piece([], [])
                ids += piece.ids
                starts += [before + start for start in piece.starts]
                before += len(half)
            encoded[place] = _Piece(ids, starts)
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

    @cached_property
    def _markers(self) -> RoleMarkers | None:
        with self._lock:
            return role_markers(self.tokenizer, self._control)

    @cached_property
    def _never(self) -> frozenset[int]:
        """Tokens that no untrusted text becomes."""
        return self.control_ids if self._markers is None else self.control_ids | self._markers.tokens

    @cached_property
    def _to_cut(self) -> re.Pattern[str] | None:
        """Control tokens, and role markers that are cut."""
        markers = () if self._markers is None else self._markers.cuts
        longest_first = sorted((*self._control_texts, *markers), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    def _without_control(self, text: str) -> Iterator[str]:
        """Cuts a text behind the first character of each control token in it, so that no piece holds one.

        A role marker is cut where its own tokens have no border.
        """
        wanted = self._to_cut
        cuts = {} if self._markers is None else self._markers.cuts
        start = after = 0
        ahead: list[int] = []  # of markers that have begun, ascending
        while wanted is not None and (match := wanted.search(text, after)):
            after = match.start() + 1
            while ahead and ahead[0] < after:
                if ahead[0] > start:
                    yield text[start : ahead[0]]
                start = ahead.pop(0)
            for place in cuts.get(match[0], (1,)):
                if (cut := match.start() + place) not in ahead:
                    insort(ahead, cut)
        for cut in ahead:
            yield text[start:cut]
            start = cut
        yield text[start:]


class _Piece(NamedTuple):
    """A piece of a text as tokens: their ids, and where each begins in it if that was asked for."""

    ids: list[int]
    starts: list[int]


def _halves(text: str) -> tuple[str, str]:
    """A text in two parts; both are empty where it is a single character."""
    middle = len(text) // 2
    return (text[:middle], text[middle:]) if middle else ("", "")
