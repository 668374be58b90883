"""The commands that keep and ask stores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finch_rag import Finch
from finch_rag.cli import session
from finch_rag.heads.stored import load_heads
from finch_rag.paths import cache_folder

from .command_line import one_error, only_json, run

QUESTION = "Who built the lighthouse on the rock?"
LIGHTHOUSE = "island.md#lighthouse"
NEW = "## Mill\nThe mill was built by Morag Tulloch."

pytestmark = pytest.mark.usefixtures("hashed")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "notes.store"


def indexed(corpus: Path, store: Path, model: str, *options: Any) -> dict[str, Any]:
    return only_json(run("index", corpus, "--store", store, "--model", model, "--json", *options))


def test_only_what_is_new_or_changed_is_read(corpus: Path, store: Path, model_folder: str) -> None:
    first = indexed(corpus, store, model_folder)
    assert (first["passages"], first["known_tokens"], first["removed"]) == (3, 0, 0)
    assert first["read_tokens"] > 0
    assert first["bytes"] == first["read_tokens"] * first["bytes_per_token"]
    again = indexed(corpus, store, model_folder)
    assert (again["read_tokens"], again["known_tokens"]) == (0, first["read_tokens"])
    (corpus / "more.md").write_text(NEW)
    more = indexed(corpus, store, model_folder)
    assert 0 < more["read_tokens"] < first["read_tokens"]
    assert (more["passages"], more["known_tokens"]) == (4, first["read_tokens"])
    (corpus / "more.md").write_text(NEW.replace("Morag", "Clara"))
    changed = indexed(corpus, store, model_folder)
    assert (changed["passages"], changed["removed"]) == (4, 0)
    assert 0 < changed["read_tokens"] < first["read_tokens"]
    (corpus / "more.md").unlink()
    assert indexed(corpus, store, model_folder)["removed"] == 1
    assert only_json(run("store", "info", store, "--json"))["passages"] == 3


def test_index_in_words(corpus: Path, store: Path, model_folder: str) -> None:
    first = run("index", corpus, "--store", store, "--model", model_folder, "--precision", "int8")
    assert first.exit_code == 0
    assert "3 passages, read" in first.stdout
    assert "a second)" in first.stdout
    (corpus / "island.md").write_text("# Island\nThe island has a harbour.")
    again = run("index", corpus, "--store", store, "--model", model_folder, "--precision", "int8").stdout
    assert "0 tokens were known, 3 removed" in again
    assert "bytes a token" in again


def test_one_store_holds_several_corpora(corpus: Path, store: Path, model_folder: str, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "mill.md").write_text(NEW)
    indexed(corpus, store, model_folder)
    indexed(other, store, model_folder)
    indexed(corpus, store, model_folder)
    assert only_json(run("store", "info", store, "--json"))["passages"] == 4
    (other / "island.md").write_text("## Lighthouse\nAnother one.")
    line = one_error(run("index", other, "--store", store, "--model", model_folder))
    assert f"1 of 2 ids are in the store from {corpus}" in line
    assert f"such as '{LIGHTHOUSE}': use a store of its own" in line
    assert only_json(run("store", "info", store, "--json"))["passages"] == 4


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_a_store_is_asked_and_ranked_as_a_whole(corpus: Path, store: Path, model_folder: str, precision: str) -> None:
    tokens = indexed(corpus, store, model_folder, "--precision", precision)["read_tokens"]
    asked = only_json(run("ask", QUESTION, "--store", store, "--model", model_folder, "--json"))
    assert asked["report"]["searched_tokens"] == tokens
    ranked = only_json(run("rank", QUESTION, "--store", store, "--model", model_folder, "--limit", 2, "--json"))
    assert len(ranked["citations"]) == 2
    assert {cited["passage_id"].partition("#")[0] for cited in ranked["citations"]} == {"island.md"}
    words = run("ask", QUESTION, "--store", store, "--model", model_folder).stdout
    assert f"found among {tokens:,} tokens that were known" in words


def test_a_store_is_looked_at_and_kept_without_its_model(corpus: Path, store: Path, model_folder: str) -> None:
    made = indexed(corpus, store, model_folder)
    info = only_json(run("store", "info", store, "--json"))
    assert (info["passages"], info["tokens"], info["precision"]) == (3, made["read_tokens"], "bfloat16")
    assert (info["nbytes"], info["bytes_per_token"]) == (made["bytes"], made["bytes_per_token"])
    finch = Finch.from_pretrained(model_folder, heads="all")
    assert info["model"] == finch.fingerprint
    assert info["heads"] == [list(pair) for pair in sorted(load_heads(finch.model, "alone") or [])]
    assert f"{info['tokens']:,}" in run("store", "info", store).stdout
    assert "all keys of 3 passages are whole" in run("store", "verify", store).stdout
    (segment,) = store.glob("keys-*.safetensors")
    content = bytearray(segment.read_bytes())
    content[-1] ^= 255
    segment.write_bytes(content)
    damaged = run("store", "verify", store)
    assert damaged.exit_code == 1
    assert "3 passages are damaged; --repair removes them: island.md#harbour" in damaged.stdout
    assert only_json(run("store", "verify", store, "--repair", "--json")) == {
        "passages": 0,
        "damaged": [LIGHTHOUSE.replace("lighthouse", name) for name in ("harbour", "lighthouse", "redmuseumred")],
        "repaired": True,
    }
    assert indexed(corpus, store, model_folder)["read_tokens"] == made["read_tokens"]
    assert "3 passages removed" in run("store", "clear", store).stdout
    assert only_json(run("store", "info", store, "--json"))["tokens"] == 0


def test_the_second_question_over_a_corpus_reads_nothing(corpus: Path, model_folder: str) -> None:
    common = ("--corpus", corpus, "--model", model_folder, "--json")
    first = only_json(run("ask", QUESTION, *common))
    second = only_json(run("ask", "When did the museum open?", *common))
    assert first["report"]["stored_tokens"] == second["report"]["known_tokens"] > 0
    assert second["report"]["stored_tokens"] == 0
    assert {cited["passage_id"].partition("#")[0] for cited in second["citations"]} == {"island.md"}
    ranked = only_json(run("rank", QUESTION, *common))
    assert {cited["passage_id"] for cited in ranked["citations"]} >= {LIGHTHOUSE}
    anew = only_json(run("ask", QUESTION, *common, "--no-store"))
    assert (anew["report"]["known_tokens"], anew["report"]["stored_tokens"]) == (0, 0)
    assert anew["report"]["chunks"] > 0
    by_loop = only_json(run("ask", QUESTION, *common, "--strategy", "loop"))
    assert (by_loop["report"]["strategy"], by_loop["report"]["known_tokens"]) == ("loop", 0)
    tokens = only_json(run("ask", QUESTION, *common, "--selection", "token"))
    assert tokens["report"]["known_tokens"] == 0


def test_corpora_of_the_same_names_do_not_push_each_other_out(corpus: Path, model_folder: str, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "island.md").write_text("# Island\n\n## Lighthouse\nThe lighthouse is white.\n")
    for folder, known in ((corpus, False), (other, False), (corpus, True), (other, True)):
        report = only_json(run("ask", QUESTION, "--corpus", folder, "--model", model_folder, "--json"))["report"]
        assert (report["stored_tokens"] == 0) is known


def test_without_a_usable_cache_a_question_is_answered_and_a_note_says_so(corpus: Path, model_folder: str) -> None:
    folder = cache_folder("stores")
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.write_text("a file where the folder should be")
    result = run("ask", QUESTION, "--corpus", corpus, "--model", model_folder, "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["report"]["known_tokens"] == 0
    assert "passages are read anew" in result.stderr


def test_the_commands_own_store_has_a_limit(corpus: Path, model_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    finch = Finch.from_pretrained(model_folder, heads="all")
    with session.known_passages(finch, None, keep=True) as known:
        assert known is not None
        assert known.max_bytes == session._MOST_KEY_BYTES
        assert known.path == cache_folder("stores") / finch.fingerprint
    with session.known_passages(finch, None, keep=False) as known:
        assert known is None


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "name what is asked: --corpus PATH, or --store DIR"),
        (("--corpus", "c", "--store", "s"), "name what is asked"),
        (("--store", "s", "--no-store"), "leave one of them out"),
        (("--store", "s", "--top-k", 3), "--top-k is for a corpus"),
    ],
)
@pytest.mark.parametrize("command", ["ask", "rank"])
def test_it_must_be_clear_what_is_asked(command: str, args: tuple[Any, ...], message: str) -> None:
    assert message in one_error(run(command, QUESTION, *args))


def test_what_is_no_store_is_said_in_one_line(corpus: Path, store: Path, model_folder: str, tmp_path: Path) -> None:
    for command in ("info", "verify", "clear"):
        assert "there is no store in" in one_error(run("store", command, tmp_path / "nowhere"))
    assert "there is no store in" in one_error(run("ask", QUESTION, "--store", corpus, "--model", model_folder))
    indexed(corpus, store, model_folder)
    line = one_error(run("index", corpus, "--store", store, "--model", model_folder, "--precision", "int8"))
    assert "was made for another precision" in line
    (store / "index.sqlite3").write_text("damaged " * 200)
    for command in ("info", "verify", "clear"):
        assert "index.sqlite3" in one_error(run("store", command, store))
