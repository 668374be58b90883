from __future__ import annotations

import json
from typing import Any

import pytest

from finch_rag.serve.affinity import names_store, ranked, routing_key

from .support import ASKED, CHAT, DOCUMENTS


def key_of(path: str = CHAT, **fields: Any) -> str:
    return routing_key(path, json.dumps(fields).encode())


def test_the_same_documents_have_one_key_whatever_is_asked() -> None:
    one = key_of(messages=ASKED, documents=DOCUMENTS)
    other = key_of("/v1/rerank", query="Who?", documents=[dict(reversed(d.items())) for d in reversed(DOCUMENTS)])
    assert one == other
    assert one.startswith("documents ")
    assert not names_store(one)
    assert key_of(messages=ASKED, documents=DOCUMENTS[:2]) != one


def test_documents_in_messages_count_too() -> None:
    part = {"type": "document", "text": "The mill was built in 1851."}

    def asked(*parts: Any) -> str:
        return key_of(messages=[{"role": "user", "content": list(parts)}])

    assert asked({"type": "text", "text": "When?"}, part) == asked(part, {"type": "text", "text": "Who?"}) != ""
    assert asked({"type": "text", "text": "When?"}) == ""
    assert key_of("/v1/responses", input=[{"role": "user", "content": [{"type": "input_file", "text": "x"}]}]) != ""


def test_a_store_has_one_key_on_all_ways_to_it() -> None:
    key = key_of(messages=ASKED, store="contracts", documents=DOCUMENTS)
    assert names_store(key)
    assert key == key_of("/v1/stores", name="contracts", precision="int8")
    for path in ("/v1/stores/contracts", "/v1/stores/contracts/passages", "/v1/stores/con%74racts/search"):
        assert routing_key(path, b"") == key
    assert routing_key("/v1/stores/other", b"") != key
    assert key_of(messages=ASKED, store=False) == ""


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"[1]", b'{"documents": 3, "messages": [3]}', b"[" * 100_000])
def test_what_will_be_refused_may_go_anywhere(body: bytes) -> None:
    assert routing_key(CHAT, body) == ""


def test_keys_spread_and_stay_where_servers_come_and_go() -> None:
    servers = ["a", "b", "c"]
    first = {key: ranked(key, servers)[0] for key in map(str, range(300))}
    assert all(60 < list(first.values()).count(server) < 140 for server in servers)
    assert first == {key: ranked(key, servers[::-1])[0] for key in first}
    for key, server in first.items():
        grown = ranked(key, [*servers, "d"])[0]
        assert grown in (server, "d")
        if server != "c":
            assert ranked(key, ["a", "b"])[0] == server
