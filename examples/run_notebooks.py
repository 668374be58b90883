"""Makes each notebook here from the script beside it, runs it and stores its outputs."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent


def run(script: Path) -> None:
    """Runs a script, cells and text in percent format, as a notebook.

    Args:
        script: Its notebook is written beside it.
    """
    notebook = jupytext.read(script)
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"  # the same in each run, so that a change shows what changed
    started = time.perf_counter()
    os.environ |= {"PYTHONWARNINGS": "ignore", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}  # both would show in the outputs
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(FOLDER)}}).execute()
    nbformat.write(tidied(notebook), script.with_suffix(".ipynb"))
    sys.stdout.write(f"{script.stem}: {time.perf_counter() - started:.0f} s\n")


def tidied(notebook: Any) -> Any:
    """The notebook without what differs from run to run: times, warnings, and where a stream of text was cut.

    Args:
        notebook: It is changed.
    """
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            text = "".join(output.text for output in cell.outputs if output.get("name") == "stdout")
            cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text=text)] if text else []
    return notebook


if __name__ == "__main__":
    names = sys.argv[1:] or [script.stem for script in FOLDER.glob("*.py") if script != Path(__file__)]
    for name in sorted(names):
        run(FOLDER / f"{name}.py")
