"""Batches as Ray Data hands them out: dictionaries of arrays, pandas' frames, Arrow's tables; read, and added to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import InputError
from ..prompts.passages import Passage

_FIELDS = ("text", "id", "title", "url", "score")  # of a passage that is no mere text


def names_of(batch: Any) -> list[str]:
    """The columns of a batch.

    Args:
        batch: A mapping of arrays, a pandas frame or an Arrow table.

    Raises:
        InputError: If it is none of these.
    """
    if isinstance(batch, Mapping):
        return [str(name) for name in batch]
    if hasattr(batch, "column_names"):
        return list(batch.column_names)
    if hasattr(batch, "columns"):
        return [str(name) for name in batch.columns]
    raise InputError(
        f"the batch is {type(batch).__name__}: use batch_format 'numpy', 'pandas' or 'pyarrow', or pass a dictionary"
    )


def column_of(batch: Any, name: str) -> list[Any]:
    """A column as plain Python values.

    Args:
        batch: See `names_of`.
        name: Of the column.

    Raises:
        InputError: If it is not there.
    """
    names = names_of(batch)
    if name not in names:
        raise InputError(f"the table has no column {name!r}: it has {', '.join(names)}")
    column = batch[name]
    found = column.to_pylist() if hasattr(column, "to_pylist") else column.tolist() if _many(column) else list(column)
    return [_plain(value) for value in found]


def with_columns(batch: Any, added: Mapping[str, Sequence[Any]]) -> Any:
    """A batch of the same kind with more columns; the given one stays as it is.

    Args:
        batch: See `names_of`.
        added: Values by column, one a row.
    """
    if isinstance(batch, Mapping):
        return {**batch, **{name: _array(values) for name, values in added.items()}}
    if hasattr(batch, "assign"):
        return batch.assign(**{name: _array(values) for name, values in added.items()})
    import pyarrow as pa

    types = arrow_types()
    for name, values in added.items():
        kind = next(kind for ending, kind in types.items() if name.endswith(ending))
        batch = batch.append_column(name, pa.array(values, kind))
    return batch


def arrow_types() -> dict[str, Any]:
    """What Arrow calls the columns that answers add, so that all blocks of a table agree, those with errors too."""
    import pyarrow as pa

    quote = pa.struct([("text", pa.string()), ("start", pa.int64()), ("end", pa.int64()), ("share", pa.float64())])
    citation = pa.struct(
        [
            ("passage_id", pa.string()),
            ("index", pa.int64()),
            ("title", pa.string()),
            ("share", pa.float64()),
            ("kept_tokens", pa.int64()),
            ("passage_tokens", pa.int64()),
            ("quotes", pa.list_(quote)),
        ]
    )
    return {"answer": pa.string(), "citations": pa.list_(citation), "kept_tokens": pa.int64(), "error": pa.string()}


def question_of(value: Any) -> str:
    """A row's question.

    Args:
        value: Of its column.

    Raises:
        InputError: If it is no text.
    """
    if not isinstance(value, str) or not value.strip():
        shown = "empty" if value is None or isinstance(value, str) else type(value).__name__
        raise InputError(f"the question is {shown}: pass a text")
    return value


def passages_of(value: Any) -> list[str | Passage]:
    """A row's passages.

    Args:
        value: Of its column: texts, or objects with text, and id, title, url and score where there are such; None for
            none.

    Raises:
        InputError: If one of them has no text.
    """
    if value is None:
        return []
    if isinstance(value, (str, Mapping)) or not isinstance(value, Iterable):
        raise InputError(f"the passages are {type(value).__name__}: pass a list of texts, or of id, title and text")
    return [_passage(item, place) for place, item in enumerate(value)]


def _passage(item: Any, place: int) -> str | Passage:
    if isinstance(item, str):
        return item
    fields = {name: item.get(name) for name in _FIELDS} if isinstance(item, Mapping) else {}
    text = fields.get("text")
    if not isinstance(text, str):
        raise InputError(f"passage {place} has no text: pass a text, or an object with id, title and text")
    known, title, url = (None if fields[name] is None else str(fields[name]) for name in ("id", "title", "url"))
    return Passage(text, known, title, {} if url is None else {"url": url}, fields["score"])


def _many(column: Any) -> bool:
    return hasattr(column, "tolist")


def _plain(value: Any) -> Any:
    """A value without numpy's arrays, which stand for lists at any depth; what pandas calls missing is None."""
    if isinstance(value, np.ndarray):
        return [_plain(item) for item in value.tolist()]
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and value != value:
        return None
    return value


def _array(values: Sequence[Any]) -> np.ndarray[Any, Any]:
    """An array of objects, one a row, whatever they are."""
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array
