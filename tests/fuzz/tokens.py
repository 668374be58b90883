"""Tokens as text, delta by delta; texts as tokens, none of which is a control token."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

from finch_rag.decode.detokenising import StopStrings, TextStream, strip_stream
from finch_rag.prompts.encoding import Encoder
from tests.small import CONTROL, chat_tokenizer

from .support import Choices, dictionary, holds, text_of

WORDS = (
    *CONTROL,
    "<|",
    "|>",
    "im_start",
    "\u00e9",
    "\U0001f600",
    "\u200d",
    "  ",
    "\n",
    "\t",
    "a",
    "the bridge",
    "\ufffd",
)
DICTIONARY = dictionary(WORDS)


@cache
def _encoder() -> Encoder:
    return Encoder(chat_tokenizer())


def seeds() -> list[bytes]:
    """Texts with characters of several bytes, and stop strings."""
    return [
        "\0\0The bridge \U0001f600 was built.".encode(),
        b"\x01\x03bui\x00the bridge was built <|im_end|> end",
        b"\x02\x01e\x00\xf0\x9f\x98\x80\xf0\x9f",
    ]


def check(data: bytes) -> None:
    """A way of streaming, stop strings, and a text or tokens."""
    choices = Choices(data)
    raw, length = choices.number(2), choices.number(6)
    stops = [stop for stop in text_of(choices.take(length), WORDS).split("\0") if stop]
    encoder = _encoder()
    body = choices.rest()
    if raw:
        ids = [int.from_bytes(body[n : n + 2], "little") % len(encoder.tokenizer) for n in range(0, len(body), 2)]
    else:
        text = text_of(body, WORDS)
        ids = encoder.encode([text])[0]
        holds(encoder.control_ids.isdisjoint(ids), "a control token came of a text")
        holds(encoder.decode(ids) == text, "the text is another one")
        told = encoder.encode_with_starts([text])
        holds(told is not None and told[0][0] == ids, "other tokens with their starts")
    whole = encoder.decode(ids)
    _check_stream(encoder, ids, whole, stops)


def _check_stream(encoder: Encoder, ids: list[int], whole: str, stops: list[str]) -> None:
    def deltas() -> Iterator[str]:
        stream = TextStream(encoder.decode)
        for token in ids:
            yield stream.push(token)
        yield stream.flush()

    holds("".join(deltas()) == whole, "the deltas' sum is another text")
    stopping, shown = StopStrings(stops), ""
    for delta in deltas():
        shown += stopping.push(delta)
        if stopping.stopped:
            break
    shown += "" if stopping.stopped else stopping.flush()
    ends = [place for stop in stops if (place := whole.find(stop)) >= 0]
    holds(shown == whole[: min(ends, default=len(whole))], "it stops elsewhere than before the first stop string")
    holds("".join(strip_stream(delta for delta in deltas())) == whole.strip(), "the stripped sum is another text")
