"""``finch-rag bench ruler``: questions over made text."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from finch_rag.bench import ruler
from finch_rag.bench.cases import QualityCase, read_cases, search_by
from finch_rag.bench.methods import Contestant, run
from finch_rag.bench.quality import RunSettings
from finch_rag.bench.ruler_tasks import HAYSTACKS, INSTRUCTIONS, TASKS, make_case
from finch_rag.cli.ruler import bench_ruler
from finch_rag.engine import Finch
from finch_rag.errors import InputError
from finch_rag.prompts.passages import Passage

from .command_line import one_error
from .command_line import run as command
from .small import chat_tokenizer, small_model

VALUES = {"multi-key": 1, "multi-value-4": 4, "multi-value-8": 8, "multi-value-16": 16, "multi-query": 4}


def words_and_marks(passages: Sequence[Passage]) -> list[int]:
    """Tokens of a made tokenizer: one a word or mark, and one behind each passage."""
    return [len(re.findall(r"\w+|[^\w\s]", passage.text)) + 1 for passage in passages]


def made(task: str, tokens: int = 4000, number: int = 0, seed: int = 0) -> QualityCase:
    return make_case(task, number, lambda question: tokens - len(question.split()), words_and_marks, seed)


def gold_texts(case: QualityCase) -> list[str]:
    return [passage.text for passage in case.passages if passage.id in case.question.gold_ids]


@pytest.mark.parametrize("tokens", [3000, 20_000])
@pytest.mark.parametrize("task", TASKS)
def test_text_fills_the_room_and_is_in_passages(task: str, tokens: int) -> None:
    case = made(task, tokens)
    lengths = words_and_marks(case.passages)
    room = tokens - len(case.question.question.split())
    assert room - 2 * 120 < sum(lengths) <= room
    assert all(90 < length < 160 for length in lengths[:-1])
    assert len({passage.id for passage in case.passages}) == len(case.passages)
    assert case.instructions == INSTRUCTIONS
    assert case.question.needs_all


@pytest.mark.parametrize("task", TASKS)
def test_ranks_are_bm25s_and_the_order_is_the_texts(task: str) -> None:
    case = made(task)
    assert [passage.id for passage in case.passages] == [f"p{n:05}" for n in range(len(case.passages))]
    best = search_by("bm25", case.passages)(case.question.question, len(case.passages))
    assert case.ranked == [case.passages[place] for place in best]


@pytest.mark.parametrize("task", TASKS)
def test_draws_are_repeatable_and_questions_differ(task: str) -> None:
    assert made(task) == made(task)
    others = [made(task), made(task, number=1), made(task, seed=1)]
    assert len({case.question.answers for case in others}) == len({case.passages[0].text for case in others}) == 3
    assert len({case.question.id for case in others}) == 2


@pytest.mark.parametrize(("task", "count"), VALUES.items())
def test_each_needle_is_in_a_gold_passage_of_its_own(task: str, count: int) -> None:
    case = made(task)
    codes = case.question.answers
    assert len(set(codes)) == count
    golds = gold_texts(case)
    assert len(golds) == count
    assert sorted(code for text in golds for code in re.findall(r"\d{7}", text)) == sorted(codes)
    assert all(len(re.findall(r"\d{7}", passage.text)) <= 1 for passage in case.passages)
    asked = set(re.findall(r"the (\w+ \w+)(?:[,?]| and)", case.question.question))
    assert {re.findall(r"code of the (\w+ \w+) is \d{7}\.", text)[0] for text in golds} == asked
    others = [passage.text for passage in case.passages if passage.id not in case.question.gold_ids]
    assert not any(thing in text for thing in asked for text in others)


def test_a_key_is_one_of_many() -> None:
    case = made("multi-key", 20_000)
    told = re.findall(r"The code of the (\w+ \w+) is (\d{7})\.", " ".join(passage.text for passage in case.passages))
    assert len(told) == len(set(told)) == len({code for _, code in told})
    assert len(told) == pytest.approx(len(case.passages) / 4, abs=3)


def test_variables_have_their_value_by_a_chain_that_the_text_follows() -> None:
    case = made("variables")
    value = re.findall(r"\d{5}", case.question.question)[0]
    assignments = re.findall(r"([A-Z]{5}) = (\w+)\.", " ".join(passage.text for passage in case.passages))
    known: dict[str, str] = {}
    for name, source in assignments:
        known[name] = known.get(source, source)
    assert len(known) == 10
    assert tuple(name for name, found in known.items() if found == value) == case.question.answers
    assert len(set(known.values())) == 2
    golds = gold_texts(case)
    assert len(golds) == 5
    assert [re.findall(r"([A-Z]{5}) =", text) for text in golds] == [[name] for name in case.question.answers]


def test_common_words_are_ten_times_as_frequent() -> None:
    case = made("common-words", 3000)
    counts = Counter(word for passage in case.passages for word in passage.text.split())
    common = [word for word, _ in counts.most_common(10)]
    assert set(common) == set(case.question.answers)
    assert {counts[word] for word in common} == {30}
    assert set(counts.values()) == {30, 3}
    for passage in case.passages:
        assert (passage.id in case.question.gold_ids) is not set(common).isdisjoint(passage.text.split())


@pytest.mark.parametrize(("task", "tokens"), [("multi-value-16", 1500), ("common-words", 300), ("variables", 100)])
def test_a_task_that_does_not_fit_says_how_many_tokens_it_needs(task: str, tokens: int) -> None:
    with pytest.raises(InputError, match=rf"{task} needs some [\d,]+ tokens .* raise --tokens by [\d,]+") as error:
        made(task, tokens)
    more = int(str(error.value).rpartition(" ")[2].replace(",", ""))
    assert 0 < more < 3000
    assert made(task, tokens + more)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Finch:
    monkeypatch.chdir(tmp_path)
    model = small_model(max_position_embeddings=4096)
    finch = Finch(model, chat_tokenizer(), heads=[(0, 1)], alone_heads=[(1, 2)])
    monkeypatch.setattr(Finch, "from_pretrained", lambda model, **settings: finch)
    return finch


@pytest.mark.usefixtures("engine")
def test_every_task_is_answered_and_a_run_goes_on() -> None:
    args: tuple[Any, ...] = (
        "bench",
        "ruler",
        "o",
        "--tokens",
        "2048,2560",
        "--tasks",
        "multi-query,variables",
        "--limit",
        2,
    )
    args += ("--budget", 512, "--max-new-tokens", 4, "--methods", "finch,top-k")
    result = command(*args)
    assert result.exit_code == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    assert list(found["tokens"]) == ["2048", "2560"]
    for length, by_task in found["tokens"].items():
        assert list(by_task) == ["multi-query", "variables"]
        for task, summary in by_task.items():
            assert set(summary["methods"]) == {"finch@512", "top-k@512"}
            assert all(row["n"] == 2 and "match" in row for row in summary["methods"].values())
            folder = Path("o") / f"{length}-tokens" / task
            assert len(list(read_cases(folder / "cases.jsonl.gz"))) == 2
            assert len((folder / "results-0.jsonl").read_text().splitlines()) == 4
    assert "2,048 tokens, 4 made questions, embedded; share of the answers found" in result.stdout
    assert json.loads(command(*args).stdout.splitlines()[-1]) == found


@pytest.mark.parametrize("task", sorted(HAYSTACKS))
def test_the_plain_model_reads_text_as_long_as_its_window(engine: Finch, task: str) -> None:
    settings = RunSettings(
        model="m",
        data=f"ruler/{task}/{engine.window}",
        retriever="bm25",
        top_k=None,
        order="document",
        limit=1,
        seed=0,
        max_new_tokens=40,
    )
    [case] = ruler.made_cases(lambda: engine, settings)
    contestant = Contestant(engine, 64, 40)
    used = sum(contestant.lengths(case.passages))
    assert contestant.room(case) - 2 * 120 < used <= contestant.room(case)
    assert run("full", Contestant(engine, 64, 40), case).kv_tokens == used


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--tasks", "needle"), "task needle is unknown: use multi-key,"),
        (("--tasks", ","), "there is no task: use multi-key,"),
        (("--methods", "finch-corpus"), "method finch-corpus is unknown: use finch,"),
        (("--tokens", "many"), "--tokens is 'many'"),
        (("--limit", 0), "--limit is 0"),
        (("--tokens", "2048,200", "--tasks", "multi-key,variables"), "multi-key needs some"),
    ],
)
@pytest.mark.usefixtures("engine")
def test_what_cannot_be_run_is_said_in_one_line(args: tuple[Any, ...], message: str) -> None:
    assert message in one_error(command("bench", "ruler", "o", *args))
    assert not Path("o").exists()


def test_options_are_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(ruler, "main", lambda out, **options: seen.append((out, options)))
    command("bench", "ruler", "o")
    args = ("--tokens", "9,8", "--tasks", "variables", "--model", "m", "--limit", 3, "--seed", 4, "--budget", "5,6")
    command("bench", "ruler", "o", *args, "--methods", "gold", "--max-new-tokens", 7, "--shard", "2/3")
    default = {"tokens": [8192], "tasks": list(TASKS), "model": "embedded", "limit": 20, "seed": 0, "budgets": [512]}
    rest = {"methods": ["finch", "full", "top-k"], "max_new_tokens": 160, "shard": (0, 1)}
    assert seen[0] == (Path("o"), {**default, **rest})
    given = {"tokens": [9, 8], "tasks": ["variables"], "model": "m", "limit": 3, "seed": 4, "budgets": [5, 6]}
    assert seen[1][1] == {**given, "methods": ["gold"], "max_new_tokens": 7, "shard": (1, 3)}


def test_help_names_every_task(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    shown = command("bench", "ruler", "--help").stdout
    assert set(TASKS) <= set(re.findall(r"[\w-]+", shown.partition("--tasks")[2].partition("--model")[0]))
    assert bench_ruler.__defaults__ is not None
    assert ",".join(TASKS) in bench_ruler.__defaults__
