"""One call, resolved once: what is read, how, and what is answered. Immutable; executed by `finch_rag.runtime`."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from .decode.sampling import Sampling
from .prefill.planning import PrefillPlan
from .prompts.builder import Prompt
from .prompts.parsing import APART
from .prompts.passages import Passage
from .store.store import PassageStore

Progress = Callable[[str, int, int], None]  # stage ("heads", "store" or "prefill"), done, total


def no_progress(stage: str, done: int, total: int) -> None:
    """Tells nobody."""


class Cancelled(Exception):  # noqa: N818 - not an error: it ends a reading whose answer nobody wants any more
    """The answer was cancelled while the passages were read."""


class Cancellation:
    """Whether an answer is still wanted; any thread may ask and say."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def cancel(self) -> None:
        """Says that the answer is not wanted any more."""
        self._event.set()

    def is_cancelled(self) -> bool:
        """Whether somebody has said so."""
        return self._event.is_set()

    def check(self) -> None:
        """Raises `Cancelled` if the answer is not wanted any more."""
        if self.is_cancelled():
            raise Cancelled

    def telling(self, stage: str, on_progress: Progress) -> Callable[[int, int], None]:
        """What a stage calls after each step: tells of it, and raises `Cancelled` where nothing is wanted any more.

        Args:
            stage: Its name.
            on_progress: Who is told.
        """

        def tell(done: int, total: int) -> None:
            on_progress(stage, done, total)
            self.check()

        return tell


class Searched(NamedTuple):
    """The search of a whole store, which found a request's passages.

    Attributes:
        attention: What the question pays to each passage that was found.
        tokens: Of all passages of the store.
        seconds: That it took.
    """

    attention: tuple[float, ...] = ()
    tokens: int = 0
    seconds: float = 0.0


NOT_SEARCHED = Searched()


@dataclass(frozen=True, slots=True)
class Request:
    """One call, resolved.

    Attributes:
        question: The question, for the cache's record.
        passages: What is read; a citation's ``index`` is a place in it.
        prompt: Token ids.
        plan: How the passages are read, without the retrieval heads, which may have to be found first; None where a
            cache is answered from.
        sampling: How the answer is generated.
        on_progress: Told of a stage, and of its steps done and in all.
        cancellation: Asked at each step.
        parse_mode: How passages and question were told apart, for the report.
        notes: What else the report says.
        older_turns: How many of the passages, the last, are older turns of the conversation.
        store: Has read the passages, or reads them now, and ranks them; None scans them.
        shortlist_tokens: The most tokens of the best passages that the loop then scans; 0 for none; None for a default,
            see `finch_rag.Finch`.
        searched: The search of the whole store that found the passages, if there was one.
        ranks: Of the passages by their retriever, from 0; None where the order is to count for nothing.
        quotes: Whether to find the sentences that the answer rests on.
        support: Whether to judge how well the passages support the answer.
        min_support: The answer is withheld where its support is less; None withholds none.
    """

    question: str
    passages: tuple[Passage, ...]
    prompt: Prompt
    plan: PrefillPlan | None
    sampling: Sampling
    on_progress: Progress
    cancellation: Cancellation = field(default_factory=Cancellation)
    parse_mode: str = APART
    notes: tuple[str, ...] = ()
    older_turns: int = 0
    store: PassageStore | None = None
    shortlist_tokens: int | None = None
    searched: Searched = NOT_SEARCHED
    ranks: tuple[int, ...] | None = None
    quotes: bool = True
    support: bool = False
    min_support: float | None = None

    @property
    def answer_prompt(self) -> list[int]:
        """Token ids to read after the cache, before the answer."""
        return [*self.prompt.question, *self.prompt.tail]

    @property
    def passage_tokens(self) -> list[int]:
        """Tokens of each passage."""
        return [len(passage) for passage in self.prompt.passages]

    @property
    def room(self) -> int:
        """Tokens that are appended to the cache for the answer."""
        return len(self.prompt.question) + len(self.prompt.tail) + self.sampling.max_new_tokens

    def on_step(self, stage: str) -> Callable[[int, int], None]:
        """What a stage calls after each step: tells of it, and raises `Cancelled` where the answer is not wanted.

        Args:
            stage: "heads" or "prefill".
        """
        return self.cancellation.telling(stage, self.on_progress)
