"""``finch-rag bench ruler``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..bench.arguments import names_in, numbers_in, shard_of
from ..models.embedded import EMBEDDED
from .arguments import ModelOption
from .bench_options import BudgetsOption, MaxNewTokensOption, MethodsOption, SeedOption, ShardOption, extra

EPILOG = (
    "[bold]Example[/]\n\nfinch-rag bench ruler results/ --tokens 8192,32768 --tasks multi-key,variables --budget 2048"
)


def bench_ruler(
    out: Annotated[
        Path,
        typer.Argument(metavar="OUT", help="Where the results are kept, as LENGTH-tokens/TASK.", show_default=False),
    ],
    tokens: Annotated[
        str, typer.Option(metavar="N,...", help="Lengths of the whole prompt with the answer, in the model's tokens.")
    ] = "8192",
    tasks: Annotated[
        str,
        typer.Option(
            metavar="NAME,...",
            help="Of: multi-key (many things have a code, one is asked for), multi-value-4, multi-value-8 and "
            "multi-value-16 (so many codes of one thing), multi-query (four things at once), variables (chains of "
            "assignments), common-words (the ten most frequent).",
        ),
    ] = "multi-key,multi-value-4,multi-value-8,multi-value-16,multi-query,variables,common-words",
    model: ModelOption = EMBEDDED,
    limit: Annotated[int, typer.Option("--limit", metavar="N", help="Questions of a task.")] = 20,
    seed: SeedOption = 0,
    budget: BudgetsOption = "512",
    methods: MethodsOption = "finch,full,top-k",
    max_new_tokens: MaxNewTokensOption = 160,
    shard: ShardOption = "1/1",
) -> None:
    """Ask for all needles in made text of several lengths, as RULER does: which share of the answers is found?

    Methods that need a store of all passages are left out: each question has passages of its own.
    Each answer is stored as soon as it is there; the same command goes on where it was cut off.

    Prints a table for each length; the last line is one JSON object.
    """
    lengths, budgets, part = numbers_in("tokens", tokens), numbers_in("budget", budget), shard_of(shard)
    with extra():
        from ..bench import ruler
    ruler.main(
        out,
        tokens=lengths,
        tasks=names_in(tasks),
        model=model,
        limit=limit,
        seed=seed,
        budgets=budgets,
        methods=names_in(methods),
        max_new_tokens=max_new_tokens,
        shard=part,
    )
