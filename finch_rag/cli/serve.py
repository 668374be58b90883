"""``finch-rag serve``: the model behind an OpenAI-compatible HTTP interface."""

from __future__ import annotations

import logging
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from ..errors import MissingExtraError
from ..models.embedded import EMBEDDED
from ..terminal.loading import check_positive, load_finch
from ..terminal.output import note, printable, say
from ..terminal.progress import ProgressBars
from .arguments import BudgetOption, ModelOption, RoundsOption

EPILOG = (
    "[bold]Examples[/]\n\nfinch-rag serve --model Qwen/Qwen2.5-7B-Instruct --store stores/\n\n"
    "finch-rag serve --host 0.0.0.0 --api-key-file keys.txt --running 8 --timeout 120"
)
_NEEDED = {"fastapi": "fastapi", "uvicorn": "uvicorn", "prometheus_client": "prometheus-client"}
_OWN_HOSTS = ("127.0.0.1", "::1", "localhost")
_MIB = 2**20


def serve(
    model: ModelOption = EMBEDDED,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0 takes a free one.")] = 8000,
    name: Annotated[
        str | None,
        typer.Option(help="What requests call the model.  [dim]\\[default: its own name][/]", show_default=False),
    ] = None,
    stores: Annotated[
        Path | None,
        typer.Option(
            "--store", metavar="DIR", help="A folder of stores, which requests make and ask.", show_default=False
        ),
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="API keys, one a line; requests must bring one of them, or that in FINCH_API_KEY.",
            show_default=False,
        ),
    ] = None,
    running: Annotated[int, typer.Option(metavar="N", help="The most answers at once.")] = 16,
    waiting: Annotated[int, typer.Option(metavar="N", help="The most requests that wait; others get a 429.")] = 64,
    timeout: Annotated[float, typer.Option(metavar="SECONDS", help="The most of a request, waiting included.")] = 600,
    first_token_timeout: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            help="The most to the first piece of an answer.  [dim]\\[default: that of the request][/]",
            show_default=False,
        ),
    ] = None,
    max_body_mib: Annotated[int, typer.Option(metavar="MIB", help="The largest request.")] = 64,
    budget: BudgetOption = None,
    rounds: RoundsOption = None,
    compile_layers: Annotated[
        bool, typer.Option("--compile-layers", help="Fuse norms and MLPs, for a GPU: the first answer takes longer.")
    ] = False,
    log_prompts: Annotated[
        bool, typer.Option("--log-prompts", help="Write questions and prompts to the log, too.")
    ] = False,
) -> None:
    """Answer over HTTP, as OpenAI does, from documents, with citations.

    Clients send passages as documents of a request, or name a store; /docs shows all endpoints.
    Ctrl-C finishes what runs.
    """
    for module, package in _NEEDED.items():
        if find_spec(module) is None:
            raise MissingExtraError.of(package, "serve")
    check_positive(budget=budget, running=running, max_body_mib=max_body_mib)
    from ..serve.keys import read_keys
    from ..serve.settings import ServeSettings

    settings = ServeSettings(
        name=name,
        stores=stores,
        api_keys=read_keys(api_key_file),
        running=running,
        waiting=waiting,
        timeout=timeout,
        first_token_timeout=first_token_timeout,
        max_body_bytes=max_body_mib * _MIB,
        log_prompts=log_prompts,
    )
    if not settings.api_keys and host not in _OWN_HOSTS:
        note(f"whoever reaches {host} may ask, and change stores: --api-key-file asks for a key")
    with ProgressBars() as bars:
        finch = load_finch(model, bars, budget=budget, rounds=rounds, compile_layers=compile_layers)
    from ..serve.app import make_app
    from ..serve.server import Server

    _show_requests()
    Server(make_app(finch, settings), host=host, port=port, on_ready=_say_where).run()


def _say_where(url: str) -> None:
    say(f"finch-rag listens at {url}")
    sys.stdout.flush()


class _Lines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        """The record without control characters: what clients send must not steer the terminal."""
        return printable(super().format(record))


def _show_requests() -> None:
    """Writes what the server logs to stderr, a line a request; uvicorn's warnings, too."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Lines("%(asctime)s %(levelname)s %(message)s"))
    for logger, level in (("finch_rag.serve", logging.INFO), ("uvicorn", logging.WARNING)):
        logging.getLogger(logger).addHandler(handler)
        logging.getLogger(logger).setLevel(level)
    logging.getLogger("finch_rag.serve").propagate = False  # else warnings would be shown as notes, too
