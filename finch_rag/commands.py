"""The commands of ``finch-rag``. Needs the extra ``cli``; see `finch_rag.cli` for the entry point."""

from __future__ import annotations

import errno
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from . import __version__, demo, display, session
from .arguments import (
    BudgetOption,
    ChunkSizeOption,
    CorpusOption,
    JsonOption,
    ModelOption,
    QuestionArgument,
    SelectionName,
    TopKOption,
)
from .bench.commands import app as bench_app
from .corpus import Question, load_questions, read_corpus
from .display import ProgressBars, out, say, say_json
from .errors import FinchError
from .head_examples import read_examples
from .metrics import contains_answer
from .session import EMBEDDED

if TYPE_CHECKING:
    from .prompt import Passage
    from .report import Answer


class Commands(TyperGroup):
    """Commands whose expected errors end as one line on stderr and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        """Runs the command that was asked for."""
        try:
            return super().invoke(ctx)
        except FinchError as error:
            display.show_error(error)
            raise typer.Exit(2) from error
        except OSError as error:  # a folder that must not be written, a full disk
            if error.errno == errno.EPIPE:  # `finch-rag ... | head`
                raise
            display.show_error(error)
            raise typer.Exit(2) from error


app = typer.Typer(
    cls=Commands, no_args_is_help=True, add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False
)
app.add_typer(bench_app, name="bench")


def _version(wanted: bool) -> None:
    if wanted:
        say(f"finch-rag {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")] = (
        False
    ),
) -> None:
    """Ask a local model about far more passages than its window holds, with citations.

    Begin with [bold]finch-rag demo[/]: it needs no network, no GPU and no corpus.
    """
    display.show_log()


@app.command(
    epilog='[bold]Examples[/]\n\nfinch-rag ask "Who signed the lease?" --corpus contracts/\n\n'
    'finch-rag ask "When was it built?" --corpus notes.md --model Qwen/Qwen2.5-1.5B-Instruct --budget 1024\n\n'
    'finch-rag ask "Who?" --corpus passages.jsonl.gz --top-k 300 --json | jq .answer'
)
def ask(
    question: QuestionArgument,
    corpus: CorpusOption,
    model: ModelOption = EMBEDDED,
    top_k: TopKOption = None,
    budget: BudgetOption = None,
    chunk_size: ChunkSizeOption = None,
    selection: Annotated[
        SelectionName, typer.Option(help="Keep whole passages, or single tokens layer by layer as in the Finch paper.")
    ] = SelectionName.PASSAGE,
    max_new_tokens: Annotated[int, typer.Option(metavar="TOKENS", help="The longest answer.")] = 128,
    as_json: JsonOption = False,
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--no-stream",
            help="Show the answer as it is made; never with --json.  [dim]\\[default: on a terminal][/]",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Answer a question from a folder of text, with citations.

    The passages nearest to the question are retrieved and read in one go.
    Of all their tokens only those that matter for the question are kept.
    The index of a corpus is stored in the user's cache.
    """
    session.check_positive(budget=budget, chunk_size=chunk_size, max_new_tokens=max_new_tokens)
    passages = session.read_passages(question, corpus, top_k)
    settings = {"budget": budget, "chunk_size": chunk_size, "max_new_tokens": max_new_tokens}
    with ProgressBars() as bars:
        finch = session.load_finch(model, bars, selection=selection.value, **settings)
        nearest = session.retrieve(question, passages, top_k, bars)
        streaming = not as_json and (out.is_terminal if stream is None else stream)
        answer = session.answer(finch, question, nearest, bars, streaming)
    if as_json:
        say_json(_as_json(question, answer))
        return
    _show_answer(answer, streaming)


