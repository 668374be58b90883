"""The ``finch-rag`` command, one file a subcommand. Needs the extra ``cli``."""

from __future__ import annotations

import sys
from importlib.util import find_spec

from ..errors import MissingExtraError


def main() -> None:
    """Runs the command line; ends the process with 0, or 2 after an error, or 130 after Ctrl-C."""
    try:
        for package in ("typer", "rich"):
            if find_spec(package) is None:
                sys.stderr.write(f"Error: {MissingExtraError.of(package, 'cli')}\n")
                sys.exit(2)
        from .app import app

        app(prog_name="finch-rag")
    except KeyboardInterrupt:
        sys.exit(130)
