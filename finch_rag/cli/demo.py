"""``finch-rag demo``: one question to the example corpus, or all of them against what one would do without Finch."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table

from ..corpus.example import example_corpus
from ..corpus.metrics import contains_answer
from ..corpus.reading import Question, load_questions, read_corpus
from ..models.embedded import EMBEDDED
from ..prompts.passages import Passage
from ..terminal.loading import check_positive, load_finch
from ..terminal.output import cell, out, say, say_json
from ..terminal.progress import ProgressBars
from . import session
from .arguments import JsonOption
from .tables import answer_as_json, show_answer

QUESTION_ID, SECOND_QUESTION_ID = "q04", "q09"
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
    """Show on the example corpus what Finch does: some twenty seconds on two cores, no network.

    The embedded model reads twice as much as its window holds, once: the second question is answered at once.

    With --all it is asked 30 questions, which takes three minutes, with
    - Finch: every passage, read once into a store;
    - BM25's best passages that fit into the same budget, and MiniLM's;
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
    by_id = {question.id: question for question in questions}
    streaming = not as_json and out.is_terminal
    with ProgressBars() as bars:
        finch = load_finch(EMBEDDED, bars, budget=BUDGET, max_new_tokens=MAX_NEW_TOKENS)
        with finch.open_store() as store:
            shown = []
            for number, question in enumerate((by_id[QUESTION_ID], by_id[SECOND_QUESTION_ID]), 1):
                if not as_json:
                    say(f"Question {number}: {question.question}", style="bold")
                timed = session.answer(finch, question.question, passages, bars, streaming, store)
                shown.append(_shown(question, timed, finch.window))
                if not as_json:
                    _show(question, timed, finch.window, streaming)
    if as_json:
        say_json({**shown[0], "second": shown[1]})
        return
    first, second = (each["first_piece_seconds"] for each in shown)
    say(
        f"The first word came after {first:.1f} s, and after {second:.1f} s for the second question: each passage is "
        "read once, and then known."
    )


def _shown(question: Question, timed: session.Timed, window: int) -> dict[str, Any]:
    right = contains_answer(timed.answer.text, question.answers)
    known = {"answers": list(question.answers), "right": right, "window": window}
    return {
        **answer_as_json(question.question, timed.answer),
        **known,
        "first_piece_seconds": timed.first_piece,
    }


def _show(question: Question, timed: session.Timed, window: int, streamed: bool) -> None:
    answer = timed.answer
    show_answer(answer, streamed)
    say()
    verdict = "right" if contains_answer(answer.text, question.answers) else "wrong"
    say(f'The answer is {verdict}: {", ".join(question.gold_ids)} says "{question.answers[0]}".')
    if answer.report.stored_tokens:
        say(
            f"Finch read {answer.report.context_tokens:,} tokens of passages; the model's window is {window:,}; "
            f"{answer.report.kept_tokens:,} were kept for the answer."
        )
    say()


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
        table.add_row(cell(name), *figures, f"{total['mean_tokens']:,.0f}", f"{total['mean_seconds']:.1f}")
    out.print(table)