@app.command(epilog='[bold]Example[/]\n\nfinch-rag rank "Who signed the lease?" --corpus contracts/ --limit 10')
def rank(
    question: QuestionArgument,
    corpus: CorpusOption,
    model: ModelOption = EMBEDDED,
    top_k: TopKOption = None,
    limit: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Show only the best N.  [dim]\\[default: all that were read][/]",
            show_default=False,
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List passages by the attention that a question pays to them: the model as a reranker."""
    session.check_positive(limit=limit)
    passages = session.read_passages(question, corpus, top_k)
    with ProgressBars() as bars:
        finch = session.load_finch(model, bars)
        nearest = session.retrieve(question, passages, top_k, bars)
        bars("prefill", 0, 1)
        citations = finch.rank(question, nearest)[:limit]
    if as_json:
        say_json({"question": question, "citations": [citation.to_dict() for citation in citations]})
    else:
        out.print(display.citations_table(citations))


@app.command("demo")
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
    session.check_positive(limit=limit)
    folder = demo.example_corpus()
    passages = read_corpus(folder).passages
    questions = load_questions(folder / "questions.jsonl")
    if ask_all:
        _demo_all(passages, questions[:limit], as_json)
        return
    question = next(q for q in questions if q.id == demo.QUESTION_ID)
    if not as_json:
        say(f"Question: {question.question}", style="bold")
    with ProgressBars() as bars:
        finch = session.load_finch(EMBEDDED, bars, budget=demo.BUDGET, max_new_tokens=demo.MAX_NEW_TOKENS)
        nearest = session.retrieve(question.question, passages, len(passages), bars)
        streaming = not as_json and out.is_terminal
        answer = session.answer(finch, question.question, nearest, bars, streaming)
    right = contains_answer(answer.text, question.answers)
    if as_json:
        known = {"answers": list(question.answers), "right": right, "window": finch.window}
        say_json({**_as_json(question.question, answer), **known})
        return
    _show_answer(answer, streaming)
    say()
    verdict = "right" if right else "wrong"
    say(f'The answer is {verdict}: {", ".join(question.gold_ids)} says "{question.answers[0]}".')
    say(
        f"Finch read {answer.report.context_tokens:,} tokens of passages; the model's window is {finch.window:,}; "
        f"{answer.report.kept_tokens:,} were kept for the answer."
    )


@app.command(
    epilog="[bold]Examples[/]\n\nfinch-rag heads Qwen/Qwen2.5-1.5B-Instruct --n 16\n\n"
    "finch-rag heads Qwen/Qwen2.5-1.5B-Instruct --examples questions.jsonl"
)
def heads(
    model: Annotated[str, typer.Argument(help="A Hugging Face id, a folder, a .gguf file, or embedded.")],
    n: Annotated[int, typer.Option("--n", metavar="N", help="Heads to keep.")] = 8,
    examples: Annotated[
        Path | None,
        typer.Option(
            "--examples",
            metavar="FILE",
            help="Your own questions, a JSON object a line: question, passages (texts), gold (index of the right one, "
            "from 0).  [dim]\\[default: 24 made ones][/]",
            show_default=False,
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Find a model's retrieval heads, those that look at the passage with the answer, and store them.

    Finch finds a model's 8 best heads by itself at the first use. Run this to look at them, to use more or fewer, or
    to find them on your own questions.
    """
    session.check_positive(n=n)
    own = None if examples is None else read_examples(examples)
    with ProgressBars() as bars:
        finch = session.load_finch(model, bars, heads="all")
        from .heads import EXAMPLES, find_heads, save_heads

        found = find_heads(finch.model, finch.tokenizer, n, own or EXAMPLES, partial(bars, "heads"))
        file = save_heads(finch.model, finch.name, found)
    if as_json:
        listed = [{"layer": head.layer, "head": head.head, "score": head.score} for head in found]
        say_json({"model": finch.name, "heads": listed, "file": str(file)})
        return
    table = Table("layer", "head", "score", box=None, pad_edge=False, header_style="bold")
    for head in found:
        table.add_row(str(head.layer), str(head.head), f"{head.score:.3f}")
    out.print(table)
    say(f"stored in {file}")


def _as_json(question: str, answer: Answer) -> dict[str, Any]:
    shown = answer.to_dict()
    return {"question": question, "answer": shown.pop("text"), **shown}


def _show_answer(answer: Answer, streamed: bool) -> None:
    say("" if streamed else answer.text or "(the model's answer is empty)")
    say()
    out.print(display.citations_table(answer.citations))
    say()
    out.print(display.report_table(answer.report))


def _demo_all(passages: list[Passage], questions: list[Question], as_json: bool) -> None:
    with ProgressBars() as bars:
        finch = session.load_finch(EMBEDDED, bars)
        with bars.busy("filling the window"):
            contest = demo.Contest(finch, session.index(passages, bars), passages, questions)
        results = demo.run_contest(contest, questions, bars)
    totals = demo.summary(results)
    if as_json:
        say_json({"questions": len(results), "budget": demo.BUDGET, "methods": totals, "results": results})
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("method", "right", "answer's passage kept", "tokens in the cache", "seconds"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for method, name in demo.METHODS.items():
        total = totals[method]
        figures = f"{total['right']} of {len(results)}", f"{total['has_gold']} of {len(results)}"
        table.add_row(Text(name), *figures, f"{total['mean_tokens']:,.0f}", f"{total['mean_seconds']:.1f}")
    out.print(table)
