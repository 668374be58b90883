from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from finch_rag.answer import Answer, CompressionReport
from finch_rag.bench import memory, quality
from finch_rag.bench.bootstrap import bootstrap
from finch_rag.bench.cases import (
    LONG_INSTRUCTIONS,
    DataSet,
    QualityCase,
    make_cases,
    read_cases,
    search_by,
    write_cases,
)
from finch_rag.bench.memory import in_use, peak_memory
from finch_rag.bench.methods import METHODS, Contestant, DoesNotFitError, run
from finch_rag.bench.summary import summarise
from finch_rag.bench.tables import show_quality
from finch_rag.corpus import Question
from finch_rag.engine import Finch
from finch_rag.errors import CorpusError, InputError
from finch_rag.prompts.passages import Passage

from .small import chat_tokenizer, small_finch, small_model, texts

COUNT = 12


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data set of which each passage answers the question that names its number."""
    root = tmp_path / "data"
    root.mkdir()
    passages = [{"id": f"p{n}", "title": None, "text": f"{text} token{n}"} for n, text in enumerate(texts(COUNT))]
    questions = [
        {"id": f"q{n}", "question": f"token{n}?", "answers": [f"token{n}"], "gold_ids": [f"p{n}"]} for n in range(COUNT)
    ]
    for name, records in (("passages", passages), ("questions.dev", questions)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return root


@pytest.fixture
def data(folder: Path) -> DataSet:
    return DataSet.read(folder)


def cases(data: DataSet, **changes: Any) -> list[QualityCase]:
    return make_cases(data, **{"retriever": "bm25", "top_k": 6, **changes})


def test_bm25_ranks_the_passage_that_names_the_word_first(data: DataSet) -> None:
    for case in cases(data):
        assert case.passages[0].id in case.question.gold_ids
        assert case.ranks == list(range(6))
        assert case.has_gold


def test_a_draw_is_repeatable_and_another_seed_is_another_draw(data: DataSet) -> None:
    drawn = [[case.question.id for case in cases(data, limit=4, seed=seed)] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(drawn[0]) == 4


def test_a_random_order_keeps_the_ranks(data: DataSet) -> None:
    shuffled, ranked = cases(data, order="random"), cases(data)
    assert [case.passages for case in shuffled] != [case.passages for case in ranked]
    assert [case.ranked for case in shuffled] == [case.ranked for case in ranked]


@pytest.mark.parametrize("place", [0, 3, 5])
def test_gold_stands_where_it_is_put_among_the_best_others(data: DataSet, place: int) -> None:
    for case in cases(data, order=f"gold-at:{place}"):
        assert [passage.id in case.question.gold_ids for passage in case.passages] == [n == place for n in range(6)]


@pytest.mark.parametrize("order", ["gold-at:6", "gold-at:-1", "gold-at:x", "best"])
def test_an_unknown_order_is_refused(data: DataSet, order: str) -> None:
    with pytest.raises(InputError, match=r"gold-at:I with I from 0 to 5"):
        cases(data, order=order)


def test_cases_survive_storage(data: DataSet, tmp_path: Path) -> None:
    made = cases(data, order="random")
    write_cases(made, tmp_path / "cases.jsonl.gz")
    assert list(read_cases(tmp_path / "cases.jsonl.gz")) == made


def test_every_field_of_a_case_survives_storage(tmp_path: Path) -> None:
    question = Question("q", "Who?", (), ("a",), False, (("It is .", "so ."), ("It",)), True)
    case = QualityCase(question, [Passage("text", "a", "title")], [0], "Be brief.")
    write_cases([case], tmp_path / "cases.jsonl.gz")
    assert list(read_cases(tmp_path / "cases.jsonl.gz")) == [case]


@pytest.mark.parametrize("order", ["rank", "random"])
def test_a_question_is_asked_again_without_its_gold_passages(data: DataSet, order: str) -> None:
    both, alone = cases(data, order=order, unanswerable=True), cases(data, order=order)
    assert both[::2] == alone
    for with_gold, without in zip(both[::2], both[1::2], strict=True):
        question = with_gold.question
        assert without.question == replace(question, id=f"{question.id}/without-gold", answerable=False)
        assert with_gold.has_gold
        assert not without.has_gold
        assert len(without.passages) == 6
        assert without.ranked[:5] == with_gold.ranked[1:]  # the others keep their order, and one more comes behind
    assert any(case.ranks != sorted(case.ranks) for case in both[1::2]) is (order == "random")


def test_a_question_without_an_answer_is_asked_once_and_never_placed(data: DataSet) -> None:
    hopeless = replace(data.questions[0], answers=(), answerable=False)
    changed = replace(data, questions=[hopeless, *data.questions[1:]])
    assert sum(case.question.id.startswith("q0") for case in cases(changed, unanswerable=True)) == 1
    assert hopeless not in [case.question for case in cases(changed, order="gold-at:2")]
    with pytest.raises(InputError, match=r"order is gold-at:2, and without its gold passages .* use rank or random"):
        cases(data, order="gold-at:2", unanswerable=True)


def test_a_set_with_long_answers_is_asked_for_sentences(data: DataSet) -> None:
    long = replace(data, questions=[replace(q, answers=("word " * 30,)) for q in data.questions])
    assert {case.instructions for case in cases(data)} == {None}
    assert {case.instructions for case in cases(long)} == {LONG_INSTRUCTIONS}
    assert {case.instructions for case in cases(long, instructions="Sing.")} == {"Sing."}


def test_gold_that_is_not_in_the_corpus_is_refused(folder: Path) -> None:
    line = {"id": "q", "question": "Who?", "answers": ["x"], "gold_ids": ["nowhere"]}
    (folder / "questions.dev.jsonl").write_text(json.dumps(line))
    with pytest.raises(CorpusError, match="no gold passage of question q is among the 12"):
        DataSet.read(folder)


def test_every_method_answers_within_its_budget(data: DataSet, monkeypatch: pytest.MonkeyPatch) -> None:
    loop, alone = ((0, 1),), ((1, 2),)
    model = small_model(max_position_embeddings=2048)
    finch = Finch(model, chat_tokenizer(), heads=loop, alone_heads=alone, chunk_size=128)
    asked: list[CompressionReport] = []
    ask = finch.ask

    def listening(*args: Any, **options: Any) -> Answer:
        answer = ask(*args, **options)
        asked.append(answer.report)
        return answer

    monkeypatch.setattr(finch, "ask", listening)
    corpus = finch.open_store()
    corpus.add(data.passages)
    contestant = Contestant(finch, 64, 4, corpus)  # a budget in which every passage has room
    [case] = cases(data, limit=1, top_k=COUNT)
    outcomes, reports = {}, {}
    for method in METHODS:
        outcomes[method] = run(method, contestant, case)
        reports[method] = asked[-1]
    total = sum(contestant.lengths(case.passages))
    assert outcomes["full"].kv_tokens == outcomes["truncate"].kv_tokens == total
    whole = ("finch", "finch-loop", "finch-shortlist", "top-k")
    assert all(0 < outcomes[name].kv_tokens <= 64 for name in (*whole, "finch-scan", "finch-paper"))
    assert outcomes["finch-paper"].kv_tokens == 64
    by_store = ("finch-store", "finch-corpus", "finch-corpus-best", "finch-fused")
    assert all(0 < outcomes[name].kv_tokens <= 64 for name in by_store)
    # What ranks the passages, and the heads by which those in the cache were chosen.
    assert {name: (found.strategy, found.heads) for name, found in reports.items() if name.startswith("finch")} == {
        "finch": ("independent", alone),
        "finch-loop": ("loop", loop),
        "finch-shortlist": ("independent", loop),
        "finch-scan": ("loop", loop),
        "finch-paper": ("loop", ()),
        "finch-store": ("independent", alone),
        "finch-corpus": ("independent", loop),
        "finch-corpus-best": ("independent", alone),
        "finch-fused": ("loop", loop),
    }
    assert outcomes["finch-store"].kept_ids == outcomes["finch"].kept_ids
    assert reports["finch-store"].known_tokens + reports["finch-store"].stored_tokens == total
    best = corpus.search(case.question.question, 1)[0].passage_id
    assert outcomes["finch-corpus-best"].kept_ids[0] == best
    assert outcomes["gold"].kept_ids == list(case.question.gold_ids)
    packs = contestant.packs(case.passages, 64)
    assert [passage for pack in packs for passage in pack] == case.passages
    assert all(len(pack) == 1 or sum(contestant.lengths(pack)) <= 64 for pack in packs)
    assert outcomes["refine"].calls == len(packs) > 2
    assert outcomes["map-reduce"].calls > len(packs)


def test_full_is_the_plain_model(data: DataSet) -> None:
    finch = small_finch(budget=200)
    [case] = cases(data, limit=1, top_k=3)
    plain = finch.ask(case.question.question, case.passages, budget=200, max_new_tokens=6)
    assert run("full", Contestant(finch, 10, 6), case).prediction == plain.text


def test_what_does_not_fit_says_so(data: DataSet) -> None:
    [case] = cases(data, limit=1, top_k=COUNT)
    with pytest.raises(DoesNotFitError, match="tokens of passages, and the window has room for"):
        run("full", Contestant(small_finch(), 60, 4), case)


def test_a_bootstrap_interval_holds_the_mean_and_narrows_with_more_values() -> None:
    few, many = bootstrap([0.0, 1.0] * 10), bootstrap([0.0, 1.0] * 1000)
    assert few.mean == many.mean == 0.5
    assert few.low < many.low < 0.5 < many.high < few.high
    assert many.high - many.low == pytest.approx(2 * 1.96 * 0.5 / 2000**0.5, rel=0.1)


@pytest.fixture
def run_main(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    asked: list[str] = []
    engine = small_finch()
    ask = engine.ask

    def counted(question: str, passages: Any, **options: Any) -> Any:
        asked.append(question)
        return ask(question, passages, **options)

    monkeypatch.setattr(engine, "ask", counted)
    monkeypatch.setattr(Finch, "from_pretrained", lambda model, **settings: engine)

    def main(**changes: Any) -> tuple[dict[str, Any], int]:
        asked.clear()
        settings: dict[str, Any] = {"top_k": 3, "limit": 4, "budgets": (60,), "max_new_tokens": 4, **changes}
        return quality.main(folder, tmp_path / "out", **settings), len(asked)

    return main


def test_a_run_goes_on_where_it_stopped(run_main: Any, tmp_path: Path) -> None:
    first, calls = run_main()
    assert calls == 4 * 3
    file = tmp_path / "out" / "results-0.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:5]) + '{"id": "q1", "lab')
    again, calls = run_main()
    assert calls == 4 * 3 - 5
    for name, row in first["methods"].items():
        assert again["methods"][name]["f1"] == row["f1"]
    assert run_main()[1] == 0


def test_shards_share_the_work(run_main: Any) -> None:
    assert run_main(shard=(0, 2))[1] == 2 * 3
    summary, calls = run_main(shard=(1, 2))
    assert calls == 2 * 3
    assert {row["n"] for row in summary["methods"].values()} == {4}


def test_results_of_other_settings_are_not_mixed(run_main: Any) -> None:
    run_main()
    with pytest.raises(InputError, match=r"another top_k \(3 there\): choose another --out"):
        run_main(top_k=4)


def test_a_folder_of_an_older_version_goes_on(run_main: Any, tmp_path: Path) -> None:
    run_main()
    file = tmp_path / "out" / "settings.json"
    stored = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in stored.items() if k not in ("instructions", "unanswerable")}))
    assert run_main()[1] == 0
    with pytest.raises(InputError, match=r"another unanswerable \(False there\)"):
        run_main(unanswerable=True)


def test_questions_with_and_without_gold_are_asked_in_one_run(
    run_main: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    summary, calls = run_main(unanswerable=True, methods=("finch", "gold"))
    assert calls == 4 * 2 + 4  # the gold passages alone are asked only where they are
    assert (summary["cases"], summary["unanswerable"], summary["methods"]["finch@60"]["n"]) == (4, 4, 4)
    assert "4 questions, and 4 without an answer; any gold passage retrieved for 1.000" in capsys.readouterr().out


def test_the_table_shows_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    estimate = {"mean": 0.25, "low": 0.125, "high": 0.5}
    row = {"n": 2, "skipped": 0, "kv_tokens": 9.0, "accuracy": estimate, "f1": estimate, "rouge_l": estimate}
    row |= {"auroc_support": estimate, "citation_recall": estimate, "gold_any_kept": 0.75, "peak_mib": None}
    counts = {"cases": 2, "unanswerable": 1, "gold_retrieved": 1.0, "gold_all_retrieved": 0.5}
    settings = {"data": "set", "retriever": "bm25", "top_k": None, "order": "rank", "model": "m"}
    show_quality({"settings": settings, **counts, "methods": {"finch@9": row, "full": {"n": 0, "skipped": "long"}}})
    shown = " ".join(capsys.readouterr().out.split())
    assert "set, bm25 all passages, m" in shown
    assert "2 questions, and 1 without an answer; any gold passage retrieved for 1.000, all for 0.500" in shown
    assert "ROUGE-L any gold kept finch@9" in shown
    assert "method right cited AUROC of support finch@9 0.250" in shown
    assert "peak" not in shown
    assert shown.count("0.250 [0.125, 0.500]") == 5
    assert "full skipped: long" in shown


def test_long_answers_that_are_cut_short_are_noted(
    run_main: Any, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = folder / "questions.dev.jsonl"
    file.write_text(file.read_text().replace('["token', '["' + "word " * 30 + "token"))
    summary, _ = run_main()
    assert "max-new-tokens is 4, and the known answers are long" in capsys.readouterr().err
    assert {"accuracy", "f1", "rouge_l", "rouge_l_difference"} <= set(summary["methods"]["finch@60"])


def test_the_last_line_is_json_and_differences_are_paired(run_main: Any, capsys: pytest.CaptureFixture[str]) -> None:
    summary, _ = run_main(budgets=(30, 60))
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == json.loads(json.dumps(summary))
    assert set(summary["methods"]) == {"finch@30", "finch@60", "full", "top-k@30", "top-k@60"}
    assert "f1_difference" in summary["methods"]["finch@60"]
    assert "f1_difference" not in summary["methods"]["full"]


def test_differences_are_against_methods_with_the_same_budget(data: DataSet) -> None:
    made = cases(data, limit=4)
    figures = {"kv_tokens": 1, "prefill_seconds": 0.0, "decode_seconds": 0.0, "calls": 1}
    right = {"finch@10": 4, "finch@20": 2, "top-k@10": 1, "top-k@20": 2, "peer@10": 0, "full": 3, "finch@99": 4}
    records = [
        {"id": case.question.id, "label": name, "prediction": case.question.answers[0] if n < count else "", **figures}
        for name, count in right.items()
        for n, case in enumerate(made)
    ]
    records[0] = {"id": made[0].question.id, "label": "finch@10", "skipped": "too long"}  # so 3 pairs are left ...
    records.remove({"id": made[2].question.id, "label": "full", "prediction": made[2].question.answers[0], **figures})
    # ... and 2 with full, which was never asked the third
    rows = summarise(made, records)["methods"]
    means = {name: {k: v["mean"] for k, v in row.items() if "accuracy_" in k} for name, row in rows.items()}
    assert means["full"] == {}
    assert means["finch@10"] == {"accuracy_difference": 0.5, "accuracy_difference_top_k": 1.0}
    assert means["finch@20"] == {"accuracy_difference": 0.0, "accuracy_difference_top_k": 0.0}
    assert means["finch@99"] == {"accuracy_difference": pytest.approx(1 / 3)}
    assert means["top-k@10"]["accuracy_difference_finch"] == -1.0
    assert means["peer@10"]["accuracy_difference_top_k"] == -0.25
    assert means["peer@10"]["accuracy_difference_finch"] == -1.0


def test_grades_come_from_the_predictions(data: DataSet) -> None:
    made = cases(data, limit=2)
    figures = {"kv_tokens": 1, "prefill_seconds": 0.0, "decode_seconds": 0.0, "calls": 1}
    right = [
        {"id": case.question.id, "label": "finch@1", "prediction": case.question.answers[0], **figures} for case in made
    ]
    right[0]["kept_ids"] = list(made[0].question.gold_ids)
    wrong = [{**record, "label": "full", "prediction": "no idea", "kept_ids": []} for record in right]
    rows = summarise(made, [*right, *wrong])["methods"]
    assert rows["finch@1"]["accuracy"]["mean"] == rows["finch@1"]["accuracy_difference"]["mean"] == 1.0
    assert rows["full"]["f1"]["mean"] == 0.0
    assert rows["finch@1"]["gold_kept"] == 0.5


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"methods": ("guess", "full")}, "method guess is unknown: use finch"),
        ({"methods": ()}, "no method to run: use finch"),
        ({"budgets": (60, 0)}, "budget is 0"),
        ({"budgets": ()}, "no budget"),
        ({"top_k": 0}, "top-k is 0"),
        ({"limit": 0}, "limit is 0"),
        ({"max_new_tokens": 0}, "max-new-tokens is 0"),
        ({"shard": (2, 2)}, "shard 3 of 2 does not exist: use 1/2 to 2/2"),
        ({"plot": Path("figure.txt")}, "the plot figure.txt .* ends in .png"),
    ],
)
def test_arguments_that_cannot_work_are_refused(
    run_main: Any, tmp_path: Path, wrong: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        run_main(**wrong)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "content"), [("settings.json", b"{"), ("cases.jsonl.gz", b"no gzip")])
def test_a_broken_results_folder_is_named(run_main: Any, tmp_path: Path, name: str, content: bytes) -> None:
    run_main()
    (tmp_path / "out" / name).write_bytes(content)
    with pytest.raises(InputError, match=r"out is no results folder .* choose another --out"):
        run_main()


def test_a_budget_that_the_window_cannot_hold_is_skipped_not_fatal(
    run_main: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    summary, _ = run_main(budgets=(60, 5000), methods=("finch",))
    assert summary["methods"]["finch@60"]["n"] == 4
    assert "budget 5000 is too large" in summary["methods"]["finch@5000"]["skipped"]
    assert "finch@5000 skipped: budget 5000 is too large" in capsys.readouterr().out


def test_memory_is_measured_beyond_what_was_there_before() -> None:
    device = torch.device("cpu")
    before = in_use(device)
    with peak_memory(device, before) as peak:
        kept = torch.ones(64, 2**18)  # 64 MiB
        time.sleep(0.05)
        del kept
    assert 60 < peak[0] < 100
    with peak_memory(device, in_use(device)) as later:
        time.sleep(0.05)
    assert later[0] < 20


@pytest.mark.skipif(sys.platform != "linux", reason="asks the C library of Linux")
def test_the_allocator_gives_back_what_is_free_before_memory_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def resident() -> int:
        order.append("count")
        return 7

    library = SimpleNamespace(malloc_trim=lambda pad: order.append("trim"))
    monkeypatch.setattr("ctypes.CDLL", lambda name: library)
    monkeypatch.setattr(memory, "_resident", resident)
    assert in_use(torch.device("cpu")) == 7
    assert order == ["trim", "count"]
    del library.malloc_trim  # as in musl
    assert in_use(torch.device("cpu")) == 7


def test_each_answer_has_its_peak_of_memory(run_main: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def planted(device: torch.device, before: int) -> Iterator[list[float]]:
        yield [12.5]

    monkeypatch.setattr(quality, "peak_memory", planted)
    summary, _ = run_main()
    assert {row["peak_mib"] for row in summary["methods"].values()} == {12.5}


@pytest.mark.parametrize(("before", "after"), [(None, "cpu"), ("cuda", "cuda")])
def test_words_are_searched_off_the_accelerator(
    before: str | None, after: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if before is None:
        monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    else:
        monkeypatch.setenv("JAX_PLATFORMS", before)
    search = search_by("bm25", [Passage("a bridge"), Passage("the harbour"), Passage("a museum")])
    assert search("Who built the harbour?", 2)[0] == 1
    assert os.environ["JAX_PLATFORMS"] == after
