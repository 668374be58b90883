"""The passage store: read once, searched for every question, in memory and on disk."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sqlite3
import threading
import weakref
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch

from finch_rag import Finch, InputError, NumericsError, Passage, PassageStore, SettingsError, StoreError
from finch_rag.store import storage
from finch_rag.store.fusion import fused
from finch_rag.store.index import StoreIndex

from .small import chat_tokenizer, small_finch, small_model, texts

QUESTION = "who built the bridge?"
HEADS = [(0, 1), (1, 2)]


def new_finch(**changes: Any) -> Finch:
    model = small_model(max_position_embeddings=4096, seed=changes.pop("seed", 0))
    return Finch(model, chat_tokenizer(), name="small", heads=HEADS, budget=60, max_new_tokens=4, **changes)


@pytest.fixture(scope="module")
def finch() -> Finch:
    return new_finch()


@pytest.fixture(params=["memory", "disk", "int8"])
def store(request: pytest.FixtureRequest, finch: Finch, tmp_path: Path) -> Iterator[PassageStore]:
    kinds: dict[str, dict[str, Any]] = {
        "memory": {},
        "disk": {"path": tmp_path / "store"},
        "int8": {"path": tmp_path / "store", "precision": "int8"},
    }
    with finch.open_store(heads=HEADS, **kinds[request.param]) as opened:
        yield opened


def named(count: int, seed: int = 0) -> list[Passage]:
    return [Passage(text, f"p{n}", f"T{n}", {"n": n}) for n, text in enumerate(texts(count, seed))]


def counting(finch: Finch) -> list[int]:
    """Tokens of each forward pass from now on."""
    passes: list[int] = []
    model: Any = finch.model
    model.base_model.layers[0].register_forward_pre_hook(lambda layer, args: passes.append(args[0].shape[1]))
    return passes


# Reading


def test_passages_are_read_once(store: PassageStore) -> None:
    first = store.add(named(9))
    assert (first.known_tokens, len(store)) == (0, 9)
    assert first.read_tokens == store.info().tokens > 9
    again = store.add([*named(12)[5:], Passage(" ", "blank"), named(1)[0]])
    assert (again.known_tokens > 0, again.hashes[-2]) == (True, "")
    assert len(store) == 12
    assert store.add(named(12)).read_tokens == 0
    assert "p11" in store
    assert "blank" not in store
    assert store.info().nbytes == store.info().tokens * store.bytes_per_token


def test_changed_text_is_read_and_takes_the_place_of_the_old(store: PassageStore) -> None:
    store.add(named(5))
    before = store.info().tokens
    store.add([Passage("The bridge is new.", "p3", "T3")])
    assert len(store) == 5
    assert store.info().tokens != before
    found = store.search(QUESTION, 5)
    assert sorted(str(cited.passage_id) for cited in found) == [f"p{n}" for n in range(5)]
    assert sorted(cited.index for cited in found) == [0, 1, 2, 3, 4]


def test_passages_with_the_same_text_share_what_was_read(store: PassageStore) -> None:
    text = "The bridge was built by Novak."
    store.add([Passage(text, "a"), Passage(text, "b"), text])
    assert len(store) == 3
    assert len(store.search(QUESTION)) == 1
    store.remove(["a"])
    assert store.search(QUESTION)[0].passage_id == "b"
    store.remove(["b"])
    assert store.search(QUESTION)[0].passage_id is None


def test_one_id_for_two_texts_is_refused_and_nothing_is_read(finch: Finch, store: PassageStore) -> None:
    twice = [Passage("The bridge.", "a"), Passage("The museum.", "b"), Passage("The canal.", "a")]
    with pytest.raises(InputError, match="passages 0 and 2 have the id 'a' and different texts") as caught:
        store.add(twice)
    assert "\n" not in str(caught.value)
    assert len(store) == 0
    store.add([twice[0], twice[0]])
    assert len(store) == 1
    store.clear()
    ranked = finch.rank(QUESTION, twice, store=store)  # what a retriever found has whatever ids it has
    assert [cited.passage_id for cited in sorted(ranked, key=lambda cited: cited.index)] == ["a", "b", "a"]
    assert (len(store), "a" in store, "b" in store) == (3, False, True)
    assert finch.ask(QUESTION, twice, store=store).report.stored_tokens == 0


def test_passages_are_handed_out_as_they_were_added(store: PassageStore) -> None:
    when: dict[Any, Any] = {"when": date(2026, 11, 27), 3: "x", (1, 2): "y"}
    added = [*named(5), Passage("The museum stands by the river.", metadata=when)]
    store.add(added)
    found = store.retrieve(QUESTION, 3)
    assert [(each.passage.id, each.share, each.tokens) for each in found] == [
        (cited.passage_id, cited.share, cited.passage_tokens) for cited in store.search(QUESTION, 3)
    ]
    by_place = {each.place: each.passage for each in store.retrieve(QUESTION)}
    assert [by_place[place] for place in range(5)] == added[:5]
    assert by_place[5].metadata == {"when": "2026-11-27", "3": "x"}  # as JSON keeps it


def test_progress_is_told_and_may_stop_what_was_read_stays(
    store: PassageStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finch_rag.store.store._SEGMENT_TOKENS", 60)
    monkeypatch.setattr("finch_rag.prefill.alone._TOKENS_PER_PASS", {"cpu": 40})
    told: list[tuple[int, int]] = []

    def stop(done: int, total: int) -> None:
        told.append((done, total))
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.add(named(12), stop)
    known = len(store)
    assert 0 < known < 12
    assert store.add(named(12), lambda done, total: told.append((done, total))).known_tokens > 0
    assert told[-1][0] == told[-1][1]
    assert len(store) == 12


# Searching


def test_a_search_ranks_as_the_attention_of_all_passages_does(finch: Finch, store: PassageStore) -> None:
    passages = named(20)
    added = store.add(passages)
    found = store.search(QUESTION, 20)
    assert [cited.share for cited in found] == sorted((cited.share for cited in found), reverse=True)
    assert sum(cited.share for cited in found) == pytest.approx(1, abs=1e-4)
    attention = store.attention_to(QUESTION, added.hashes)
    assert [cited.index for cited in found] == attention.argsort(descending=True).tolist()
    assert [cited.passage_id for cited in store.search(QUESTION, 3)] == [cited.passage_id for cited in found[:3]]
    with finch.open_store(heads=HEADS) as exact:
        exact.add(passages)
        torch.testing.assert_close(attention, exact.attention_to(QUESTION, added.hashes), atol=0.02, rtol=0.1)


def test_attention_to_some_is_as_if_there_were_no_others(finch: Finch, store: PassageStore) -> None:
    added = store.add(named(20))
    some = [added.hashes[n] for n in (3, 11, 4, 17)]
    with finch.open_store(heads=HEADS, precision=store.precision) as other:
        others = other.add([named(20)[n] for n in (3, 11, 4, 17)])
        if max(r.tokens for r in other._index.readings()) == max(r.tokens for r in store._index.readings()):
            torch.testing.assert_close(store.attention_to(QUESTION, some), other.attention_to(QUESTION, others.hashes))
    assert store.attention_to(QUESTION, [some[0], "", some[0]]).tolist()[1] == 0
    with pytest.raises(StoreError, match="1 passages are not in the store any more"):
        store.attention_to(QUESTION, ["gone"])


def test_search_does_not_depend_on_what_was_added_together(finch: Finch, store: PassageStore) -> None:
    for passage in reversed(named(15)):
        store.add([passage])
    with finch.open_store(heads=HEADS, precision=store.precision) as other:
        other.add(named(15))
        expected = {cited.passage_id: cited.share for cited in other.search(QUESTION, 15)}
    found = {cited.passage_id: cited.share for cited in store.search(QUESTION, 15)}
    assert found == pytest.approx(expected, abs=1e-3)


def test_another_retrievers_ranks_are_fused() -> None:
    assert fused([[1, 2, 3], [3, 1]], 20) == [1, 3, 2]
    assert fused([[1, 2]], 20) == [1, 2]


def test_a_search_takes_rankings_by_ids(store: PassageStore) -> None:
    store.add(named(10))
    plain = [str(cited.passage_id) for cited in store.search(QUESTION, 10)]
    last = plain[-1]
    lifted = [cited.passage_id for cited in store.search(QUESTION, 10, fuse=[[last, "unknown"], [last]])]
    assert lifted[0] == last
    assert set(lifted) == set(plain)


@pytest.mark.parametrize(
    "call",
    [
        lambda s: s.search(" "),
        lambda s: s.search(QUESTION, 0),
        lambda s: s.search(QUESTION, "x"),
        lambda s: s.search(QUESTION, fuse=["p0", "p1"]),
        lambda s: s.search(QUESTION, fuse=[["p0"]], fuse_k=0),
    ],
)
def test_a_search_that_cannot_work_is_one_line(store: PassageStore, call: Any) -> None:
    store.add(named(2))
    with pytest.raises(InputError) as caught:
        call(store)
    assert "\n" not in str(caught.value)


def test_an_empty_store_finds_nothing(finch: Finch, store: PassageStore) -> None:
    assert store.search(QUESTION) == []
    with pytest.raises(InputError, match="the store has no passages"):
        finch.ask(QUESTION, store=store)


# Asking


@pytest.mark.parametrize("shortlist", [None, 0, 100])
def test_a_question_is_answered_from_passages_that_are_known(
    finch: Finch, store: PassageStore, shortlist: int | None
) -> None:
    passages = named(20)
    first = finch.ask(QUESTION, passages, store=store, shortlist_tokens=shortlist)
    second = finch.ask(QUESTION, passages, store=store, shortlist_tokens=shortlist)
    assert (first.text, first.citations) == (second.text, second.citations)
    total = first.report.context_tokens
    assert (first.report.known_tokens, first.report.stored_tokens) == (0, total)
    assert (second.report.known_tokens, second.report.stored_tokens) == (total, 0)
    assert 0 < second.report.kept_tokens <= 60 < total
    for cited in second.citations:
        assert passages[cited.index].id == cited.passage_id
    ranked = finch.rank(QUESTION, passages, store=store)
    assert len(ranked) == 20
    if shortlist == 0:
        assert second.citations[0].passage_id == ranked[0].passage_id


def test_a_known_list_costs_a_pass_of_the_question_and_the_best(store: PassageStore) -> None:
    own = new_finch()
    with own.open_store(heads=HEADS) as known:
        known.add(named(20))
        passes = counting(own)
        answer = own.ask(QUESTION, named(20), store=known, shortlist_tokens=0, max_new_tokens=1)
    assert sum(passes) < answer.report.context_tokens / 2


def test_without_passages_the_whole_store_is_asked(finch: Finch, store: PassageStore) -> None:
    store.add(named(30))
    answer = finch.ask(QUESTION, store=store, shortlist_tokens=0)
    found = store.search(QUESTION, 1)[0]
    assert answer.citations[0].passage_id == found.passage_id
    assert answer.report.searched_tokens == store.info().tokens
    assert finch.rank(QUESTION, store=store)[0].passage_id == found.passage_id
    assert finch.compress(QUESTION, store=store).kept_tokens <= 60
    assert "".join(finch.stream(QUESTION, store=store, shortlist_tokens=0)) == answer.text


async def test_every_way_of_asking_takes_a_store(finch: Finch, store: PassageStore) -> None:
    store.add(named(30))
    answer = finch.ask(QUESTION, store=store)
    assert (await finch.aask(QUESTION, store=store)).text == answer.text
    many = finch.ask_many([QUESTION, "when?"], [], store=store)
    assert [each.text for each in many] == [answer.text, finch.ask("when?", store=store).text]
    shared = finch.ask_many([QUESTION, "when?"], named(30), store=store)
    assert shared[0].text == finch.ask(QUESTION, named(30), store=store).text
    assert (await finch.aask_many([QUESTION], [], store=store))[0].text == answer.text
    own = Finch(finch.model, finch.tokenizer, heads=HEADS, budget=60, max_new_tokens=4, store=store)
    assert own.ask(QUESTION).text == answer.text
    assert own.ask(QUESTION, named(3), store=None).report.known_tokens == 0
    assert own.chat([{"role": "user", "content": QUESTION}], named(30)).report.known_tokens > 0


@pytest.mark.parametrize("place", [True, "folder", Path("folder")])
def test_a_place_is_opened_once_and_again_after_it_was_closed(
    finch: Finch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    own = Finch(
        finch.model,
        finch.tokenizer,
        heads=HEADS,
        alone_heads=[(0, 1), (1, 2)],
        budget=60,
        max_new_tokens=4,
        store=place,
    )
    assert own.ask(QUESTION, named(5)).report.known_tokens == 0
    assert own.ask(QUESTION, store=False).report.context_tokens == 0
    first = own.store
    assert first is not None
    assert own.store is first
    if place is not True:
        assert own.ask(QUESTION, store=tmp_path / "x" / ".." / "folder").report.searched_tokens > 0
    assert own.ask(QUESTION).report.searched_tokens == first.info().tokens
    first.close()
    with pytest.raises(StoreError):
        own.ask(QUESTION, store=first)
    second = own.store
    assert second is not None
    assert second is not first
    assert len(second) == (0 if place is True else 5)
    second.close()
    assert finch.store is None


def test_an_engine_that_nobody_holds_is_gone_at_once() -> None:
    finch = new_finch(alone_heads=[(0, 1)])
    finch.ask(QUESTION, named(3), store=True)
    stores, model = finch.runtime.stores, weakref.ref(finch.model)
    gc.disable()  # a circle would keep the model's memory until some later time
    try:
        store = stores.at(True)
        del finch
        assert store is not None
        with pytest.raises(StoreError, match="the engine of these stores is gone"):
            stores.open()
        del stores, store
        assert model() is None
    finally:
        gc.enable()


def test_nan_in_the_attention_is_no_ranking() -> None:
    finch = new_finch()
    with finch.open_store(heads=HEADS) as store:
        store.add(named(3))
        model: Any = finch.model
        model.base_model.layers[1].self_attn.q_proj.weight.data.fill_(float("nan"))
        for call in (lambda: store.search(QUESTION), lambda: finch.ask(QUESTION, named(3), store=store)):
            with pytest.raises(NumericsError, match="attention is NaN"):
                call()


def test_a_call_without_passages_opens_no_store(tmp_path: Path) -> None:
    finch = new_finch()
    finch.chat("Hello!", store=tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_a_folder_that_the_engine_has_open_is_the_open_store(finch: Finch, tmp_path: Path) -> None:
    with finch.open_store(tmp_path / "store", heads=HEADS) as opened:
        opened.add(named(3))
        assert finch.ask(QUESTION, store=str(tmp_path / "store")).report.searched_tokens == opened.info().tokens
        assert finch.runtime.stores.at(tmp_path / "store") is opened


def test_asking_about_a_passage_without_its_metadata_leaves_it(finch: Finch, store: PassageStore) -> None:
    store.add([Passage("The bridge.", "a", metadata={"page": 3})])
    finch.ask(QUESTION, [Passage("The bridge.", "a")], store=store)
    assert store.passages()[0].metadata == {"page": 3}
    store.add([Passage("The bridge.", "a", metadata={"page": 4})])
    assert store.passages()[0].metadata == {"page": 4}
    store.add([Passage("The canal.", "a")])
    assert store.passages()[0].metadata == {}


def test_a_passage_that_is_known_is_not_written_again(
    finch: Finch, store: PassageStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.add([Passage("The bridge.", "a", metadata={"page": 3})])

    def refuse(*args: Any) -> None:
        raise AssertionError("written again")

    monkeypatch.setattr(StoreIndex, "add_passages", refuse)
    for known in (Passage("The bridge.", "a", metadata={"page": 3}), Passage("The bridge.", "a")):
        store.add([known])
    with pytest.raises(AssertionError):
        store.add([Passage("The bridge.", "a", metadata={"page": 4})])


@pytest.mark.parametrize("passages", [[], named(30)])
def test_a_known_question_takes_two_passes(passages: list[Passage]) -> None:
    finch = new_finch()
    with finch.open_store(heads=HEADS) as store:
        store.add(named(30))
        passes = counting(finch)
        report = finch.ask(QUESTION, passages, store=store, shortlist_tokens=0, max_new_tokens=1, quotes=False).report
        # The question and the neutral one; then what is kept together with the question.
        assert len(passes) == 2
        assert passes[1] == report.prefix_tokens + report.kept_tokens + report.question_tokens


def test_another_models_open_store_is_refused(store: PassageStore) -> None:
    store.add(named(3))
    other = new_finch(seed=1)
    for call in (lambda: other.ask(QUESTION, named(3), store=store), lambda: other.ask(QUESTION, store=store)):
        with pytest.raises(StoreError, match="filled by another model") as caught:
            call()
        assert "\n" not in str(caught.value)


def test_keys_do_not_depend_on_instructions_or_system_prompt(finch: Finch, store: PassageStore) -> None:
    store.add(named(9))
    answer = finch.ask(QUESTION, named(9), store=store, instructions="Answer in French.", system_prompt="Be kind.")
    assert answer.report.stored_tokens == 0


def test_a_store_ranks_whole_passages_only(finch: Finch, store: PassageStore) -> None:
    with pytest.raises(InputError, match='use selection="passage"'):
        finch.ask(QUESTION, named(3), store=store, selection="token")


def test_older_turns_of_a_conversation_are_not_stored(finch: Finch, store: PassageStore) -> None:
    history = [
        {"role": role, "content": f"{text} " * 60}
        for n in range(12)
        for role, text in (("user", f"q{n}"), ("assistant", "a"))
    ]
    answer = finch.ask(QUESTION, named(3), store=store, history=history)
    assert any("turn" in note for note in answer.report.notes)
    assert len(store) == 0


# Removing, limits


def test_removed_passages_are_not_found(store: PassageStore) -> None:
    store.add(named(10))
    store.remove(["p2", "p7"])
    assert len(store) == 8
    assert not {"p2", "p7"} & {str(cited.passage_id) for cited in store.search(QUESTION, 10)}
    store.remove(f"p{n}" for n in (0, 1, 3, 4, 5))  # less than half is left, and written anew
    assert [cited.passage_id for cited in store.search(QUESTION)] == [
        cited.passage_id for cited in sorted(store.search(QUESTION), key=lambda c: -c.share)
    ]
    assert len(store.search(QUESTION)) == 3
    assert store.verify() == []
    store.clear()
    assert (len(store), store.search(QUESTION)) == (0, [])
    store.add(named(3))
    assert len(store.search(QUESTION)) == 3


def test_unknown_ids_remove_nothing(store: PassageStore) -> None:
    store.add(named(3))
    with pytest.raises(InputError, match=r"1 of 2 ids are not in the store: 'x'; nothing was removed"):
        store.remove(["p1", "x"])
    assert len(store) == 3


def test_the_least_recently_used_go_where_there_is_no_room(finch: Finch, tmp_path: Path) -> None:
    passages = named(12)
    with finch.open_store(heads=HEADS) as free:
        tokens = [free.add([passage]).read_tokens for passage in passages]
        each = free.bytes_per_token
    with finch.open_store(tmp_path, heads=HEADS, max_bytes=sum(tokens[:8]) * each) as store:
        store.add(passages[:8])
        store.attention_to(QUESTION, store.add(passages[:2]).hashes)  # used again
        store.add(passages[8:10])
        assert store.info().nbytes <= sum(tokens[:8]) * each
        assert all(f"p{n}" in store for n in (0, 1, 8, 9))
        assert "p2" not in store
        with pytest.raises(InputError, match=r"more than max_bytes="):
            store.add(named(40, seed=1))
        assert store.verify() == []


def test_a_passage_longer_than_the_window_is_one_line(store: PassageStore) -> None:
    with pytest.raises(
        InputError, match=r"passage long has \d+ tokens, and the model's window has room for \d+: split it"
    ):
        store.add([*named(2), Passage("word " * 5000, "long")])
    assert len(store) == 0


# On disk


def test_what_is_on_disk_is_there_again(finch: Finch, tmp_path: Path) -> None:
    with finch.open_store(tmp_path, heads=HEADS) as store:
        store.add(named(20))
        expected = store.search(QUESTION, 20)
    with finch.open_store(tmp_path, heads=HEADS) as again:
        assert again.search(QUESTION, 20) == expected
        assert again.add(named(20)).read_tokens == 0
        assert again.verify() == []


def test_one_writes_and_many_read(finch: Finch, tmp_path: Path) -> None:
    with finch.open_store(tmp_path, heads=HEADS) as writer:
        writer.add(named(5))
        with pytest.raises(StoreError, match="another process or engine writes"):
            finch.open_store(tmp_path, heads=HEADS)
        with finch.open_store(tmp_path, heads=HEADS, read_only=True) as reader:
            assert len(reader.search(QUESTION)) == 5
            writer.add(named(9))
            assert len(reader.search(QUESTION)) == 9
            writer.remove(f"p{n}" for n in range(7))
            assert len(reader.search(QUESTION)) == 2
            for change in (lambda: reader.remove(["p8"]), lambda: reader.add(named(3)), reader.clear):
                with pytest.raises(StoreError, match="read-only"):
                    change()
            assert reader.add(named(9)[7:]).read_tokens == 0
    with finch.open_store(tmp_path, heads=HEADS) as free:
        assert len(free) == 2


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"precision": "int8"}, "another precision"),
        ({"heads": [(1, 1)]}, "another heads"),
    ],
)
def test_another_kind_of_keys_is_refused(finch: Finch, tmp_path: Path, settings: Any, reason: str) -> None:
    finch.open_store(tmp_path, heads=HEADS).close()
    with pytest.raises(StoreError, match=reason) as caught:
        finch.open_store(tmp_path, **{"heads": HEADS, **settings})
    assert "\n" not in str(caught.value)
    finch.open_store(tmp_path, heads=HEADS).close()  # the writer's lock is free


def test_another_models_store_is_refused(finch: Finch, tmp_path: Path) -> None:
    finch.open_store(tmp_path, heads=HEADS).close()
    with pytest.raises(StoreError, match="another model"):
        new_finch(seed=1).open_store(tmp_path, heads=HEADS)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"precision": "float8"}, "precision is 'float8'"),
        ({"max_bytes": 0}, "max_bytes is 0"),
        ({"path": 5}, "path is int"),
        ({"max_bytes": "1G"}, "max_bytes is '1G'"),
        ({"heads": "all"}, "heads for passages read alone are 'all'"),
        ({"heads": [(9, 9)]}, "does not exist"),
    ],
)
def test_a_setting_that_cannot_work_is_refused(finch: Finch, settings: Any, reason: str) -> None:
    with pytest.raises(SettingsError, match=reason):
        finch.open_store(**settings)


def segment_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("keys-*.safetensors"))


def test_a_damaged_segment_is_found_and_repaired(finch: Finch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finch_rag.store.store._SEGMENT_TOKENS", 60)
    monkeypatch.setattr(storage, "SMALL_SEGMENT", 0)
    with finch.open_store(tmp_path, heads=HEADS) as store:
        store.add(named(12))
    first, second, *_ = segment_files(tmp_path)
    content = bytearray(first.read_bytes())
    content[-3] ^= 255
    first.write_bytes(content)
    second.write_bytes(b"no segment")
    with finch.open_store(tmp_path, heads=HEADS) as store:
        with pytest.raises(StoreError, match=r"cannot be read.*verify\(repair=True\)") as caught:
            store.search(QUESTION)
        assert "\n" not in str(caught.value)
        damaged = store.verify()
        assert 2 <= len(damaged) < 12
        assert store.verify(repair=True) == damaged
        assert store.verify() == []
        assert len(store.search(QUESTION, 12)) == 12 - len(damaged)
        assert store.add(named(12)).read_tokens > 0
        assert len(store.search(QUESTION, 12)) == 12


def test_no_index_is_no_store(finch: Finch, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="there is no store in"):
        finch.open_store(tmp_path / "none", heads=HEADS, read_only=True)
    (tmp_path / "index.sqlite3").write_text("this is no database, but a text that is long enough to look like one")
    with pytest.raises(StoreError, match="cannot be opened as a store's index"):
        finch.open_store(tmp_path, heads=HEADS)
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="cannot be written"):
        finch.open_store(tmp_path / "file", heads=HEADS)


def test_a_full_disk_is_one_line_and_loses_nothing(
    finch: Finch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with finch.open_store(tmp_path, heads=HEADS) as store:
        store.add(named(5))

        def full(tensors: Any, file: str) -> None:
            Path(file).write_bytes(b"half")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("finch_rag.store.segments.save_file", full)
        with pytest.raises(StoreError, match=r"No space left on device.*max_bytes") as caught:
            store.add(named(9))
        assert "\n" not in str(caught.value)
        assert len(store) == 5
        monkeypatch.undo()
        assert len(store.search(QUESTION)) == 5
        store.add(named(9))
        assert len(store) == 9
    assert not list(tmp_path.glob(".keys-*"))


def shares(store: PassageStore) -> dict[str | None, float]:
    return {found.passage_id: round(found.share, 5) for found in store.search(QUESTION, 100)}


def test_an_id_that_gets_another_known_text_is_searched_as_in_a_new_store(finch: Finch, store: PassageStore) -> None:
    passages = named(6)
    store.add(passages)
    before = shares(store)
    store.add([Passage(passages[1].text, "p0", "T1")])
    with finch.open_store(heads=HEADS) as fresh:
        fresh.add(store.passages())
        assert shares(store) == pytest.approx(shares(fresh), abs=1e-3)
        assert shares(store) != before


def test_an_interrupt_right_behind_a_commit_leaves_what_was_committed(
    finch: Finch, store: PassageStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.add(named(4))
    store.search(QUESTION)  # which remembers what it looked at
    add_segment = StoreIndex.add_segment

    def interrupted(self: StoreIndex, *arguments: Any) -> None:
        add_segment(self, *arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(StoreIndex, "add_segment", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.add(named(8))
    monkeypatch.undo()
    assert store.verify() == []
    assert shares(store).keys() == {f"p{number}" for number in range(8)}
    assert store.add(named(9)).read_tokens < store.info().tokens


def test_metadata_that_holds_itself_is_refused(store: PassageStore) -> None:
    circle: dict[str, Any] = {}
    circle["circle"] = circle
    with pytest.raises(StoreError, match="the metadata of 'a' cannot be stored"):
        store.add([Passage("The bridge.", "a", metadata=circle)])


def _write_until_killed(folder: str, ready: Any) -> None:
    torch.set_num_threads(1)
    import finch_rag.store.store as module

    module._SEGMENT_TOKENS = 60
    store = new_finch().open_store(folder, heads=HEADS)
    for number in range(1000):
        store.add(named(3, seed=number + 1))
        if number >= 3:
            ready.set()
        store.remove([f"p{number % 3}"])


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
@pytest.mark.parametrize("delay", [0.0, 0.013, 0.031])
def test_a_process_that_is_killed_leaves_a_store_that_is_whole(finch: Finch, tmp_path: Path, delay: float) -> None:
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=_write_until_killed, args=(str(tmp_path), ready))
    process.start()
    assert ready.wait(120)
    threading.Event().wait(delay)
    os.kill(int(str(process.pid)), signal.SIGKILL)
    process.join()
    with finch.open_store(tmp_path, heads=HEADS) as store:
        assert store.verify() == []
        known = {str(cited.passage_id) for cited in store.search(QUESTION, 100)}
        assert known == set(store._index.ids())
        assert known <= {"p0", "p1", "p2"}
        store.add(named(12))
        assert len(store) == 12
    with sqlite3.connect(tmp_path / "index.sqlite3") as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_threads_share_a_store(finch: Finch, store: PassageStore) -> None:
    store.add(named(6))
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for _ in range(3):
                store.add([Passage(p.text, f"{seed}-{p.id}") for p in named(4, seed)])
                store.search(QUESTION)
                finch.ask(QUESTION, store=store, max_new_tokens=1)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(1, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(store) == 6 + 3 * 4


def test_any_thread_may_close_a_store(finch: Finch, tmp_path: Path) -> None:
    opened: list[PassageStore] = []
    thread = threading.Thread(target=lambda: opened.append(finch.open_store(tmp_path, heads=HEADS)))
    thread.start()
    thread.join()
    opened[0].close()
    finch.open_store(tmp_path, heads=HEADS).close()  # the folder is free


def test_small_additions_are_joined(finch: Finch, tmp_path: Path) -> None:
    with finch.open_store(tmp_path, heads=HEADS) as store:
        for passage in named(20):
            store.add([passage])
        assert len(segment_files(tmp_path)) == 1
        assert store.verify() == []


def test_a_small_engine_may_have_a_window_that_is_too_small_for_the_question() -> None:
    finch = small_finch()
    with finch.open_store(heads=HEADS) as store:
        store.add(texts(3))
        with pytest.raises(InputError, match=r"the question has \d+ tokens.*room for \d+"):
            store.search("who? " * 200)


def test_an_interrupted_addition_leaves_nothing_that_a_search_meets_and_nobody_named(
    store: PassageStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.add(named(2))
    before = store.search(QUESTION)
    transaction = StoreIndex.transaction

    def full(index: StoreIndex) -> Any:
        monkeypatch.setattr(StoreIndex, "transaction", broken)
        return transaction(index)

    def broken(index: StoreIndex) -> Any:
        raise StoreError("the disk is full")

    monkeypatch.setattr(StoreIndex, "transaction", full)  # from the second one on
    with pytest.raises(StoreError, match="full"):
        store.add(named(5))
    monkeypatch.undo()
    assert store.search(QUESTION) == before
    assert sum(cited.share for cited in store.search(QUESTION)) == pytest.approx(1, abs=1e-4)
    assert store.info().tokens == sum(cited.passage_tokens for cited in before)
    store.add(named(5))
    assert len(store.search(QUESTION)) == 5


def test_a_text_that_no_passage_has_any_more_is_not_searched(store: PassageStore) -> None:
    old, new = texts(2, seed=5)
    store.add([Passage(old, "a"), Passage(new, "b")])
    assert len(store.search(QUESTION)) == 2
    store.add([Passage(new, "a")])  # a known text: nothing is read
    assert [cited.share for cited in store.search(QUESTION)] == pytest.approx([1])
    store.add([Passage(old, "a"), Passage(new, "c")])
    assert len(store.search(QUESTION)) == 2


def test_a_text_that_moves_to_another_passage_is_not_lost(store: PassageStore) -> None:
    old, new = texts(2, seed=5)
    store.add([Passage(old, "a")])
    store.add([Passage(new, "a"), Passage(old, "b")])
    assert {found.passage.id: found.passage.text for found in store.retrieve(QUESTION)} == {"a": new, "b": old}
