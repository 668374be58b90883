"""The demonstration on the example corpus: one question, or all of them against what one would do without Finch."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .corpus import Question
from .errors import CorpusError
from .metrics import contains_answer
from .retrieval import Retriever, in_rank_order

if TYPE_CHECKING:
    from .engine import Finch
    from .prompt import Passage

QUESTION_ID = "q04"
BUDGET = 256
MAX_NEW_TOKENS = 32

METHODS = {
    "finch": "Finch: every passage, in the retriever's order",
    "top_passages": "the retriever's best passages that fit into the same budget",
    # In the retriever's order a full window would only be the best passages with a larger budget.
    "full_window": "passages in the corpus's order, cut off where the window is full",
}


@dataclass(frozen=True, slots=True)
class Outcome:
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


def example_corpus() -> Path:
    """The folder of the example corpus, in an installed package or a source checkout.

    Raises:
        CorpusError: If it is in neither.
    """
    package = Path(__file__).parent
    for folder in (package / "example_corpus", package.parent / "examples" / "corpus"):
        if folder.is_dir():
            return folder
    raise CorpusError("the example corpus is not there: install finch-rag again, or run the demo in a source checkout")


class Contest:
    """Answers questions by each of `METHODS`.

    Args:
        finch: The engine; its window is the one that is filled.
        retriever: An index of the passages.
        passages: The corpus, in its own order.
        questions: The questions that will be asked.
    """

    def __init__(
        self, finch: Finch, retriever: Retriever, passages: Sequence[Passage], questions: Sequence[Question]
    ) -> None:
        self._finch, self._retriever, self._passages = finch, retriever, passages
        self._window = FullWindow(finch, passages, [question.question for question in questions])

    def run(self, question: Question) -> dict[str, Outcome]:
        """Asks one question by each method."""
        ranked = in_rank_order(self._retriever, self._passages, question.question, len(self._passages))
        return {
            "finch": self._ask(question, ranked),
            "top_passages": self._ask(question, self._that_fit(question.question, ranked)),
            "full_window": self._ask_window(question),
        }

    def _ask(self, question: Question, passages: Sequence[Passage]) -> Outcome:
        start = time.perf_counter()
        answer = self._finch.ask(question.question, passages, budget=BUDGET, max_new_tokens=MAX_NEW_TOKENS)
        seconds = time.perf_counter() - start
        kept = {citation.passage_id for citation in answer.citations}
        return self._outcome(question, answer.text, kept, answer.report.kept_tokens, seconds)

    def _that_fit(self, question: str, ranked: Sequence[Passage]) -> Sequence[Passage]:
        """As many of the first passages as the budget holds whole, so that nothing is evicted; at least one."""
        ends = accumulate(map(len, self._finch.prompts.build(question, ranked).passages))
        return ranked[: max(1, sum(end <= BUDGET for end in ends))]

    def _ask_window(self, question: Question) -> Outcome:
        start = time.perf_counter()
        text = self._window.answer(question.question)
        # A user's call would read the passages each time.
        seconds = time.perf_counter() - start + self._window.prefill_seconds
        return self._outcome(question, text, self._window.passage_ids, self._window.tokens, seconds)

    @staticmethod
    def _outcome(question: Question, answer: str, cached: set[str | None], tokens: int, seconds: float) -> Outcome:
        has_gold = any(gold in cached for gold in question.gold_ids)
        return Outcome(answer, contains_answer(answer, question.answers), has_gold, tokens, seconds)


class FullWindow:
    """The model's own generation on passages cut off where its window is full. Reads them once for all questions.

    Args:
        finch: Gives model, prompt and window; nothing of its reading is used.
        passages: In the order to read them.
        questions: All questions that will be asked; the longest decides how much room is left.

    Attributes:
        tokens: Tokens of passages in the window.
        passage_ids: Ids of the passages that are whole in the window.
        prefill_seconds: Time it took to read them.
    """

    def __init__(self, finch: Finch, passages: Sequence[Passage], questions: Sequence[str]) -> None:
        import torch
        from transformers import DynamicCache

        self._finch = finch
        prompts = [finch.prompts.build(question, passages[:1]) for question in questions]
        prefix = prompts[0].prefix
        behind = max(len(prompt.question) + len(prompt.tail) for prompt in prompts)
        self.tokens = finch.window - len(prefix) - behind - MAX_NEW_TOKENS

        texts = finch.prompts.build(questions[0], passages).passages
        document = [token for text in texts for token in text][: self.tokens]
        self.tokens = len(document)
        ends = accumulate(map(len, texts))
        self.passage_ids = {p.id for p, end in zip(passages, ends, strict=True) if end <= self.tokens}

        self._context = [*prefix, *document]
        self._cache = DynamicCache()
        start = time.perf_counter()
        with torch.no_grad():
            finch.model.base_model(input_ids=self._tensor(self._context), past_key_values=self._cache, use_cache=True)
        self.prefill_seconds = time.perf_counter() - start

    def answer(self, question: str) -> str:
        """The model's greedy answer to a question behind the passages."""
        prompt = self._finch.prompts.build(question, [])
        token_ids = [*self._context, *prompt.question, *prompt.tail]
        output = self._finch.model.generate(  # type: ignore[operator]  # typed as a module's attribute
            self._tensor(token_ids), past_key_values=self._cache, max_new_tokens=MAX_NEW_TOKENS, do_sample=False
        )
        self._cache.crop(len(self._context) - self._cache.get_seq_length())  # negative: tokens to remove
        return self._finch.prompts.decode(output[0, len(token_ids) :].tolist()).strip()

    def _tensor(self, token_ids: Sequence[int]) -> Any:
        import torch

        return torch.tensor([token_ids], device=self._finch.model.device)


def run_contest(
    contest: Contest, questions: Sequence[Question], on_progress: Callable[[str, int, int], None]
) -> list[dict[str, Any]]:
    """Asks all questions by all methods.

    Args:
        contest: The methods.
        questions: What to ask.
        on_progress: Called with "questions", the questions done and in all.

    Returns:
        For each question its id, its text, its known answers and an outcome by method, as plain values.
    """
    results = []
    for number, question in enumerate(questions):
        on_progress("questions", number, len(questions))
        outcomes = {method: asdict(outcome) for method, outcome in contest.run(question).items()}
        asked = {"id": question.id, "question": question.question, "answers": list(question.answers)}
        results.append({**asked, "outcomes": outcomes})
    on_progress("questions", len(questions), len(questions))
    return results


def summary(results: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """By method: how many answers are right, how often the passage with the answer was kept, and mean costs."""
    totals = {}
    for method in METHODS:
        outcomes = [result["outcomes"][method] for result in results]
        totals[method] = {
            "right": sum(outcome["right"] for outcome in outcomes),
            "has_gold": sum(outcome["has_gold"] for outcome in outcomes),
            "mean_tokens": sum(outcome["tokens"] for outcome in outcomes) / len(outcomes),
            "mean_seconds": sum(outcome["seconds"] for outcome in outcomes) / len(outcomes),
        }
    return totals
