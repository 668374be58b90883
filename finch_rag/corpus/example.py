"""The example corpus: original text that comes with the package, and questions about it."""

from __future__ import annotations

from pathlib import Path

from ..errors import CorpusError


def example_corpus() -> Path:
    """The folder of the example corpus, in an installed package or a source checkout.

    Raises:
        CorpusError: If it is in neither.
    """
    package = Path(__file__).parent.parent
    for folder in (package / "example_corpus", package.parent / "examples" / "corpus"):
        if folder.is_dir():
            return folder
    raise CorpusError("the example corpus is not there: install finch-rag again, or run the demo in a source checkout")
