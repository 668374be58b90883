"""What one would do without Finch, on the example corpus: the methods of ``finch-rag demo --all``."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any

from ..answer import Answer
from ..bench import methods as bench_methods
from ..bench.cases import QualityCase, search_by
from ..bench.methods import Contestant
from ..corpus.metrics import contains_answer
from ..corpus.reading import Question
from ..corpus.retrieval import Retriever
from ..engine import Finch
from ..prompts.builder import Prompt
from ..prompts.passages import Passage
from ..reading import read_request
from ..resolving import resolve_prompt
from ..streaming import AnswerStream

DEMO_METHODS = {
    "finch": "Finch: every passage, read once into a store",
    "bm25_passages": "BM25's best passages that fit into the same budget",
    "minilm_passages": "MiniLM's best passages that fit into the same budget",
    # In the retriever's order a full window would only be the best passages with a larger budget.
    "full_window": "passages in the corpus's order, cut off where the window is full",
}


@dataclass(frozen=True, slots=True)
class Graded:
    """What one method made of one question.

    Attributes:
        answer: What the model said.
        right: Whether it contains a known answer.
        has_gold: Whether a passage that holds the answer was in the cache when the model answered.
        tokens: Tokens of passages in the cache then.
        seconds: Time of the call, reading included.
    """

    answer: str
    right: bool
    has_gold: bool
    tokens: int
    seconds: float


class Contest:
    """Answers questions by each of `DEMO_METHODS`.

    Args:
        finch: The engine; its window is the one that is filled.
        retriever: An index of the passages' MiniLM embeddings.
        passages: The corpus, in its own order.
        questions: The questions that will be asked.
        budget: Document tokens in the cache.
        max_new_tokens: The most tokens of an answer.
    """

    def __init__(
        self,
        finch: Finch,
        retriever: Retriever,
        passages: Sequence[Passage],
        questions: Sequence[Question],
        budget: int,
        max_new_tokens: int,
    ) -> None:
        self._contestant = Contestant(finch, budget, max_new_tokens)
        self._retriever, self._passages = retriever, passages
        self._bm25 = search_by("bm25", passages)
        self._window = FullWindow(finch, passages, [question.question for question in questions], max_new_tokens)

    def run(self, question: Question) -> dict[str, Graded]:
        """Asks one question by each method.

        Args:
            question: One of the questions that the contest was made for.
        """
        everything = len(self._passages)
        by_words = self._bm25(question.question, everything)
        by_meaning = [place for place, _ in self._retriever.search(question.question, everything)]
        return {
            "finch": self._graded(self._case(question, range(everything)), bench_methods.finch_store),
            "bm25_passages": self._graded(self._case(question, by_words), bench_methods.top_k),
            "minilm_passages": self._graded(self._case(question, by_meaning), bench_methods.top_k),
            "full_window": self._graded_window(question),
        }

    def _case(self, question: Question, order: Sequence[int]) -> QualityCase:
        return QualityCase(question, [self._passages[place] for place in order], list(range(len(order))))

    def _graded(self, case: QualityCase, method: bench_methods.Method) -> Graded:
        start = time.perf_counter()
        outcome = method(self._contestant, case)
        seconds = time.perf_counter() - start
        return _grade(case.question, outcome.prediction, set(outcome.kept_ids), outcome.kv_tokens, seconds)

    def _graded_window(self, question: Question) -> Graded:
        start = time.perf_counter()
        answer = self._window.answer(question.question)
        # A user's call would read the passages each time.
        seconds = time.perf_counter() - start + self._window.prefill_seconds
        return _grade(question, answer.text, self._window.passage_ids, self._window.tokens, seconds)


def _grade(question: Question, answer: str, cached: set[str | None], tokens: int, seconds: float) -> Graded:
    has_gold = any(gold in cached for gold in question.gold_ids)
    return Graded(answer, contains_answer(answer, question.answers), has_gold, tokens, seconds)


class FullWindow:
    """The plain model on passages cut off where its window is full. Reads them once for all questions.

    The passages stand where instructions do, in the part of the prompt that is read in one pass and never evicted.

    Args:
        finch: The engine.
        passages: In the order to read them.
        questions: All questions that will be asked; the longest decides how much room is left.
        max_new_tokens: The most tokens of an answer.

    Attributes:
        tokens: Tokens of passages in the window.
        passage_ids: Ids of the passages that are whole in the window.
        prefill_seconds: Time it took to read them.
    """

    def __init__(
        self, finch: Finch, passages: Sequence[Passage], questions: Sequence[str], max_new_tokens: int
    ) -> None:
        self._runtime = finch.runtime
        self._settings = finch.settings.updated({"budget": None, "chunk_size": None, "max_new_tokens": max_new_tokens})
        self._prefix = finch.prompts.build(questions[0], passages[:1]).prefix
        prompts = [self._prompt(question) for question in questions]
        longest = max(prompts, key=lambda prompt: len(prompt.question) + len(prompt.tail))
        behind = len(longest.question) + len(longest.tail) + max_new_tokens
        texts = finch.prompts.build(questions[0], passages).passages
        document = [token for text in texts for token in text][: finch.window - len(self._prefix) - behind]
        self.tokens = len(document)
        ends = accumulate(map(len, texts))
        self.passage_ids = {p.id for p, end in zip(passages, ends, strict=True) if end <= self.tokens}
        start = time.perf_counter()
        filled = Prompt([*self._prefix, *document], [], longest.question, longest.own_tokens, longest.tail)
        request = resolve_prompt(self._runtime, filled, self._settings, ranks_only=True)
        self._cache = read_request(self._runtime, request)
        self.prefill_seconds = time.perf_counter() - start

    def answer(self, question: str) -> Answer:
        """The model's answer.

        Args:
            question: One of the questions that the window was filled for.
        """
        request = resolve_prompt(self._runtime, self._prompt(question), self._settings)
        return AnswerStream(self._runtime, request, self._cache).read()

    def _prompt(self, question: str) -> Prompt:
        """A question as it is asked about passages, without them."""
        prompt = self._runtime.prompts.build(question, [Passage("-")])
        return Prompt([], [], prompt.question, prompt.own_tokens, prompt.tail)


def run_contest(
    contest: Contest, questions: Sequence[Question], on_progress: Callable[[str, int, int], None]
) -> list[dict[str, Any]]:
    """Asks all questions by all methods.

    Args:
        contest: The methods.
        questions: What to ask.
        on_progress: Called with "questions", the questions done and in all.

    Returns:
        For each question its id, its text, its known answers and what each method made of it, as plain values.
    """
    results = []
    for number, question in enumerate(questions):
        on_progress("questions", number, len(questions))
        outcomes = {method: asdict(graded) for method, graded in contest.run(question).items()}
        asked = {"id": question.id, "question": question.question, "answers": list(question.answers)}
        results.append({**asked, "outcomes": outcomes})
    on_progress("questions", len(questions), len(questions))
    return results


def summary(results: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """By method: how many answers are right, how often the passage with the answer was kept, and mean costs.

    Args:
        results: Of `run_contest`.
    """
    totals = {}
    for method in DEMO_METHODS:
        outcomes = [result["outcomes"][method] for result in results]
        totals[method] = {
            "right": sum(outcome["right"] for outcome in outcomes),
            "has_gold": sum(outcome["has_gold"] for outcome in outcomes),
            "mean_tokens": sum(outcome["tokens"] for outcome in outcomes) / len(outcomes),
            "mean_seconds": sum(outcome["seconds"] for outcome in outcomes) / len(outcomes),
        }
    return totals
