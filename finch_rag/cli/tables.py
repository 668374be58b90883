"""Answers, citations and reports as tables and as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from rich.table import Table

from ..terminal.output import cell, out, say, say_lines

if TYPE_CHECKING:
    from ..answer import Answer, Citation, CompressionReport


def citations_table(citations: Iterable[Citation]) -> Table:
    """Passages by falling share of the question's attention, with the place where each stood."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("rank", "place", "passage", "title", "attention", "kept"):
        right = heading not in ("passage", "title")
        # In a narrow terminal titles are wrapped before ids are cut.
        table.add_column(heading, justify="right" if right else "left", no_wrap=heading != "title")
    for rank, citation in enumerate(citations, 1):
        row = (
            str(rank),
            str(citation.index + 1),
            citation.passage_id or "",
            citation.title or "",
            f"{citation.share:.1%}",
            f"{citation.kept_tokens:,}/{citation.passage_tokens:,}",
        )
        table.add_row(*map(cell, row))
    return table


def report_table(report: CompressionReport) -> Table:
    """What a call read, kept and cost, in three lines."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    read, kept = _count(report.context_tokens, "token"), _count(report.kept_tokens, "token")
    lines = {
        "read": f"{read} of {_count(report.passages, 'passage')} {_how(report)}, {report.prefill_seconds:.1f} s",
        "kept": f"{kept} of {_count(report.passages_kept, 'passage')}, {report.compression_factor:.1f} times fewer; "
        f"KV cache {_mib(report.kv_bytes_kept)} instead of {_mib(report.kv_bytes_full)} MiB",
        "answered": f"{_count(report.new_tokens, 'token')}, {report.decode_seconds:.1f} s, by {report.model}",
    }
    for name, text in lines.items():
        table.add_row(name, cell(text))
    return table


def _how(report: CompressionReport) -> str:
    """How passages were read: chunk by chunk, or once, for all questions."""
    if report.searched_tokens:
        return f"found among {_count(report.searched_tokens, 'token')} that were known"
    if report.known_tokens or report.stored_tokens:
        return f"({report.known_tokens:,} were known)"
    return f"in {_count(report.chunks, 'chunk')}"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f}"


def quoted_lines(answer: Answer) -> Iterator[str]:
    """An answer's sentences with the places of the passages that they rest on, and these passages' sentences.

    Args:
        answer: The answer.
    """
    if not answer.statements:
        yield "(no sentence of a passage was kept whole)"
    for statement in answer.statements:
        yield _one_line(statement.text) + " " + "".join(f"[{source.index + 1}]" for source in statement.sources)
        for source in statement.sources:
            for quote in source.quotes:
                yield f"  [{source.index + 1}] {quote.share:.0%}  {_one_line(quote.text)}"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def answer_as_json(question: str, answer: Answer) -> dict[str, Any]:
    """An answer with its question, as plain values.

    Args:
        question: The question.
        answer: Its answer.
    """
    shown = answer.to_dict()
    return {"question": question, "answer": shown.pop("text"), **shown}


def show_answer(answer: Answer, streamed: bool, *, quotes: bool = False) -> None:
    """Shows an answer, the passages that it came from and what it took.

    Args:
        answer: The answer.
        streamed: Whether its text has been shown.
        quotes: Whether to show what its sentences rest on.
    """
    withheld = answer.report.stop_reason == "unsupported"
    empty = "(no answer: the passages do not support one)" if withheld else "(the model's answer is empty)"
    say_lines("" if streamed and not withheld else answer.text or empty)
    if answer.support is not None:
        say(f"(support: {answer.support:.2f} of 1)")
    say()
    if quotes:
        for line in quoted_lines(answer):
            say(line)
        say()
    out.print(citations_table(answer.citations))
    say()
    out.print(report_table(answer.report))
