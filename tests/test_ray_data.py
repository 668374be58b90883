"""Batches and tables of questions. Nothing here needs Ray itself; what needs pyarrow or pandas is skipped without."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finch_rag import Finch, Passage
from finch_rag.errors import InputError, ModelError, StoreError
from finch_rag.ray_data import AskBatch, answer_table
from finch_rag.ray_data.asking import ADDED
from finch_rag.sharing import release_engine, shared_engine

from .small import texts

SETTINGS: dict[str, Any] = {
    "heads": [(0, 1), (1, 2)],
    "alone_heads": [(0, 1), (1, 2)],
    "dtype": "float32",
    "device": "cpu",
    "max_new_tokens": 6,
    "instructions": "Answer.",
    "system_prompt": "",
    "budget": 60,
}
QUESTIONS = ["When was the lighthouse built?", "Who is the captain?", "Where is the harbour?", "When did it open?"]
LISTS: list[Any] = [
    texts(4),
    [{"id": 7, "title": "Ferry", "text": text} for text in texts(3, seed=1)],
    texts(5, seed=2),
    [{"id": "b", "text": text, "title": None, "score": 0.5} for text in texts(2, seed=3)],
]


@pytest.fixture(autouse=True, scope="module")
def nothing_is_kept() -> Any:
    yield
    release_engine()


def rows(questions: list[Any], lists: list[Any]) -> dict[str, Any]:
    batch: dict[str, Any] = {"question": np.empty(len(questions), object), "passages": np.empty(len(lists), object)}
    batch["question"][:] = questions
    for place, passages in enumerate(lists):
        batch["passages"][place] = passages
    return batch


def alone(folder: str) -> list[Any]:
    """The answers of an engine that is asked one by one."""
    finch = shared_engine(folder, **SETTINGS)
    lists = [
        [p if isinstance(p, str) else Passage(p["text"], str(p["id"]), p["title"], score=p.get("score")) for p in own]
        for own in LISTS
    ]
    return [finch.ask(question, own) for question, own in zip(QUESTIONS, lists, strict=True)]


def test_a_batch_is_answered_as_one_by_one(model_folder: str) -> None:
    batch = rows(QUESTIONS, LISTS)
    done = AskBatch(model_folder, **SETTINGS)(batch)
    expected = alone(model_folder)
    assert list(batch) == ["question", "passages"]  # as it was
    assert list(done) == ["question", "passages", *ADDED]
    assert list(done["answer"]) == [answer.text for answer in expected]
    assert list(done["kept_tokens"]) == [answer.report.kept_tokens for answer in expected]
    assert list(done["error"]) == [None] * 4
    for told, answer in zip(done["citations"], expected, strict=True):
        assert [(c["index"], c["passage_id"], c["title"]) for c in told] == [
            (c.index, c.passage_id, c.title) for c in answer.citations
        ]
    assert done["citations"][1][0]["passage_id"] == "7"


def test_batches_share_an_engine(model_folder: str) -> None:
    assert AskBatch(model_folder, **SETTINGS).finch is AskBatch(model_folder, question="q", **SETTINGS).finch


def test_a_question_that_fails_leaves_the_others_alone(model_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ask = AskBatch(model_folder, **SETTINGS)
    asked: list[int] = []
    ask_many = Finch.ask_many

    def counted(finch: Finch, questions: Any, *args: Any, **options: Any) -> Any:
        asked.append(len(questions))
        return ask_many(finch, questions, *args, **options)

    monkeypatch.setattr(Finch, "ask_many", counted)
    questions: list[Any] = [*QUESTIONS, "word " * 3000, None, 3, "Who?", "Who?"]
    lists = [*LISTS, texts(2), texts(2), texts(2), "no list", [{"id": "x"}]]
    done = ask(rows(questions, lists))
    expected = alone(model_folder)
    assert list(done["answer"]) == [answer.text for answer in expected] + [None] * 5
    assert list(done["error"][:4]) == [None] * 4
    assert "tokens" in done["error"][4] or "window" in done["error"][4]
    assert done["error"][5] == "the question is empty: pass a text"
    assert done["error"][6] == "the question is int: pass a text"
    assert "the passages are str" in done["error"][7]
    assert "passage 0 has no text" in done["error"][8]
    assert done["citations"][4] == []
    assert done["kept_tokens"][4] == 0
    assert asked[0] == 5  # those that can be asked, at once
    assert min(asked) == 1


def test_pandas_and_arrow_come_back_as_they_are(model_folder: str) -> None:
    pd, pa = pytest.importorskip("pandas"), pytest.importorskip("pyarrow")
    ask = AskBatch(model_folder, passages="texts", prefix="finch_", **SETTINGS)
    plain = {"question": QUESTIONS[:2], "texts": [texts(4), texts(5, seed=2)], "answer": ["gold", "gold"]}
    table, frame = ask(pa.table(plain)), ask(pd.DataFrame(plain))
    assert table.column_names == ["question", "texts", "answer", *(f"finch_{name}" for name in ADDED)]
    assert list(frame.columns) == table.column_names
    assert table["finch_answer"].to_pylist() == list(frame["finch_answer"])
    assert table["finch_citations"].to_pylist() == list(frame["finch_citations"])
    nothing = ask(pa.table({**plain, "question": ["", ""]}))
    assert nothing.schema == table.schema  # so that blocks can be put together


def test_a_store_serves_all_rows(model_folder: str, tmp_path: Path) -> None:
    finch = Finch.from_pretrained(model_folder, **SETTINGS)
    passages = [Passage(text, f"p{n}") for n, text in enumerate(texts(8))]
    with finch.open_store(tmp_path / "store", precision="int8") as store:
        store.add(passages)
        expected = [finch.ask(question, store=store) for question in QUESTIONS]
        ask = AskBatch(model_folder, store=tmp_path / "store", **SETTINGS)  # beside its writer
        done = ask({"question": np.array(QUESTIONS)})
    assert list(done["error"]) == [None] * 4
    assert list(done["answer"]) == [answer.text for answer in expected]
    assert [c["passage_id"] for c in done["citations"][0]] == [c.passage_id for c in expected[0].citations]


def test_what_fails_for_all_rows_is_raised(model_folder: str, tmp_path: Path) -> None:
    ask = AskBatch(model_folder, **SETTINGS)
    with pytest.raises(InputError, match="no column 'question': it has text"):
        ask({"text": np.array(["x"])})
    with pytest.raises(InputError, match="column 'answer' already"):
        ask({**rows(QUESTIONS, LISTS), "answer": np.zeros(4)})
    with pytest.raises(InputError, match="batch is int"):
        ask(3)
    with pytest.raises(InputError, match="not both"):
        AskBatch(model_folder, passages="passages", store=tmp_path, **SETTINGS)
    with pytest.raises(InputError, match="temprature"):
        AskBatch(model_folder, options={"temprature": 1}, **SETTINGS)
    with pytest.raises(StoreError):
        AskBatch(model_folder, store=tmp_path / "none", **SETTINGS)
    with pytest.raises(ModelError):
        AskBatch(tmp_path / "none", **SETTINGS)


# Tables


@pytest.fixture
def table(tmp_path: Path) -> Path:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    file = tmp_path / "questions.parquet"
    many: dict[str, Any] = {
        "key": [f"k{n}" for n in range(7)],
        "question": [f"token{n}, when was it built?" for n in range(7)],
        "passages": [texts(3, seed=n) for n in range(7)],
    }
    many["question"][4] = ""
    parquet.write_table(pa.table(many), file, row_group_size=3)
    return file


def read(output: Path) -> dict[str, list[Any]]:
    from pyarrow import parquet

    found: dict[str, list[Any]] = parquet.read_table(output).to_pydict()
    return found


def test_a_table_is_answered_by_blocks(model_folder: str, table: Path, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    output = tmp_path / "answers"
    asked = answer_table(
        table, output, model=model_folder, block_rows=2, on_progress=lambda *step: told.append(step), **SETTINGS
    )
    assert asked == 7
    assert told == [("questions", done, 7) for done in (0, 2, 4, 6, 7)]
    assert sorted(file.name for file in output.glob("part-*")) == [f"part-{n:06d}.parquet" for n in range(4)]
    found = read(output)
    assert list(found) == ["row", "key", "question", *ADDED]
    assert found["row"] == list(range(7))
    finch = shared_engine(model_folder, **SETTINGS)
    assert found["answer"][5] == finch.ask(found["question"][5], texts(3, seed=5)).text
    assert [error is not None for error in found["error"]] == [n == 4 for n in range(7)]


@pytest.mark.parametrize("id_column", [None, "key"])
def test_a_table_is_resumed(
    model_folder: str, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, id_column: str | None
) -> None:
    output = tmp_path / "answers"
    again = {"model": model_folder, "id_column": id_column, "block_rows": 2, **SETTINGS}
    whole = tmp_path / "whole"
    answer_table(table, whole, **again)
    ask_many, asked = Finch.ask_many, list[str]()

    def dies(finch: Finch, questions: Any, *args: Any, **options: Any) -> Any:
        asked.extend(questions)
        if "token2" in questions[0]:
            raise KeyboardInterrupt
        return ask_many(finch, questions, *args, **options)

    monkeypatch.setattr(Finch, "ask_many", dies)
    with pytest.raises(KeyboardInterrupt):
        answer_table(table, output, **again)
    assert len(read(output)["question"]) == 2
    (output / ".part-000001.parquet").write_text("half a file")
    monkeypatch.setattr(Finch, "ask_many", ask_many)
    assert answer_table(table, output, **again) == 5
    assert read(output) == read(whole)
    monkeypatch.setattr(AskBatch, "__init__", lambda *_, **__: pytest.fail("a model is loaded for nothing"))
    assert answer_table(table, output, **again) == 0
    assert not (output / ".part-000001.parquet").exists()


def test_answers_that_do_not_fit_are_one_line_and_asked_again(
    model_folder: str, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pyarrow import parquet

    output = tmp_path / "answers"
    again = {"model": model_folder, "block_rows": 2, **SETTINGS}
    write_table, written = parquet.write_table, list[Path]()

    def full(found: Any, file: Path) -> None:
        written.append(file)
        if len(written) == 2:
            file.write_bytes(b"half a file")
            raise OSError(errno.ENOSPC, "No space left on device")
        write_table(found, file)

    monkeypatch.setattr(parquet, "write_table", full)
    with pytest.raises(InputError, match=r"2 answers, \d+ bytes, cannot be written to .*: No space left") as caught:
        answer_table(table, output, **again)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in output.iterdir()) == [".lock", "part-000000.parquet"]
    assert answer_table(table, output, **again) == 5
    assert sorted(read(output)["row"]) == list(range(7))


def test_rows_that_are_new_are_asked_alone(model_folder: str, table: Path, tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    output = tmp_path / "answers"
    answer_table(table, output, model=model_folder, id_column="key", **SETTINGS)
    old = parquet.read_table(table)
    more = pa.table({"key": ["new"], "question": ["Who?"], "passages": [texts(2)]})
    parquet.write_table(pa.concat_tables([more, old]), table)
    assert answer_table(table, output, model=model_folder, id_column="key", **SETTINGS) == 1
    assert read(output)["key"] == [*old["key"].to_pylist(), "new"]


def test_what_cannot_work_says_so(model_folder: str, table: Path, tmp_path: Path) -> None:
    import pyarrow as pa
    from filelock import FileLock
    from pyarrow import parquet

    output = tmp_path / "answers"
    answer_table(table, output, model=model_folder, **SETTINGS)
    with pytest.raises(InputError, match="was not written by this call"):
        answer_table(table, output, model=model_folder, id_column="key", **SETTINGS)
    with pytest.raises(InputError, match="no column 'id'"):
        answer_table(table, output, model=model_folder, id_column="id", **SETTINGS)
    with pytest.raises(InputError, match="cannot be read"):
        answer_table(tmp_path / "none.parquet", output, model=model_folder, **SETTINGS)
    with pytest.raises(InputError, match="block_rows is 0: the least is 1"):
        answer_table(table, output, model=model_folder, block_rows=0, **SETTINGS)
    with FileLock(output / ".lock"), pytest.raises(InputError, match="another call writes"):
        answer_table(table, output, model=model_folder, **SETTINGS)
    parquet.write_table(pa.table({"key": ["a", "a"], "question": ["x", "y"]}), table)
    with pytest.raises(InputError, match="1 ids for 2 rows"):
        answer_table(table, tmp_path / "more", model=model_folder, id_column="key", **SETTINGS)
