"""``finch-rag store``: what a store holds, whether it is whole, and how to empty it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from ..terminal.output import cell, out, say, say_json
from .arguments import JsonOption

if TYPE_CHECKING:
    from ..store.folder import StoreFolder

app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", help="Look at stores of passages, and keep them.")

FolderArgument = Annotated[Path, typer.Argument(metavar="DIR", help="The store's folder.", show_default=False)]


@app.command("info")
def show_info(folder: FolderArgument, as_json: JsonOption = False) -> None:
    """Show what a store holds: passages, tokens, bytes, and of which model its keys are."""
    with _opened(folder) as store:
        info = store.info()
    if as_json:
        say_json(asdict(info))
        return
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    lines = {
        "passages": f"{info.passages:,}",
        "tokens": f"{info.tokens:,}",
        "keys": f"{info.nbytes / 2**20:,.1f} MiB, {info.bytes_per_token:,} bytes a token, {info.precision}",
        "heads": ", ".join(f"{layer}.{head}" for layer, head in info.heads) + " (layer.head)",
        "model": f"{info.model} (fingerprint)",
    }
    for name, text in lines.items():
        table.add_row(name, cell(text))
    out.print(table)


@app.command("verify")
def verify(
    folder: FolderArgument,
    repair: Annotated[
        bool, typer.Option("--repair", help="Remove damaged passages, so that the next index reads them again.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Compare all keys of a store with their checksums; ends with 1 where some are damaged and not repaired."""
    with _opened(folder, writes=repair) as store:
        damaged = store.verify(repair)
        passages = store.info().passages
    if as_json:
        say_json({"passages": passages, "damaged": damaged, "repaired": bool(damaged) and repair})
    elif not damaged:
        say(f"all keys of {passages:,} passages are whole")
    else:
        shown = ", ".join(damaged[:5]) + (", ..." if len(damaged) > 5 else "")
        done = "removed; add them again" if repair else "damaged; --repair removes them"
        say(f"{len(damaged):,} passages are {done}: {shown}")
    if damaged and not repair:
        raise typer.Exit(1)


@app.command("clear")
def clear(folder: FolderArgument) -> None:
    """Remove all passages of a store; the folder stays a store."""
    with _opened(folder, writes=True) as store:
        removed = store.info().passages
        store.clear()
    say(f"{removed:,} passages removed from {folder}")


def _opened(folder: Path, writes: bool = False) -> StoreFolder:
    from ..store.folder import StoreFolder  # waits for torch

    return StoreFolder(folder, writes=writes)
