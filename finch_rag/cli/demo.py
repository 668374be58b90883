"""``finch-rag demo``: one question to the example corpus, or all of them against what one would do without Finch."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from ..corpus.example import example_corpus
from ..corpus.metrics import contains_answer
from ..corpus.reading import Question, load_questions, read_corpus
from ..models.embedded import EMBEDDED
from ..prompts.passages import Passage
from ..terminal.loading import check_positive, load_finch
from ..terminal.output import out, say, say_json
from ..terminal.progress import ProgressBars
from . import session
from .arguments import JsonOption
from .tables import answer_as_json, show_answer

QUESTION_ID = "q04"
BUDGET = 256
MAX_NEW_TOKENS = 32


def show_demo(
    ask_all: Annotated[
        bool, typer.Option("--all", help="Ask all questions, and compare with what one would do without Finch.")
    ] = False,
    limit: Annotated[
        int | None, typer.Option(metavar="N", help="With --all: only the first N questions.", show_default=False)
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show on the example corpus what Finch does: about half a minute on two cores, no network.

    The embedded model reads twice as much as its window holds.

    With --all it is asked 30 questions, which takes a quarter of an hour, with
    - Finch: every passage, in the retriever's order;
    - the retriever's best passages that fit into the same budget;
    - the passages in the corpus's own order, cut off where the window is full.
    """
    if limit is not None and not ask_all:
        raise typer.BadParameter("--limit goes with --all")
    check_positive(limit=limit)
    folder = example_corpus()
    passages = read_corpus(folder).passages
    questions = load_questions(folder / "questions.jsonl")
    if ask_all:
        _demo_all(passages, questions[:limit], as_json)
        return
    question = next(q for q in questions if q.id == QUESTION_ID)
    if not as_json:
        say(f"Question: {question.question}", style="bold")
    with ProgressBars() as bars:
        finch = load_finch(EMBEDDED, bars, budget=BUDGET, max_new_tokens=MAX_NEW_TOKENS)
        nearest = session.retrieve(question.question, passages, len(passages), bars)
        streaming = not as_json and out.is_terminal
        answer = session.answer(finch, question.question, nearest, bars, streaming)
    right = contains_answer(answer.text, question.answers)
    if as_json:
        known = {"answers": list(question.answers), "right": right, "window": finch.window}
        say_json({**answer_as_json(question.question, answer), **known})
        return
    show_answer(answer, streaming)
    say()
    verdict = "right" if right else "wrong"
    say(f'The answer is {verdict}: {", ".join(question.gold_ids)} says "{question.answers[0]}".')
    say(
        f"Finch read {answer.report.context_tokens:,} tokens of passages; the model's window is {finch.window:,}; "
        f"{answer.report.kept_tokens:,} were kept for the answer."
    )


def _demo_all(passages: list[Passage], questions: list[Question], as_json: bool) -> None:
    from .contest import DEMO_METHODS, Contest, run_contest, summary  # they wait for torch

    with ProgressBars() as bars:
        finch = load_finch(EMBEDDED, bars)
        with bars.busy("filling the window"):
            contest = Contest(finch, session.index(passages, bars), passages, questions, BUDGET, MAX_NEW_TOKENS)
        results = run_contest(contest, questions, bars)
    totals = summary(results)
    if as_json:
        say_json({"questions": len(results), "budget": BUDGET, "methods": totals, "results": results})
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("method", "right", "answer's passage kept", "tokens in the cache", "seconds"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for method, name in DEMO_METHODS.items():
        total = totals[method]
        figures = f"{total['right']} of {len(results)}", f"{total['has_gold']} of {len(results)}"
        table.add_row(Text(name), *figures, f"{total['mean_tokens']:,.0f}", f"{total['mean_seconds']:.1f}")
    out.print(table)
