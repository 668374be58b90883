"""kill -9 while a process writes a store and a saved cache: what it had reported is there, and nothing else is left."""

from __future__ import annotations

import itertools
import math
import os
import random
import signal
import time
from pathlib import Path

import torch

from finch_rag.engine import Finch
from finch_rag.models.cache import CompressedCache
from finch_rag.prompts.passages import Passage
from finch_rag.store.store import PassageStore

from ..small import small_finch, texts
from .tally import CLEAR, RECOVERED, WRONG, Tally

QUESTION = "When was the lighthouse built?"
_A_STORE = 20  # rounds; then a new one, as it grows
_LONGEST = 0.25  # seconds that a process may write
_ROUNDING = 1e-3  # of a share: passages are read in other company


def passage(number: int) -> Passage:
    """A passage that its number tells."""
    return Passage(f"{texts(1, seed=number)[0]} token{number}", id=f"p{number}")


def _write(finch: Finch, folder: Path, first: int, report: int) -> None:
    """Adds passages and saves caches for ever; reports each when it is done."""
    store = finch.open_store(folder / "store")
    caches = [finch.compress(QUESTION, texts(8, seed=seed)) for seed in range(2)]
    for number in itertools.count(first):
        store.add([passage(number)])
        os.write(report, f"{number}\n".encode())
        caches[number % 2].save(folder / "saved.cache")
        os.write(report, b"saved\n")


def _killed(finch: Finch, folder: Path, first: int, seconds: float) -> list[str]:
    """What a process reported that was killed after so many seconds of writing."""
    reading, writing = os.pipe()
    process = os.fork()
    if not process:
        os.close(reading)
        try:
            _write(finch, folder, first, writing)
        finally:
            os._exit(1)  # an error of the writer: it is never done
    os.close(writing)
    with os.fdopen(reading, "rb") as reports:
        begun = reports.read(1)
        time.sleep(seconds)
        os.kill(process, signal.SIGKILL)
        _, ended = os.waitpid(process, 0)
        said = (begun + reports.read()).decode().splitlines(keepends=True)
    if os.waitstatus_to_exitcode(ended) != -signal.SIGKILL:
        raise AssertionError("the writer failed by itself")
    return [line.strip() for line in said if line.endswith("\n")]


def attack(folder: Path, rounds: int, seed: int = 0) -> Tally:
    """Kills a writer at a random moment, so many times, and looks at what it leaves.

    Args:
        folder: For files.
        rounds: How often.
        seed: Of the moments.
    """
    torch.set_num_threads(1)  # else a fork cannot compute
    tally, drawn = Tally("kill -9 while a store and a cache are written"), random.Random(seed)
    finch = small_finch(alone_heads=[(0, 3), (1, 0)])
    rights = {finch.ask_cached(finch.compress(QUESTION, texts(8, seed=own))).text for own in range(2)}
    place, added = folder, set[int]()
    for number in range(rounds):
        if number % _A_STORE == 0:
            place, added = folder / str(number), set()
            place.mkdir()
        said = _killed(finch, place, 1000 * number, drawn.uniform(0, _LONGEST))
        added |= {int(line) for line in said if line != "saved"}
        with tally.judged():
            wrong = _wrong(finch, place, added, rights, saved="saved" in said)
            tally.note(WRONG if wrong else RECOVERED, f"round {number}: {wrong}")
    if tally.counts[CLEAR]:
        tally.note(WRONG, "an error where nothing may be lost")
    return tally


def _off(first: PassageStore, second: PassageStore) -> float:
    """How far the shares of two stores' passages are apart at most; infinite where they have different ones."""
    shares = [{own.passage_id: own.share for own in each.search(QUESTION, top_k=1_000_000)} for each in (first, second)]
    if shares[0].keys() != shares[1].keys():
        return math.inf
    return max(abs(share - shares[1][own]) for own, share in shares[0].items())


def _wrong(finch: Finch, folder: Path, added: set[int], rights: set[str], saved: bool) -> str:
    """What is not as it must be; empty where all is."""
    with finch.open_store(folder / "store") as store:
        found = {own.id: own for own in store.passages()}
        if lost := [number for number in added if f"p{number}" not in found]:
            return f"passages {lost} are lost"
        if any(own != passage(int(str(own.id)[1:])) for own in found.values()):
            return "a passage has another text"
        if damaged := store.verify():
            return f"{damaged} are damaged"
        with finch.open_store() as fresh:
            fresh.add(found.values())
            if _off(fresh, store) > _ROUNDING:
                return "other shares than in a new store"
    file = folder / "saved.cache"
    if (saved or file.exists()) and finch.ask_cached(CompressedCache.load(file)).text not in rights:
        return "the cache answers something else"
    finch.compress(QUESTION, texts(8, seed=0)).save(file)
    known = {"store", "saved.cache"}
    return f"{left} are left" if (left := {each.name for each in folder.iterdir()} - known) else ""
