"""Stores of a server, and rankings."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from fastapi.testclient import TestClient

from finch_rag import Finch, SettingsError
from finch_rag.serve.shelf import Shelf

from ..small import texts
from .support import ASKED, CHAT, COMPLETIONS, DOCUMENTS, PASSAGES, QUESTION, client_of, error_in, served_finch

STORES = "/v1/stores"


@pytest.fixture
def shelf(engine: Finch, tmp_path: Path) -> Iterator[TestClient]:
    with client_of(engine, stores=tmp_path / "stores") as client:
        yield client


def filled(client: TestClient, name: str = "notes") -> str:
    assert client.post(STORES, json={"name": name}).status_code == 201
    assert client.post(f"{STORES}/{name}/passages", json={"passages": DOCUMENTS}).status_code == 200
    return f"{STORES}/{name}"


def test_a_store_is_made_filled_shown_and_deleted(shelf: TestClient, engine: Finch, tmp_path: Path) -> None:
    made = shelf.post(STORES, json={"name": "notes", "precision": "int8"})
    assert (made.status_code, made.json()["precision"]) == (201, "int8")
    added = shelf.post(f"{STORES}/notes/passages", json={"passages": DOCUMENTS}).json()
    assert (added["added"], added["known_tokens"]) == (3, 0)
    again = shelf.post(f"{STORES}/notes/passages", json={"passages": DOCUMENTS[:1]}).json()
    assert (again["added"], again["read_tokens"]) == (0, 0)
    assert again["known_tokens"] > 0
    shown = shelf.get(f"{STORES}/notes").json()
    assert (shown["passages"], shown["tokens"], shown["model"]) == (3, added["read_tokens"], engine.fingerprint)
    assert str(tmp_path) not in str(shown)
    shelf.post(STORES, json={"name": "a"})
    assert [store["name"] for store in shelf.get(STORES).json()["data"]] == ["a", "notes"]
    assert shelf.delete(f"{STORES}/notes").json()["deleted"] is True
    assert [path.name for path in (tmp_path / "stores").iterdir()] == ["a"]
    error_in(shelf.get(f"{STORES}/notes"), 404)
    assert shelf.post(STORES, json={"name": "notes"}).status_code == 201  # the name is free again


def test_a_store_is_searched(shelf: TestClient, engine: Finch) -> None:
    own = filled(shelf)
    found = shelf.post(f"{own}/search", json={"query": QUESTION, "top_k": 2}).json()["results"]
    store = engine.open_store()
    store.add(PASSAGES)
    expected = store.retrieve(QUESTION, 2)
    assert [(r["id"], r["title"], r["text"]) for r in found] == [
        (e.passage.id, e.passage.title, e.passage.text) for e in expected
    ]
    assert [r["share"] for r in found] == pytest.approx([e.share for e in expected], abs=1e-3)


def test_passages_are_removed_by_their_ids(shelf: TestClient) -> None:
    own = filled(shelf)
    error = error_in(shelf.delete(f"{own}/passages", params={"id": ["light", "nobody"]}), 400)
    assert "'nobody'" in error["message"]
    assert shelf.get(own).json()["passages"] == 3
    assert shelf.delete(f"{own}/passages", params={"id": ["light", "museum"]}).json()["removed"] == 2
    assert shelf.get(own).json()["passages"] == 1
    error_in(shelf.delete(f"{own}/passages"), 400)


def test_all_of_a_store_is_asked(shelf: TestClient, engine: Finch) -> None:
    filled(shelf)
    store = engine.open_store()
    store.add(PASSAGES)
    said: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello?"}]
    said += [{"role": "assistant", "content": "Yes?"}, *ASKED]
    body = shelf.post(CHAT, json={"messages": said, "store": "notes", "finch": {"report": True}}).json()
    history: Any = said[1:3]
    expected = engine.ask(QUESTION, store=store, history=history, system_prompt="Be brief.")
    assert body["choices"][0]["message"]["content"] == expected.text
    usage = body["usage"]
    assert usage["finch"]["report"]["searched_tokens"] == expected.report.searched_tokens > 0
    assert usage["prompt_tokens_details"]["cached_tokens"] == expected.report.known_tokens > 0
    cited = {own for c in body["choices"][0]["message"]["citations"] for own in c["document_ids"]}
    assert cited <= {"light", "harbour", "museum"}
    assert cited
    text = shelf.post(COMPLETIONS, json={"prompt": QUESTION, "store": "notes"}).json()
    assert text["choices"][0]["text"] == engine.ask(QUESTION, store=store).text


def test_documents_are_read_once_by_a_store(shelf: TestClient) -> None:
    shelf.post(STORES, json={"name": "notes"})
    sent = {"messages": ASKED, "documents": texts(3), "store": "notes"}
    first, second = (shelf.post(CHAT, json=sent).json() for _ in range(2))
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == second["usage"]["finch"]["context_tokens"]
    assert first["choices"][0]["message"] == second["choices"][0]["message"]


def test_a_store_lasts(engine: Finch, tmp_path: Path) -> None:
    with client_of(engine, stores=tmp_path) as client:
        own = filled(client)
    with client_of(engine, stores=tmp_path) as client:  # in the same process: the first has let go of it
        assert client.get(own).json()["passages"] == 3
        assert client.post(f"{own}/passages", json={"passages": DOCUMENTS}).json()["read_tokens"] == 0


def test_an_empty_store_has_no_answer(shelf: TestClient) -> None:
    shelf.post(STORES, json={"name": "empty"})
    assert "no passages" in error_in(shelf.post(CHAT, json={"messages": ASKED, "store": "empty"}), 400)["message"]


def test_a_store_is_asked_by_the_users_last_message(shelf: TestClient) -> None:
    filled(shelf)
    said = [*ASKED, {"role": "assistant", "content": "So"}]
    assert error_in(shelf.post(CHAT, json={"messages": said, "store": "notes"}), 400)["param"] == "messages"


NO_NAMES = [
    "..",
    ".",
    "a/b",
    "../x",
    "a/../../x",
    "",
    ".hidden",
    "-a",
    "a" * 65,
    "a b",
    "a\x00",
    "ä",
    "a..b",
    "C:x",
    "a\n",
    "a.",
    "a" * 10_000,
    "\\x",
    "%2e%2e",
    "\uff0e\uff0e",
    "\x1b[31m",
    "\u202ea",
    "[/bold]",
]


@pytest.mark.parametrize("name", NO_NAMES)
def test_no_name_leaves_the_folder(shelf: TestClient, engine: Finch, tmp_path: Path, name: str) -> None:
    (tmp_path / "x").mkdir()
    assert "name" in error_in(shelf.post(STORES, json={"name": name}), 400)["message"]
    error_in(shelf.post(CHAT, json={"messages": ASKED, "store": name}), 400)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "user-cache") == ["stores", "x"]
    assert list((tmp_path / "stores").iterdir()) == []


@pytest.mark.parametrize("name", NO_NAMES)
def test_a_name_that_cannot_be_is_one_short_line(shelf: TestClient, name: str) -> None:
    message = error_in(shelf.post(STORES, json={"name": name}), 400)["message"]
    assert message.isprintable()
    assert len(message) < 300
    if name in ("", ".", ".."):
        return  # another path
    encoded = quote(name, safe="")
    for method, path in (
        ("GET", ""),
        ("DELETE", ""),
        ("POST", "/search"),
        ("POST", "/passages"),
        ("DELETE", "/passages"),
    ):
        sent = {"query": "x", "passages": ["x"]} if method == "POST" else None
        response = shelf.request(method, f"{STORES}/{encoded}{path}?id=x", json=sent)
        assert response.status_code in (400, 404, 405)
        assert response.text.isprintable()


@pytest.mark.parametrize("own", ["\x1b[31m", "a\r\nX-Mine: y\nb", "\u202e", "\0", "[/bold]", "\u2028", "x" * 10_000])
def test_ids_of_any_characters_come_back_and_stay_out_of_headers_and_log(
    shelf: TestClient, caplog: pytest.LogCaptureFixture, own: str
) -> None:
    shelf.post(STORES, json={"name": "notes"})
    documents = [{"id": own, "title": own[:20], "text": DOCUMENTS[0]["text"], "url": own}]
    with caplog.at_level(logging.DEBUG, "finch_rag"):
        chat = shelf.post(CHAT, json={"messages": ASKED, "documents": documents})
        ranked = shelf.post("/v1/rerank", json={"query": "x", "documents": documents, "return_documents": True})
        added = shelf.post(f"{STORES}/notes/passages", json={"passages": documents})
        found = shelf.post(f"{STORES}/notes/search", json={"query": "x"})
        parts = shelf.post(CHAT, json={"messages": ASKED, "store": "notes", "stream": True})
        gone = shelf.delete(f"{STORES}/notes/passages", params={"id": own})
    for response in (chat, ranked, added, found, parts, gone):
        assert response.status_code == 200
        assert all(value.isprintable() for value in response.headers.values())
        assert "x-mine" not in response.headers
    assert [each["id"] for each in chat.json()["usage"]["finch"]["documents"]] == [own]
    assert [each["id"] for each in found.json()["results"]] == [own]
    assert gone.json()["removed"] == 1
    missing = error_in(shelf.delete(f"{STORES}/notes/passages", params={"id": own}), 400)["message"]
    assert missing.isprintable()
    logged = [record.getMessage() for record in caplog.records if record.name.startswith("finch_rag")]
    assert logged
    assert all(line.isprintable() and own not in line for line in logged)


@pytest.mark.parametrize("name", ["%2e%2e", "..%2fx", "%2e%2e%2fx", "..%5cx"])
def test_no_path_leaves_the_folder(shelf: TestClient, tmp_path: Path, name: str) -> None:
    (tmp_path / "x").mkdir()
    response = shelf.delete(f"{STORES}/{name}")
    assert response.status_code in (400, 404, 405)
    assert (tmp_path / "x").is_dir()


def test_what_is_no_store_is_not_touched(shelf: TestClient, engine: Finch, tmp_path: Path) -> None:
    other = tmp_path / "stores" / "photos"
    other.mkdir()
    (other / "a.jpg").touch()
    engine.open_store(tmp_path / "elsewhere").close()
    (tmp_path / "stores" / "linked").symlink_to(tmp_path / "elsewhere")
    assert shelf.get(STORES).json()["data"] == []
    for name in ("photos", "linked"):
        assert error_in(shelf.delete(f"{STORES}/{name}"), 404)["code"] == "store_not_found"
        error_in(shelf.post(STORES, json={"name": name}), 409)
    assert (other / "a.jpg").exists()


def test_unknown_and_taken_stores(shelf: TestClient) -> None:
    for request in (
        shelf.get(f"{STORES}/nobody"),
        shelf.delete(f"{STORES}/nobody"),
        shelf.post(f"{STORES}/nobody/search", json={"query": "x"}),
        shelf.post(f"{STORES}/nobody/passages", json={"passages": ["x"]}),
        shelf.post(CHAT, json={"messages": ASKED, "store": "nobody"}),
    ):
        assert error_in(request, 404)["code"] == "store_not_found"
    filled(shelf)
    error_in(shelf.post(STORES, json={"name": "notes"}), 409)


@pytest.mark.parametrize(
    ("path", "sent"),
    [
        ("", {}),
        ("", {"name": "x", "precision": "float64"}),
        ("/notes/passages", {"passages": []}),
        ("/notes/passages", {"passages": [{"id": "a"}]}),
        ("/notes/passages", {"passages": ["word " * 2000]}),
        ("/notes/search", {"query": "x", "top_k": 0}),
        ("/notes/search", {"query": ""}),
    ],
)
def test_bad_store_requests_are_refused(shelf: TestClient, path: str, sent: Any) -> None:
    filled(shelf)
    error_in(shelf.post(STORES + path, json=sent), 400)


def test_a_store_that_another_writes_is_a_conflict(shelf: TestClient, engine: Finch, tmp_path: Path) -> None:
    own = filled(shelf)
    other = Shelf(served_finch(), tmp_path / "stores")
    assert other.info("notes").passages == 3  # beside its writer
    assert other.names() == ["notes"]
    with pytest.raises(Exception, match="another process or engine"):
        other.store("notes")
    assert shelf.get(own).status_code == 200


def test_a_store_of_another_model_is_a_conflict(tmp_path: Path) -> None:
    with client_of(served_finch(seed=1), stores=tmp_path) as client:
        own = filled(client)
    with client_of(served_finch(), stores=tmp_path) as client:
        assert error_in(client.post(f"{own}/search", json={"query": "x"}), 409)["code"] == "store_error"


def test_a_server_without_a_folder_keeps_no_stores(client: TestClient) -> None:
    for response in (client.get(STORES), client.post(STORES, json={"name": "x"}), client.get(f"{STORES}/x")):
        assert "--store" in error_in(response, 404)["message"]


def test_the_folder_must_be_possible(engine: Finch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match="cannot be made"):
        Shelf(engine, tmp_path / "file" / "stores")


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
def test_documents_are_ranked(client: TestClient, engine: Finch, path: str) -> None:
    sent = {"model": "small", "query": QUESTION, "documents": DOCUMENTS, "return_documents": True}
    results = client.post(path, json=sent).json()["results"]
    expected = engine.rank(QUESTION, PASSAGES)
    assert [(r["index"], r["relevance_score"]) for r in results] == [(c.index, c.share) for c in expected]
    assert [r["document"]["text"] for r in results] == [PASSAGES[c.index].text for c in expected]
    best = client.post(path, json={"query": QUESTION, "documents": texts(6), "top_n": 2}).json()["results"]
    assert len(best) == 2
    assert "document" not in best[0]
    assert best[0]["relevance_score"] >= best[1]["relevance_score"]


@pytest.mark.parametrize(
    "sent",
    [{"documents": []}, {"query": ""}, {"top_n": 0}, {"documents": [{"id": 1}]}, {"query": 7}, {"documents": "x"}],
)
def test_bad_rankings_are_refused(client: TestClient, sent: Any) -> None:
    error_in(client.post("/v1/rerank", json={"query": "x", "documents": ["y"], **sent}), 400)
