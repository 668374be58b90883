"""Answers to a batch of questions, as Ray Data's ``map_batches`` asks for them; Ray itself is not needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..answer import Answer
from ..engine import Finch
from ..errors import FinchError, InputError, StoreError
from ..models.embedded import EMBEDDED
from ..prompts.passages import Passage
from ..settings import check_options
from ..sharing import shared_engine
from ..store.folder import StoreFolder
from ..store.reading import Precision
from ..store.store import PassageStore
from .columns import column_of, names_of, passages_of, question_of, with_columns

ADDED = ("answer", "citations", "kept_tokens", "error")


@dataclass(frozen=True, slots=True)
class _Row:
    """A row that can be asked."""

    place: int
    question: str
    passages: list[str | Passage]


class AskBatch:
    """Answers the questions of a batch, and adds columns: answer, citations, kept_tokens, error.

    A row that fails has its ``error``, and no answer; the others of its batch are answered. What would fail for all
    rows (a model that cannot be loaded, a column that is not there, a store that cannot be read) is raised.

    ``batch_format="pyarrow"`` keeps the types of the columns the same in all blocks, also where a block has no answer.

    Args:
        model: As for `Finch.from_pretrained`. Batches of one process with the same settings share one engine.
        question: The column of questions.
        passages: The column of passages: lists of texts, or of objects with text, and id, title, url and score where
            there are such; "passages" when None and there is no store.
        store: In place of such a column, a folder of passages that are read already (``finch-rag index``): each row
            asks all of it. It is opened read-only, so that any number of workers can.
        options: What differs from the engine's settings in these calls, such as ``temperature``; see `Finch.ask`.
        prefix: Stands before the names of the added columns, where the table has such names.
        settings: Keyword arguments of `Finch.from_pretrained`.

    Raises:
        InputError: If options cannot work, or both passages and a store are named.
        SettingsError: If settings cannot work.
        ModelError: If the model cannot be loaded, or Finch cannot run it.
        StoreError: If the store cannot be opened.
    """

    def __init__(
        self,
        model: str | Path = EMBEDDED,
        *,
        question: str = "question",
        passages: str | None = None,
        store: str | Path | None = None,
        options: Mapping[str, Any] | None = None,
        prefix: str = "",
        **settings: Any,
    ) -> None:
        if passages is not None and store is not None:
            raise InputError(f"the column {passages!r} and a store are named: pass passages= or store=, not both")
        self._options: dict[str, Any] = dict(options or {})
        check_options(self._options)
        self._columns = question, "passages" if passages is None and store is None else passages
        self._added = {name: f"{prefix}{name}" for name in ADDED}
        self._finch: Finch = shared_engine(model, **settings)
        if store is not None:
            self._options["store"] = self._opened(store)

    @property
    def finch(self) -> Finch:
        """The engine."""
        return self._finch

    def __call__(self, batch: Any) -> Any:
        """The batch with answers, of the same kind.

        Args:
            batch: A dictionary of arrays, a pandas frame or an Arrow table.

        Raises:
            InputError: If a column is missing, or one that would be added is there.
            StoreError: If the store cannot be read.
        """
        if taken := [name for name in self._added.values() if name in names_of(batch)]:
            raise InputError(f"the table has a column {taken[0]!r} already: pass prefix= for the names of the new ones")
        rows, errors = self._rows(batch)
        told: dict[str, list[Any]] = {
            "answer": [None] * len(errors),
            "citations": [[] for _ in errors],
            "kept_tokens": [0] * len(errors),
            "error": errors,
        }
        for row, outcome in self._outcomes(rows):
            if isinstance(outcome, FinchError):
                told["error"][row.place] = str(outcome)
                continue
            told["answer"][row.place] = outcome.text
            told["citations"][row.place] = [citation.to_dict() for citation in outcome.citations]
            told["kept_tokens"][row.place] = outcome.report.kept_tokens
        return with_columns(batch, {self._added[name]: values for name, values in told.items()})

    def _rows(self, batch: Any) -> tuple[list[_Row], list[str | None]]:
        """The rows that can be asked; and what is wrong with each row, None where nothing is."""
        questions = column_of(batch, self._columns[0])
        lists = [None] * len(questions) if self._columns[1] is None else column_of(batch, self._columns[1])
        rows: list[_Row] = []
        errors: list[str | None] = []
        for place, (question, passages) in enumerate(zip(questions, lists, strict=True)):
            try:
                rows.append(_Row(place, question_of(question), passages_of(passages)))
                errors.append(None)
            except InputError as error:
                errors.append(str(error))
        return rows, errors

    def _outcomes(self, rows: Sequence[_Row]) -> list[tuple[_Row, Answer | FinchError]]:
        """Answers of rows, together; where that fails, of each half by itself, down to the one that is to blame."""
        if not rows:
            return []
        try:
            answers = self._finch.ask_many(
                [row.question for row in rows], [row.passages for row in rows], **self._options
            )
            return list(zip(rows, answers, strict=True))
        except StoreError:
            raise
        except FinchError as error:
            if len(rows) == 1:
                return [(rows[0], error)]
        half = len(rows) // 2
        return [*self._outcomes(rows[:half]), *self._outcomes(rows[half:])]

    def _opened(self, store: str | Path) -> PassageStore:
        with StoreFolder(Path(store).expanduser()) as folder:
            precision: Precision = "int8" if folder.info().precision == "int8" else "bfloat16"
        return self._finch.open_store(store, precision=precision, read_only=True)
