"""What the clients of a soak test send: a pool of requests whose answers are known, and what no client should send."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

MOST_BODY = 2**20  # bytes that the soak's server takes
STORE, CHANGING = "soak", "soak-changing"  # one that all ask, and one to which passages are added and taken
CHAT, COMPLETIONS, RERANK = "/v1/chat/completions", "/v1/completions", "/v1/rerank"

_THINGS = "harbour lighthouse museum bridge mill chapel quarry observatory theatre canal".split()
_PLACES = "Elmsworth Tarnby Skerry Oakholm Lindal Vesper Marrow Quill Brackton Ness".split()
_PEOPLE = ("Clara Novak", "Hugo Kessler", "Nan Corrigall", "Ivo Brandt", "Mara Lund", "Otto Finch", "Ada Moss")


@dataclass(frozen=True, slots=True)
class Sending:
    """One request, and what may come of it.

    Attributes:
        kind: What it is counted as.
        path: Of the URL.
        content: Its body.
        method: Of HTTP.
        number: In the pool, whose answer it must get; None where it is not of the pool.
        streamed: Whether the answer comes in pieces.
        announced: Whether the body's length is said before it comes.
        statuses: Those that it may get.
        patience: Seconds after which the client goes; None where it stays.
        whole: Whether its client waits for a response as a whole, and goes by its own limit for reads.
        pieces: After which the client goes; None where it stays.
    """

    kind: str
    path: str
    content: bytes
    method: str = "POST"
    number: int | None = None
    streamed: bool = False
    announced: bool = True
    statuses: frozenset[int] = frozenset({200})
    patience: float | None = None
    whole: bool = False
    pieces: int | None = None


def facts(rng: random.Random, count: int) -> list[str]:
    """Passages of one sentence, about different things.

    Args:
        rng: Draws them.
        count: How many, up to 100.
    """
    named = rng.sample([(thing, place) for thing in _THINGS for place in _PLACES], count)
    return [
        f"The {thing} of {place} was built in {rng.randint(1600, 1999)} by {rng.choice(_PEOPLE)}."
        for thing, place in named
    ]


def pool_of(seed: int, size: int) -> list[Sending]:
    """Different requests that can be answered; none is streamed.

    Args:
        seed: Of the draw.
        size: How many.
    """
    makers = (_chat, _store_chat, _chat, _completion, _conversation, _rerank, _chat, _search)
    rngs = [random.Random(f"{seed}/pool/{number}") for number in range(size)]
    return [replace(makers[number % len(makers)](rng, number), number=number) for number, rng in enumerate(rngs)]


def draw(rng: random.Random, pool: Sequence[Sending], hostile: float) -> Sending:
    """The next request of a client.

    Args:
        rng: The client's.
        pool: Requests that can be answered.
        hostile: How often it is none of these.
    """
    if rng.random() < hostile:
        return rng.choice(HOSTILE)(rng, pool)
    sending = rng.choice(pool)
    return _streamed(sending) if _streams(sending) and rng.random() < 0.5 else sending


def addition(passage: str, text: str) -> Sending:
    """Adds a passage to the store that changes.

    Args:
        passage: Its id.
        text: Its text.
    """
    return _post("store add", f"/v1/stores/{CHANGING}/passages", {"passages": [{"id": passage, "text": text}]})


def removal(passage: str) -> Sending:
    """Takes a passage from the store that changes.

    Args:
        passage: Its id.
    """
    return Sending("store delete", f"/v1/stores/{CHANGING}/passages?id={passage}", b"", method="DELETE")


def _post(kind: str, path: str, body: dict[str, Any]) -> Sending:
    return Sending(kind, path, json.dumps(body).encode())


def _question(rng: random.Random, documents: Sequence[str]) -> str:
    thing = rng.choice(documents).split(" was built")[0].removeprefix("The ")
    return rng.choice((f"When was the {thing} built?", f"Who built the {thing}?", f"What is known of the {thing}?"))


def _sampling(rng: random.Random, number: int) -> dict[str, Any]:
    drawn = {"temperature": 0.9, "top_p": 0.95, "seed": number} if number % 3 == 2 else {"temperature": 0}
    return {"max_tokens": rng.choice((4, 12, 24, 40)), **drawn}


def _documents(texts: Sequence[str]) -> list[dict[str, str]]:
    return [{"id": f"d{place}", "text": text} for place, text in enumerate(texts)]


def _chat(rng: random.Random, number: int) -> Sending:
    texts = facts(rng, rng.randint(2, 16))
    options = rng.choice(({}, {}, {"strategy": "loop"}, {"rounds": 2}, {"quotes": False}, {"selection": "token"}))
    messages = [{"role": "user", "content": _question(rng, texts)}]
    body = {"messages": messages, "documents": _documents(texts), "finch": options, **_sampling(rng, number)}
    return _post("chat", CHAT, body)


def _conversation(rng: random.Random, number: int) -> Sending:
    texts = facts(rng, rng.randint(2, 8))
    before = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hello, what shall I look up?"}]
    messages = [{"role": "system", "content": "Be brief."}, *before]
    messages.append({"role": "user", "content": _question(rng, texts)})
    return _post("chat", CHAT, {"messages": messages, "documents": _documents(texts), **_sampling(rng, number)})


def _store_chat(rng: random.Random, number: int) -> Sending:
    messages = [{"role": "user", "content": _question(rng, facts(rng, 1))}]
    return _post("store chat", CHAT, {"messages": messages, "store": STORE, **_sampling(rng, number)})


def _completion(rng: random.Random, number: int) -> Sending:
    texts = facts(rng, rng.randint(2, 8))
    body = {"prompt": _question(rng, texts), "documents": texts, **_sampling(rng, number)}
    return _post("completion", COMPLETIONS, body)


def _rerank(rng: random.Random, number: int) -> Sending:
    texts = facts(rng, rng.randint(3, 12))
    return _post("rerank", RERANK, {"query": _question(rng, texts), "documents": texts})


def _search(rng: random.Random, number: int) -> Sending:
    return _post("search", f"/v1/stores/{STORE}/search", {"query": _question(rng, facts(rng, 1)), "top_k": 5})


def _streams(sending: Sending) -> bool:
    return sending.path in (CHAT, COMPLETIONS)


def _streamed(sending: Sending) -> Sending:
    body = {**json.loads(sending.content), "stream": True}
    return replace(sending, content=json.dumps(body).encode(), kind=f"{sending.kind}, streamed", streamed=True)


Hostile = Callable[[random.Random, Sequence[Sending]], Sending]


def _any_answer(rng: random.Random, pool: Sequence[Sending]) -> Sending:
    return rng.choice([sending for sending in pool if _streams(sending)])


def _patience(rng: random.Random) -> float:
    return rng.choice((0.02, 0.2, 2.0)) * rng.random()


def _leaves_in_mid_stream(rng: random.Random, pool: Sequence[Sending]) -> Sending:
    streamed = _streamed(_any_answer(rng, pool))
    return replace(streamed, kind="leaves in mid-stream", pieces=rng.randint(1, 4))


def _leaves_before_the_first_piece(rng: random.Random, pool: Sequence[Sending]) -> Sending:
    chosen = rng.choice(pool)
    chosen = _streamed(chosen) if _streams(chosen) else chosen
    return replace(chosen, kind="leaves at once", patience=_patience(rng))


def _impatient(rng: random.Random, pool: Sequence[Sending]) -> Sending:
    return replace(rng.choice(pool), kind="too small a timeout", patience=_patience(rng), whole=True)


def _bad(kind: str, sending: Sending, status: int, **changes: Any) -> Sending:
    return replace(sending, kind=kind, number=None, statuses=frozenset({status}), **changes)


def _changed(sending: Sending, change: dict[str, Any]) -> bytes:
    return json.dumps({**json.loads(sending.content), **change}).encode()


def _bad_json(rng: random.Random, pool: Sequence[Sending]) -> Sending:
    sending = rng.choice(pool)
    return _bad("bad JSON", sending, 400, content=sending.content[: rng.randrange(1, len(sending.content))])


def _too_large(rng: random.Random, pool: Sequence[Sending]) -> Sending:
    content = b'{"prompt": "' + b"x" * MOST_BODY + b'"}'
    return _bad("body too large", _any_answer(rng, pool), 413, content=content, announced=rng.random() < 0.5)


def _unknown_model(rng: random.Random, pool: Sequence[Sending]) -> Sending:
    sending = _any_answer(rng, pool)
    return _bad("unknown model", sending, 404, content=_changed(sending, {"model": "nobody/knows-it"}))


def _unknown_store(rng: random.Random, pool: Sequence[Sending]) -> Sending:
    sending = _any_answer(rng, pool)
    return _bad("unknown store", sending, 404, content=_changed(sending, {"store": "nobody-made-it"}))


_WRONG: Sequence[dict[str, Any]] = (
    {"messages": 5, "prompt": 5},
    {"messages": [], "prompt": []},
    {"max_tokens": "many"},
    {"max_tokens": -1},
    {"temperature": []},
    {"temperature": -1},
    {"top_p": 9},
    {"seed": "x"},
    {"stop": 7},
    {"stream": "perhaps"},
    {"documents": {"a": 1}},
    {"documents": [{"text": None}]},
    {"documents": [None]},
    {"finch": []},
    {"finch": {"budget": -1}},
    {"finch": {"budgets": 1}},
    {"store": True},
    {"n": 2},
)


def _wrong_types(rng: random.Random, pool: Sequence[Sending]) -> Sending:
    sending = _any_answer(rng, pool)
    return _bad("wrong types", sending, 400, content=_changed(sending, rng.choice(_WRONG)))


def _empty_question(rng: random.Random, pool: Sequence[Sending]) -> Sending:
    sending, text = _any_answer(rng, pool), rng.choice(("", " ", "\n"))
    asked = {"messages": [{"role": "user", "content": text}]} if sending.path == CHAT else {"prompt": text}
    return _bad("empty question", sending, 400, content=_changed(sending, asked))


def _lone_surrogate(rng: random.Random, pool: Sequence[Sending]) -> Sending:
    sending = rng.choice(pool)
    return _bad("lone surrogate", sending, 400, content=sending.content.replace(b'?"', rb'? \ud83d"'))


HOSTILE: Sequence[Hostile] = (
    _leaves_in_mid_stream,
    _leaves_before_the_first_piece,
    _impatient,
    _bad_json,
    _too_large,
    _unknown_model,
    _unknown_store,
    _wrong_types,
    _empty_question,
    _lone_surrogate,
)
