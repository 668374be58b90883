"""Any row of additions, removals, crashes and full disks leaves a store that says what a plain dictionary says.

What `add` has returned for is there after a crash; what a failed call has changed is whole or not there at all; and a
search ranks as one among all passages ever read does.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from finch_rag import Finch, InputError, Passage, PassageStore, StoreError
from finch_rag.store import segments, storage
from finch_rag.store import store as module
from finch_rag.store.index import StoreIndex

from .small import chat_tokenizer, small_model, texts
from .state_settings import run_machine

QUESTION = "who built the bridge?"
HEADS = [(0, 1), (1, 2)]
TEXTS = texts(10, seed=3, longest=12)
IDS = (None, "p0", "p1", "p2", "p3", "p4")
ROUNDING = 0.01  # of a share: what is read beside others is rounded to bfloat16 a little otherwise
NEVER = 99  # no call has so many moments

PASSAGES = st.lists(
    st.builds(
        lambda text, own, page: Passage(TEXTS[text], own, metadata={"page": page} if page else {}),
        st.integers(0, len(TEXTS) - 1),
        st.sampled_from(IDS),
        st.integers(0, 2),
    ),
    min_size=1,
    max_size=5,
)


@cache
def engine() -> Finch:
    model = small_model(max_position_embeddings=4096)
    return Finch(model, chat_tokenizer(), name="small", heads=HEADS, budget=60, max_new_tokens=1)


@cache
def everything(precision: Any) -> tuple[PassageStore, dict[str, str]]:
    """A store that has read all texts, and their hashes."""
    store = engine().open_store(heads=HEADS, precision=precision)
    return store, dict(zip(TEXTS, store.add(TEXTS).hashes, strict=True))


@dataclass(frozen=True)
class Kept:
    """What is known of a passage.

    Attributes:
        passage: As it should be handed out.
        call: The call that added it; places in the store follow the calls.
    """

    passage: Passage
    call: int


class Moments:
    """The moments of writing at which a process may die, or a disk be full; something happens at one of them."""

    def __init__(self, number: int, happens: Callable[[bool], None]) -> None:
        self._number, self._happens = number, happens
        self.seen = 0
        self.at = ""  # what it was in which it happened

    def passed(self, at: str) -> None:
        self.seen += 1
        if self.seen == self._number + 1:
            self.at = at
            self._happens(at == "transaction")

    @contextmanager
    def watched(self) -> Iterator[None]:
        """While it is open, moments pass."""
        with ExitStack() as patches:
            for owner, name in (
                (segments, "save_file"),
                (os, "fsync"),
                (Path, "replace"),
                (Path, "unlink"),
            ):
                patches.enter_context(patch.object(owner, name, self._around(getattr(owner, name))))
            patches.enter_context(patch.object(StoreIndex, "transaction", self._transaction(StoreIndex.transaction)))
            yield

    def _around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **options: Any) -> Any:
            self.passed(function.__name__)
            result = function(*args, **options)
            if function.__name__ == "save_file":
                self.passed(function.__name__)
            return result

        return watched

    def _transaction(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @contextmanager
        def watched(index: StoreIndex) -> Iterator[sqlite3.Connection]:
            with function(index) as connection:
                self.passed("transaction")
                yield connection
                self.passed("transaction")

        return watched


class StoreMachine(RuleBasedStateMachine):
    """A store in a folder, its writer, and maybe a reader."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp())
        self.folders = 0
        self.known: dict[str, Kept] = {}
        self.calls = 0
        self.reader: PassageStore | None = None
        self.store: PassageStore

    @initialize(precision=st.sampled_from(("bfloat16", "int8")))
    def begin(self, precision: Any) -> None:
        self.precision = precision
        self.folder = self._new_folder()
        self.store = self._open(self.folder)

    def teardown(self) -> None:
        self._close()
        shutil.rmtree(self.root)

    def _new_folder(self) -> Path:
        self.folders += 1
        return self.root / str(self.folders)

    def _open(self, folder: Path, read_only: bool = False) -> PassageStore:
        return engine().open_store(folder, heads=HEADS, precision=self.precision, read_only=read_only)

    def _close(self) -> None:
        for store in filter(None, (getattr(self, "store", None), self.reader)):
            store.close()
        self.reader = None

    # What the plain dictionary says

    def _key(self, passage: Passage) -> str:
        return passage.id or everything(self.precision)[1][passage.text]

    def _with(self, passages: list[Passage]) -> dict[str, Kept]:
        known = dict(self.known)
        for passage in passages:
            key = self._key(passage)
            before = known.get(key)
            if before is None:
                known[key] = Kept(passage, self.calls)
            elif before.passage.text == passage.text and not passage.metadata:
                continue
            else:
                known[key] = replace(before, passage=passage)
        return known

    @staticmethod
    def _clashes(passages: list[Passage]) -> bool:
        named: dict[str, str] = {}
        return any(p.id is not None and named.setdefault(p.id, p.text) != p.text for p in passages)

    def _check(self, store: PassageStore, known: dict[str, Kept]) -> None:
        found = store.passages()
        assert {self._key(p): p for p in found} == {key: kept.passage for key, kept in known.items()}
        assert len(found) == len(store) == len(known)
        calls = [known[self._key(p)].call for p in found]
        assert calls == sorted(calls)
        assert store.verify() == []
        self._check_search(store, known)

    def _check_search(self, store: PassageStore, known: dict[str, Kept]) -> None:
        reference, hashes = everything(self.precision)
        different = {hashes[kept.passage.text] for kept in known.values()}
        cited = store.search(QUESTION, 99)
        assert len(cited) == len(different)
        if not cited:
            return
        wanted = sorted(different)
        attention = reference.attention_to(QUESTION, wanted)
        shares = dict(zip(wanted, (attention / attention.sum()).tolist(), strict=True))
        by_place = [hashes[p.text] for p in store.passages()]
        assert {by_place[each.index]: each.share for each in cited} == pytest.approx(shares, abs=ROUNDING)
        assert [each.share for each in cited] == sorted((each.share for each in cited), reverse=True)

    def _take(self, store: PassageStore, before: dict[str, Kept], after: dict[str, Kept]) -> None:
        """What is there after a call that came to no good end: of each passage the old or the new."""
        found = {self._key(p): p for p in store.passages()}
        for key in before.keys() | after.keys():
            old, new = before.get(key), after.get(key)
            assert found.get(key) in (old and old.passage, new and new.passage), key
        assert found.keys() <= before.keys() | after.keys()
        either = {**after, **before}
        self.known = {key: replace(either[key], passage=passage) for key, passage in found.items()}
        self._check(store, self.known)

    # Rules

    @rule(passages=PASSAGES)
    def add(self, passages: list[Passage]) -> None:
        self.calls += 1
        if self._clashes(passages):
            with pytest.raises(InputError, match="different texts"):
                self.store.add(passages)
            return
        read = {kept.passage.text for kept in self.known.values()}
        added = self.store.add(passages)
        self.known = self._with(passages)
        assert (added.read_tokens == 0) == ({p.text for p in passages} <= read)
        assert self.store.add(passages).read_tokens == 0

    @precondition(lambda self: self.known)
    @rule(data=st.data(), unknown=st.booleans())
    def remove(self, data: st.DataObject, unknown: bool) -> None:
        ids = data.draw(st.lists(st.sampled_from(sorted(self.known)), min_size=1, max_size=3, unique=True))
        if unknown:
            with pytest.raises(InputError, match="nothing was removed"):
                self.store.remove([*ids, "nobody"])
        else:
            self.store.remove(ids)
            self.known = {key: kept for key, kept in self.known.items() if key not in ids}

    @rule()
    def clear(self) -> None:
        self.store.clear()
        self.known = {}

    @rule()
    def ask(self) -> None:
        if not self.known:
            with pytest.raises(InputError, match="no passages"):
                engine().ask(QUESTION, store=self.store)
            return
        answer = engine().ask(QUESTION, store=self.store)
        assert answer.report.searched_tokens == self.store.info().tokens
        known = {(kept.passage.id, kept.passage.text) for kept in self.known.values()}
        best = self.store.retrieve(QUESTION, 1)[0].passage
        assert answer.citations
        assert {cited.passage_id for cited in answer.citations} <= {own for own, _ in known}
        assert best in [kept.passage for kept in self.known.values()]

    @rule(places=st.lists(st.integers(0, len(TEXTS) - 1), min_size=1, max_size=4, unique=True))
    def rank(self, places: list[int]) -> None:
        """A ranking reads what the store does not know."""
        self.calls += 1
        passages = [Passage(TEXTS[place]) for place in places]
        ranked = engine().rank(QUESTION, passages, store=self.store)
        self.known = self._with(passages)
        reference, hashes = everything(self.precision)
        attention = reference.attention_to(QUESTION, [hashes[p.text] for p in passages])
        shares = (attention / attention.sum()).tolist()
        assert {each.index: each.share for each in ranked} == pytest.approx(dict(enumerate(shares)), abs=ROUNDING)

    @rule()
    def close_and_open(self) -> None:
        self.store.close()
        self.store = self._open(self.folder)

    @rule()
    def read_beside(self) -> None:
        if self.reader is None:
            self.reader = self._open(self.folder, read_only=True)
        else:
            self.reader.close()
            self.reader = None

    @rule(
        passages=PASSAGES, removed=st.integers(0, 5), moment=st.integers(0, 14) | st.just(NEVER), goes_on=st.booleans()
    )
    def crash(self, passages: list[Passage], removed: int, moment: int, goes_on: bool) -> None:
        """A process dies: what it had written then is opened by another one."""
        copy = self._new_folder()

        def dies(in_index: bool) -> None:
            shutil.copytree(self.folder, copy)
            for half in copy.rglob("*"):  # what is not in its place yet may be there in part
                if any(part.startswith(".") for part in half.relative_to(copy).parts) and half.is_file():
                    half.write_bytes(half.read_bytes()[: half.stat().st_size // 2])

        moments = Moments(moment, dies)
        before = self.known
        call, after = self._call(passages, removed)
        with moments.watched():
            call()
        if moments.seen <= moment:
            dies(False)
            before = after
        self.known = after
        self._check(self.store, after)
        if goes_on:
            self._close()
            self.folder, self.store = copy, self._open(copy)
            self._take(self.store, before, after)
        else:
            with self._open(copy) as died:
                self._take(died, before, after)
            self.known = after

    @rule(passages=PASSAGES, removed=st.integers(0, 5), moment=st.integers(0, 14))
    def full_disk(self, passages: list[Passage], removed: int, moment: int) -> None:
        """Something cannot be written: one line says so, and nothing is half there."""

        def fails(in_index: bool) -> None:
            raise sqlite3.OperationalError("database or disk is full") if in_index else OSError(28, "No space left")

        moments = Moments(moment, fails)
        before = self.known
        call, after = self._call(passages, removed)
        try:
            with moments.watched():
                call()
        except StoreError as error:
            self._take(self.store, before, after)
            if "\n" in str(error):  # not one line
                raise
        else:
            assert moments.at in ("", "unlink")  # what cannot be deleted now is dropped by the next writer
            self.known = after

    def _call(self, passages: list[Passage], removed: int) -> tuple[Callable[[], object], dict[str, Kept]]:
        """Adds passages, or removes some; and what is known then."""
        self.calls += 1
        ids = sorted(self.known)[:removed]
        if ids:
            return lambda: self.store.remove(ids), {k: kept for k, kept in self.known.items() if k not in ids}
        if self._clashes(passages):
            passages = passages[:1]
        return lambda: self.store.add(passages), self._with(passages)

    @precondition(lambda self: self.known)
    @rule(which=st.integers(0, 9), place=st.integers(0, 10**6), cuts=st.booleans())
    def damage(self, which: int, place: int, cuts: bool) -> None:
        """A segment is cut or changed: what is lost is said, can be removed, and nothing else is."""
        self._close()
        files = sorted(self.folder.glob("keys-*.safetensors"))
        file = files[which % len(files)]
        content = bytearray(file.read_bytes())
        if cuts:
            del content[place % len(content) :]
        else:  # its keys stand at the end
            content[-1 - place % (len(content) // 2)] ^= 0x55
        file.write_bytes(content)
        self.store = self._open(self.folder)
        lost = self.store.verify(repair=True)
        assert len(lost) == len(set(lost))
        assert set(lost) <= self.known.keys()
        self.known = {key: kept for key, kept in self.known.items() if key not in lost}
        self._check(self.store, self.known)

    @invariant()
    def both_say_the_same(self) -> None:
        if hasattr(self, "store"):
            self._check(self.store, self.known)
        if self.reader is not None:
            self._check(self.reader, self.known)


@pytest.mark.slow
def test_a_store_is_what_a_dictionary_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SEGMENT_TOKENS", 40)  # several segments a call
    monkeypatch.setattr(storage, "SMALL_SEGMENT", 30)
    run_machine(StoreMachine, examples=15, steps=15)
