"""KeyboardInterrupt at any moment of any work; afterwards all must be as before."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from finch_rag.errors import FinchError
from finch_rag.models.cache import CompressedCache
from finch_rag.prompts.passages import Passage

from ..small import small_finch, texts
from .tally import RAW, RECOVERED, WRONG, Tally

QUESTIONS = ["When was the lighthouse built?", "Who built the bridge?"]
_SECONDS = 60.0  # after which a lock counts as held for ever


@contextmanager
def interrupted(seconds: float) -> Iterator[None]:
    """Raises KeyboardInterrupt in the block as Ctrl-C does, after so many seconds; the block ends with it.

    A signal comes where CPython looks for one, so that nothing is interrupted where it never could be.
    """

    inside = True

    def raise_it(number: int, frame: FrameType | None) -> None:
        if inside:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, raise_it)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        yield
        inside = False
    except KeyboardInterrupt:
        pass
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def works(folder: Path) -> dict[str, Callable[[], object]]:
    """Things to do, each with a result that is the same every time; they share an engine, a store and files.

    Args:
        folder: For store and files.
    """
    finch = small_finch(alone_heads=[(0, 3), (1, 0)], reread=True)
    store = finch.open_store(folder / "store")
    known = [Passage(text, id=f"known {place}") for place, text in enumerate(texts(8))]
    new = [Passage(text, id=f"new {place}") for place, text in enumerate(texts(4, seed=7))]
    store.add(known)
    file = folder / "saved.cache"
    finch.compress(QUESTIONS[0], texts(8)).save(file)

    def added() -> object:
        store.add([*known, *new])
        store.remove(sorted({str(own.id) for own in new}))
        found = {own.passage_id: round(own.share, 3) for own in store.search(QUESTIONS[0], top_k=100)}
        return [(passage.id, passage.text) for passage in store.passages()], store.verify(), found

    def saved() -> object:
        finch.compress(QUESTIONS[0], texts(8)).save(file)
        return finch.ask_cached(CompressedCache.load(file)).text

    def streamed() -> object:
        with finch.stream(QUESTIONS[0], texts(8)) as stream:
            return "".join(stream)

    return {
        "the loop": lambda: finch.ask(QUESTIONS[0], texts(8), strategy="loop").text,
        "each alone": lambda: finch.ask(QUESTIONS[0], texts(8), strategy="independent", rounds=2).text,
        "several": lambda: [answer.text for answer in finch.ask_many(QUESTIONS, texts(8))],
        "a stream": streamed,
        "a store": lambda: finch.ask(QUESTIONS[1], store=store).text,
        "passages added and removed": added,
        "a cache saved and loaded": saved,
    }


def attack(folder: Path, count: int, seed: int = 0) -> Tally:
    """Interrupts each kind of work so many times, and does it again in another thread, which sees held locks.

    Args:
        folder: For files.
        count: Interrupts of each kind.
        seed: Of the moments.
    """
    tally, drawn = Tally("KeyboardInterrupt at a random moment of a call"), random.Random(seed)
    for name, work in works(folder).items():
        right = work()
        started = time.perf_counter()
        work()
        seconds = time.perf_counter() - started
        for _ in range(count):
            moment = drawn.uniform(1e-6, seconds)
            with interrupted(moment), suppress(FinchError):  # which the next time shows, too
                work()
            again: list[object] = []
            thread = threading.Thread(target=lambda work=work, again=again: again.append(_result(work)), daemon=True)
            thread.start()
            thread.join(_SECONDS)
            where = f"{name}, after {moment:.4f} of {seconds:.4f} s"
            if not again:
                tally.note(RAW, f"{where}: hangs afterwards")
                return tally
            tally.note(RECOVERED if again[0] == right else WRONG, f"{where}: {again[0]!r}")
    return tally


def _result(work: Callable[[], object]) -> object:
    try:
        return work()
    except Exception as error:
        return error
