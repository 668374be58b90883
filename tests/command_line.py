"""The command line in tests: a corpus, and what a command writes."""

from __future__ import annotations

import json
from typing import Any

from typer.testing import CliRunner, Result

from finch_rag.cli.app import app

CORPUS = """# Island

## Harbour
The harbour was built in 1874 by the engineer Clara Novak.

## Lighthouse
The lighthouse on the rock was built by Hugo Kessler in the winter of 1902.

## [red]Museum[/red]
The museum opened in 1931 and holds a large collection of instruments.
"""


def run(*args: Any) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args], catch_exceptions=False)


def only_json(result: Result) -> dict[str, Any]:
    """The object on stdout, where nothing else may stand."""
    assert result.exit_code == 0, result.stderr
    (line,) = result.stdout.splitlines()
    parsed: dict[str, Any] = json.loads(line)
    return parsed


def one_error(result: Result) -> str:
    assert result.exit_code == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: ")
    return line
