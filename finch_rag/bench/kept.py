"""How often all passages that a question needs are among those that it is answered from, by rule and budget.

The attention that a question pays to its passages is measured once and kept in a file; rules are then tried on it
without a model. A rule has a cutoff (see `finch_rag.Finch`) and a prior, for what a passage's rank by the retriever is
worth beside the attention: ``attention / sqrt(rank + prior)`` with ranks from 0, however little both agree (Finch
itself asks that first, see `finch_rag.prefill.prior`); without a prior nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from typing_extensions import Unpack

from ..corpus.reading import CorpusOptions
from ..engine import Finch
from ..errors import InputError
from ..jsonl import json_objects
from ..paths import replaced_lines, told_where
from ..prefill.planning import CUTOFF, Strategy
from ..terminal.loading import check_positive
from ..terminal.output import out, say, say_json
from ..terminal.progress import ProgressBars
from .cases import DataSet, QualityCase, RetrieverName, make_cases, stored_text
from .quality import loader

CUTOFFS = (0.0, 0.05, 0.1, CUTOFF)
PRIORS = (None, 10.0)
BUDGETS = (512, 1024, 2048)


@dataclass(frozen=True, slots=True)
class Attended:
    """A question's passages, in the order in which they were read.

    Attributes:
        question_id: Of the question.
        gold: Passages that it needs, also those that were not retrieved.
        is_gold: Whether a passage is one of them.
        ranks: By the retriever, from 0.
        lengths: Tokens.
        attention: What the question pays to each, of all that it pays.
    """

    question_id: str
    gold: int
    is_gold: Sequence[bool]
    ranks: Sequence[int]
    lengths: Sequence[int]
    attention: Sequence[float]


def main(
    data: str | Path,
    *,
    file: Path,
    model: str = "embedded",
    retriever: RetrieverName = "bm25",
    strategy: Strategy = "independent",
    order: str = "rank",
    top_k: int = 100,
    limit: int | None = None,
    seed: int = 0,
    cutoffs: Sequence[float] = CUTOFFS,
    priors: Sequence[float | None] = PRIORS,
    budgets: Sequence[int] = BUDGETS,
    **corpus: Unpack[CorpusOptions],
) -> dict[str, Any]:
    """Measures the attention unless the file has it, prints a table of rules and, as the last line, one JSON object.

    Args:
        data: Folder of a data set, see `finch_rag.bench.cases.DataSet.read`.
        file: Gzipped JSON lines, an `Attended` each; read where it exists, else written.
        model: What `Finch.from_pretrained` takes.
        retriever: What ranks the passages.
        strategy: How they are read, see `finch_rag.Finch`.
        order: In which they are read, see `finch_rag.bench.cases.make_cases`.
        top_k: Passages that a question gets.
        limit: Questions; all when None.
        seed: Of the draw, and of a random order.
        cutoffs: Of the rules.
        priors: Of the rules, above 0; None for none.
        budgets: Tokens that the rules keep.
        corpus: How its passages are read, see `finch_rag.corpus.reading.CorpusOptions`.

    Returns:
        What the JSON line holds.

    Raises:
        InputError: If an argument cannot work.
    """
    check_positive(limit=limit, top_k=top_k)
    if not budgets or not cutoffs or not priors or min(budgets) < 1:
        raise InputError("there is nothing to measure: name budgets from 1, cutoffs and priors")
    if wrong := [value for value in cutoffs if not 0 <= value <= 1] + [p for p in priors if p is not None and p <= 0]:
        raise InputError(f"{wrong[0]} is no rule: a cutoff is from 0 to 1, a prior above 0")
    if file.exists():
        attended = read_attended(file)
    else:
        cases = make_cases(DataSet.read(data, **corpus).with_answers(), retriever, top_k, order, limit, seed)
        with ProgressBars(remaining=True) as bars:
            finch = loader(model, bars)()
            attended = []
            for number, case in enumerate(cases, 1):
                attended.append(attend(finch, case, strategy))
                bars("questions", number, len(cases))
        write_attended(attended, file)
    rules = [
        {"cutoff": cutoff, "prior": prior, "budget": budget, **kept_by(attended, cutoff, prior, budget)}
        for prior in priors
        for cutoff in cutoffs
        for budget in budgets
    ]
    summary = {"attention": str(file), "questions": len(attended), "retrieved": retrieved(attended), "rules": rules}
    _print(summary)
    say_json(summary)
    return summary


def attend(finch: Finch, case: QualityCase, strategy: Strategy) -> Attended:
    """What a question pays to its passages.

    Args:
        finch: Reads them.
        case: The question with its passages.
        strategy: How they are read.
    """
    found = finch.rank(case.question.question, case.passages, strategy=strategy, prior="none")
    ranked = sorted(found, key=lambda each: each.index)
    gold = set(case.question.gold_ids)
    return Attended(
        case.question.id,
        len(gold),
        [passage.id in gold for passage in case.passages],
        case.ranks,
        [cited.passage_tokens for cited in ranked],
        [cited.share for cited in ranked],
    )


def kept_by(attended: Sequence[Attended], cutoff: float, prior: float | None, budget: int) -> dict[str, float]:
    """The share of questions of which a rule keeps any, and all, of the passages that they need; and what it keeps.

    Args:
        attended: The questions.
        cutoff: See `finch_rag.Finch`.
        prior: What a rank is worth; None for nothing.
        budget: Tokens that are kept at the most.

    Returns:
        "any", "all", and the means of "passages" and "tokens".
    """
    kept = [_kept(question, cutoff, prior, budget) for question in attended]
    golds = [sum(question.is_gold[place] for place in own) for question, own in zip(attended, kept, strict=True)]
    tokens = [sum(question.lengths[place] for place in own) for question, own in zip(attended, kept, strict=True)]
    count = len(attended)
    return {
        "any": sum(gold > 0 for gold in golds) / count,
        "all": sum(gold == question.gold for gold, question in zip(golds, attended, strict=True)) / count,
        "passages": sum(map(len, kept)) / count,
        "tokens": sum(tokens) / count,
    }


def retrieved(attended: Sequence[Attended]) -> float:
    """The share of questions of which all passages that they need were retrieved.

    Args:
        attended: The questions.
    """
    return sum(sum(question.is_gold) == question.gold for question in attended) / len(attended)


def _kept(question: Attended, cutoff: float, prior: float | None, budget: int) -> list[int]:
    """Places of the passages that are answered from, the best first."""
    worth = [
        paid if prior is None else paid / math.sqrt(rank + prior)
        for paid, rank in zip(question.attention, question.ranks, strict=True)
    ]
    order = sorted(range(len(worth)), key=lambda place: -worth[place])
    kept: list[int] = []
    left = budget
    for place in order:
        left -= question.lengths[place]
        if left < 0 or worth[place] < cutoff * worth[order[0]]:
            break
        kept.append(place)
    return kept


def write_attended(attended: Iterable[Attended], file: Path) -> None:
    """Stores what was measured.

    Args:
        attended: The questions.
        file: Gzipped JSON lines; its folder is made.

    Raises:
        InputError: If it cannot be written.
    """
    with told_where("the measured attention", file, InputError), replaced_lines(file) as lines:
        for question in attended:
            lines.write(json.dumps(asdict(question)) + "\n")


def read_attended(file: Path) -> list[Attended]:
    """Reads what `write_attended` stored.

    Args:
        file: Gzipped JSON lines.

    Raises:
        InputError: If it holds something else.
    """
    try:
        found = [_attended(record) for _, record in json_objects(file.name, stored_text(file), InputError)]
    except (TypeError, ValueError, InputError) as error:
        raise InputError(
            f"{file} does not hold measured attention ({error}): name another file, or remove it"
        ) from error
    if not found:
        raise InputError(f"{file} has no questions: remove it, so that they are measured")
    return found


def _attended(record: Mapping[str, Any]) -> Attended:
    found = Attended(**record)
    passages = list(zip(found.is_gold, found.ranks, found.lengths, found.attention, strict=True))
    if not passages or not all(isinstance(value, (int, float)) for values in passages for value in values):
        raise ValueError("no numbers of passages")
    return found


def _print(summary: dict[str, Any]) -> None:
    say(f"{summary['questions']:,} questions; all that they need were retrieved for {summary['retrieved']:.3f} of them")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("prior", "cutoff", "budget", "any kept", "all kept", "passages", "tokens"):
        table.add_column(heading, justify="right")
    for rule in summary["rules"]:
        table.add_row(
            "none" if rule["prior"] is None else f"{rule['prior']:g}",
            f"{rule['cutoff']:g}",
            f"{rule['budget']:,}",
            f"{rule['any']:.3f}",
            f"{rule['all']:.3f}",
            f"{rule['passages']:.1f}",
            f"{rule['tokens']:,.0f}",
        )
    out.print(table)
