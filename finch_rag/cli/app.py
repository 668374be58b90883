"""The commands of ``finch-rag``, joined. See `finch_rag.cli` for the entry point."""

from __future__ import annotations

import errno
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .. import __version__
from ..errors import FinchError
from ..terminal.output import say, show_error, show_log
from . import ask, bench, check, demo, heads, index, rank, serve, store


class Commands(TyperGroup):
    """Commands whose expected errors end as one line on stderr and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        """Runs the command that was asked for."""
        try:
            return super().invoke(ctx)
        except FinchError as error:
            show_error(error)
            raise typer.Exit(2) from error
        except OSError as error:  # a folder that must not be written, a full disk
            if error.errno == errno.EPIPE:  # `finch-rag ... | head`
                raise
            show_error(error)
            raise typer.Exit(2) from error


app = typer.Typer(
    cls=Commands, no_args_is_help=True, add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False
)
app.command(epilog=ask.EPILOG)(ask.ask)
app.command(epilog=rank.EPILOG)(rank.rank)
app.command(epilog=index.EPILOG)(index.index)
app.add_typer(store.app, name="store")
app.command(epilog=serve.EPILOG)(serve.serve)
app.command("demo")(demo.show_demo)
app.command(epilog=heads.EPILOG)(heads.heads)
app.command(epilog=check.EPILOG)(check.check)
app.add_typer(bench.app, name="bench")


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
    show_log()
