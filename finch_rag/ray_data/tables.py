"""A table of questions, in parquet, becomes a table of answers; what is answered already is not asked again."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from ..errors import FinchError, InputError, MissingExtraError
from ..models.embedded import EMBEDDED
from ..paths import remove_leftovers, replacing, told_where
from ..request import Progress
from .asking import AskBatch

if TYPE_CHECKING:
    import pyarrow as pa

ROW = "row"  # the column of the output that has a row's place in the input, where no column has ids
_PART = re.compile(r"part-(\d+)\.parquet")
_ABOUT = b"finch_rag"  # in the metadata of each part
_AHEAD = 2  # blocks a worker that are asked, or wait to be
_RETRIES = 2  # of a block whose worker was lost


def answer_table(
    input: str | Path,  # noqa: A002 - the pair input and output says it best
    output: str | Path,
    *,
    model: str | Path = EMBEDDED,
    question: str = "question",
    passages: str | None = None,
    store: str | Path | None = None,
    id_column: str | None = None,
    block_rows: int = 64,
    workers: int | None = None,
    worker_options: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    prefix: str = "",
    on_progress: Progress | None = None,
    **settings: Any,
) -> int:
    """Answers all questions of a parquet table.

    The output is a folder of parquet files, one a block of questions, which pandas, Arrow and Ray read as one table. It
    has the columns of the input but that of the passages, and those of `AskBatch`. A file is there whole or not at all:
    a call that was ended, and is made again, asks only what has no row in the output yet. To ask rows with an error
    again, delete the files that have them.

    Args:
        input: A parquet file, or a folder of such files.
        output: A folder, made if it is missing. One call at a time writes there.
        model: See `AskBatch`.
        question: See `AskBatch`.
        passages: See `AskBatch`.
        store: See `AskBatch`.
        id_column: A column of the input that tells its rows apart; their places do when None, which the output then
            has in a column "row".
        block_rows: Questions that are asked together, and written together.
        workers: Processes of Ray that each have an engine, where Ray is running (or is started); None asks in this
            process, without Ray.
        worker_options: Ray's options of each, such as ``{"num_gpus": 1}``.
        options: See `AskBatch`.
        prefix: See `AskBatch`.
        on_progress: Called with "questions", those done and all; None shows a bar where stderr is a terminal.
        settings: Keyword arguments of `Finch.from_pretrained`.

    Returns:
        How many questions this call has asked.

    Raises:
        InputError: If the input cannot be read, has two rows of one id, or the output is of another call.
        MissingExtraError: If pyarrow is not installed; if Ray is not, and there are to be workers.
        FinchError: See `AskBatch`.
    """
    _check_counts(block_rows=block_rows, workers=workers)
    asked = {
        "model": str(model),
        "question": question,
        "passages": passages,
        "store": None if store is None else str(store),
        "id_column": id_column,
        "options": {name: repr(value) for name, value in (options or {}).items()},
        "prefix": prefix,
    }
    source = _Source(Path(input), id_column)
    making: dict[str, Any] = {
        "model": model,
        "question": question,
        "passages": passages,
        "store": store,
        "options": options,
        "prefix": prefix,
        **settings,
    }
    left_out = passages or (None if store is not None else "passages")
    with _writing(Path(output), asked) as parts, _told(on_progress) as tell:
        done = parts.ids(source.id_name)
        new = source.total - source.count(done)
        first = source.total - new
        tell("questions", first, source.total)
        blocks = source.blocks(done, block_rows)
        answered = 0
        for table in _answered(blocks, making, workers, worker_options) if new else ():
            parts.add(table.drop_columns([left_out]) if left_out in table.column_names else table)
            answered += table.num_rows
            tell("questions", first + answered, source.total)
        return answered


class _Source:
    """A table of questions, with an id a row."""

    def __init__(self, path: Path, id_column: str | None) -> None:
        try:
            import pyarrow as pa
            from pyarrow import dataset
        except ImportError as error:
            raise MissingExtraError.of("pyarrow", "ray") from error
        try:
            self._data = dataset.dataset(str(path), format="parquet")
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"the table {path} cannot be read: {error}; pass a parquet file, or a folder") from error
        names = self._data.schema.names
        self.id_name, self._has_ids = id_column or ROW, id_column is not None
        if self._has_ids and id_column not in names:
            raise InputError(f"the table has no column {id_column!r}: it has {', '.join(names)}")
        if not self._has_ids and ROW in names:
            raise InputError(f"the table has a column {ROW!r}: name the one that tells rows apart, with id_column=")
        self.total: int = self._data.count_rows()
        self._ids = self._read_ids()

    def _read_ids(self) -> set[Any]:
        if not self._has_ids:
            return set(range(self.total))
        ids = self._data.to_table(columns=[self.id_name])[self.id_name].to_pylist()
        if None in (known := set(ids)) or len(known) < len(ids):
            raise InputError(
                f"the column {self.id_name!r} has {len(known - {None})} ids for {len(ids)} rows: each needs its own; "
                "leave id_column out, and rows are told apart by their places"
            )
        return known

    def count(self, done: set[Any]) -> int:
        """Rows of which the ids are among some."""
        return len(self._ids & done)

    def blocks(self, done: set[Any], rows: int) -> Iterator[pa.Table]:
        """The other rows, some at a time."""
        import pyarrow as pa

        waiting: list[pa.Table] = []
        place = 0
        for batch in self._data.to_batches(batch_size=rows):
            table = pa.Table.from_batches([batch])
            if not self._has_ids:
                table = table.add_column(0, ROW, pa.array(range(place, place + table.num_rows), pa.int64()))
            place += table.num_rows
            new = [known not in done for known in table[self.id_name].to_pylist()]
            waiting.append(table.filter(pa.array(new, pa.bool_())))
            while sum(part.num_rows for part in waiting) >= rows:
                whole = pa.concat_tables(waiting)
                yield whole.slice(0, rows)
                waiting = [whole.slice(rows)]
        rest = pa.concat_tables(waiting) if waiting else None
        if rest is not None and rest.num_rows:
            yield rest


class _Parts:
    """The files of an output."""

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        self._folder, self._about = folder, json.dumps(about, sort_keys=True)
        remove_leftovers(folder)
        for left in folder.glob(".part-*.parquet"):  # of a call of an earlier release that was ended
            left.unlink()
        self._files = sorted(file for file in folder.iterdir() if _PART.fullmatch(file.name))
        numbers = [int(found[1]) for file in self._files if (found := _PART.fullmatch(file.name))]
        self._next = max(numbers, default=-1) + 1

    def ids(self, name: str) -> set[Any]:
        """The ids of all rows that are there.

        Args:
            name: Of their column.

        Raises:
            InputError: If a file is not of such a call.
        """
        import pyarrow as pa
        from pyarrow import parquet

        found: set[Any] = set()
        for file in self._files:
            try:
                about = (parquet.read_schema(file).metadata or {}).get(_ABOUT, b"").decode()
                if about == self._about:
                    found.update(parquet.read_table(file, columns=[name])[name].to_pylist())
            except (OSError, pa.ArrowException) as error:
                raise InputError(f"{file} cannot be read: {error}; delete it, and its questions are asked") from error
            if about != self._about:
                raise InputError(
                    f"{file} was not written by this call, but by {about or 'another program'}: pass another output"
                )
        return found

    def add(self, table: pa.Table) -> None:
        """Writes a file, whole or not at all.

        Args:
            table: Its rows.

        Raises:
            InputError: If it cannot be written.
        """
        from pyarrow import parquet

        told = {**(table.schema.metadata or {}), _ABOUT: self._about.encode()}
        name = f"part-{self._next:06d}.parquet"
        what = f"{table.num_rows} answers, {table.nbytes} bytes,"
        cure = "call again with the folder elsewhere; what is answered there is not asked again"
        with told_where(what, self._folder, InputError, cure), replacing(self._folder / name) as new:
            parquet.write_table(table.replace_schema_metadata(told), new)
        self._next += 1


@contextmanager
def _writing(folder: Path, about: Mapping[str, Any]) -> Iterator[_Parts]:
    lock = FileLock(folder / ".lock")
    with told_where("the answers", folder, InputError, "pass another output"):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise InputError(f"another call writes to {folder}: wait for it, or pass another output") from None
    try:
        with told_where("the answers", folder, InputError, "pass another output"):
            parts = _Parts(folder, about)
        yield parts
    finally:
        lock.release()


@contextmanager
def _told(on_progress: Progress | None) -> Iterator[Progress]:
    if on_progress is not None:
        yield on_progress
        return
    try:
        from ..terminal.progress import ProgressBars
    except ImportError as error:
        raise MissingExtraError.of("rich", "ray") from error
    with ProgressBars(remaining=True) as bars:
        yield bars


def _answered(
    blocks: Iterable[pa.Table], making: Mapping[str, Any], workers: int | None, worker_options: Mapping[str, Any] | None
) -> Iterator[pa.Table]:
    """Blocks with their answers; those of several workers come as they are ready."""
    if workers is None:
        ask = AskBatch(**making)
        yield from map(ask, blocks)
        return
    try:
        import ray
    except ImportError as error:
        raise MissingExtraError.of("ray", "ray") from error
    lost = {"max_restarts": -1, "max_task_retries": _RETRIES}
    remote = ray.remote(AskBatch).options(**{**lost, **(worker_options or {})})
    actors = [remote.remote(**making) for _ in range(workers)]
    try:
        waiting: dict[Any, Any] = {}
        free = actors * _AHEAD
        for block in blocks:
            actor = free.pop()
            waiting[actor.__call__.remote(block)] = actor
            if not free:
                yield _first(ray, waiting, free)
        while waiting:
            yield _first(ray, waiting, free)
    finally:
        for actor in actors:
            ray.kill(actor)


def _first(ray: Any, waiting: dict[Any, Any], free: list[Any]) -> pa.Table:
    """The block that is ready first; its worker is free for another."""
    (ready,), _ = ray.wait(list(waiting), num_returns=1)
    free.append(waiting.pop(ready))
    try:
        return ray.get(ready)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None  # as without Ray
    except ray.exceptions.RayActorError as error:
        reason = str(error).strip().splitlines()[-1]
        raise FinchError(f"a worker was lost, and its retries too: {reason}; call again, to ask what is left") from None


def _check_counts(**counts: int | None) -> None:
    for name, count in counts.items():
        if count is not None and count < 1:
            raise InputError(f"{name} is {count}: the least is 1")
