"""``finch-rag bench kept``: which passages a rule would answer from."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from finch_rag.bench import kept
from finch_rag.bench.cases import QualityCase
from finch_rag.bench.kept import Attended, kept_by, read_attended, retrieved, write_attended
from finch_rag.corpus.reading import Question
from finch_rag.engine import Finch
from finch_rag.errors import InputError
from finch_rag.prompts.passages import Passage

from .command_line import one_error, run
from .small import chat_tokenizer, small_finch, small_model, texts

# The second of two needed passages gets a fifth of the best one's attention; of the other question's, one was found.
TWO = Attended("a", 2, [False, True, False, True], [0, 1, 2, 3], [100, 100, 100, 100], [0.1, 0.5, 0.3, 0.1])
LOST = Attended("b", 2, [True, False], [1, 0], [300, 50], [0.9, 0.1])


def rule(attended: list[Attended], cutoff: float, prior: float | None, budget: int) -> tuple[float, ...]:
    found = kept_by(attended, cutoff, prior, budget)
    return found["any"], found["all"], found["passages"], found["tokens"]


def test_a_cutoff_leaves_out_what_is_far_below_the_best() -> None:
    assert rule([TWO], 0, None, 1000) == (1, 1, 4, 400)
    assert rule([TWO], 0.25, None, 1000) == (1, 0, 2, 200)
    assert rule([TWO], 0.2, None, 1000) == (1, 1, 4, 400)


def test_the_budget_takes_the_best_that_fit() -> None:
    assert rule([TWO], 0, None, 199) == (1, 0, 1, 100)
    assert rule([LOST], 0, None, 299) == (0, 0, 0, 0)  # no worse passage takes the place of the best
    assert rule([LOST], 0, None, 350) == (1, 0, 2, 350)
    assert rule([TWO, LOST], 0, None, 1000) == (1, 0.5, 3, 375)


def test_a_prior_orders_by_rank_where_attention_is_alike() -> None:
    even = Attended("c", 1, [False, True], [1, 0], [10, 10], [0.52, 0.48])
    assert rule([even], 0, None, 10)[1] == 0
    assert rule([even], 0, 1.0, 10)[1] == 1
    assert rule([even], 0, 1e6, 10)[1] == 0  # ranks count for next to nothing


def test_what_was_not_retrieved_is_not_kept() -> None:
    assert retrieved([TWO, LOST]) == 0.5


def test_what_was_measured_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "attention.jsonl.gz"
    write_attended([TWO, LOST], file)
    assert read_attended(file) == [TWO, LOST]


OTHER = {
    "empty": b"",
    "plain": b"not gzip",
    "other names": gzip.compress(b'{"a": 1}\n'),
    "no text": gzip.compress(b"\xff"),
    "nothing": gzip.compress(b""),
}


@pytest.mark.parametrize("content", OTHER.values(), ids=OTHER)
def test_another_file_is_one_line(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "attention.jsonl.gz"
    file.write_bytes(content)
    assert "attention.jsonl.gz" in one_error(run("bench", "kept", tmp_path, "--attention", file))


@pytest.mark.usefixtures("hashed")
@pytest.mark.parametrize("strategy", ["independent", "loop"])
def test_attention_is_measured_once(strategy: str, numbered: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finch = Finch(
        small_model(max_position_embeddings=4096),
        chat_tokenizer(),
        heads=[(0, 1)],
        alone_heads=[(0, 1)],
        chunk_size=256,
    )
    monkeypatch.setattr(Finch, "from_pretrained", lambda model, **settings: finch)
    file = numbered / "attention.jsonl.gz"
    common = ("bench", "kept", numbered, "--attention", file, "--strategy", strategy, "--budget", "60,600")
    first = run(*common, "--order", "random")
    assert first.exit_code == 0, first.output
    found: dict[str, Any] = json.loads(first.stdout.splitlines()[-1])
    assert (found["questions"], found["retrieved"]) == (12, 1.0)
    assert len(found["rules"]) == len(kept.CUTOFFS) * len(kept.PRIORS) * 2
    attended = read_attended(file)
    assert all(sum(question.attention) == pytest.approx(1, abs=1e-3) for question in attended)
    assert any(list(question.ranks) != sorted(question.ranks) for question in attended)
    monkeypatch.setattr(Finch, "from_pretrained", lambda *args, **settings: pytest.fail("a model was loaded"))
    assert run(*common).stdout == first.stdout


@pytest.mark.parametrize("command", [("kept", "--attention", "a.jsonl.gz"), ("recall", "--rankers", "bm25")])
def test_a_set_without_answers_is_one_line(command: tuple[str, ...], numbered: Path) -> None:
    file = next(numbered.glob("questions*"))
    file.write_text(file.read_text().replace('"answers"', '"answerable": false, "answers"'))
    name, *options = command
    assert "none of the 12 questions of" in one_error(run("bench", name, numbered, *options))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"budgets": []}, "nothing to measure"),
        ({"budgets": [0]}, "nothing to measure"),
        ({"cutoffs": [1.5]}, "1.5 is no rule"),
        ({"priors": [0.0]}, "0.0 is no rule"),
    ],
)
def test_rules_that_cannot_be_are_refused(options: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=reason):
        kept.main(tmp_path, file=tmp_path / "x.jsonl.gz", **options)


def test_measured_attention_is_without_the_retrievers_order() -> None:
    finch = small_finch(reread=True, alone_heads=[(0, 1)])
    passages = [Passage(text, id=str(n)) for n, text in enumerate(texts(30))]

    def shares(given: list[Passage], prior: Any) -> list[float]:
        found = finch.rank("who built it?", given, strategy="independent", prior=prior)
        return [each.share for each in sorted(found, key=lambda each: each.index)]

    plain = shares(passages, "none")
    best_first = [passages[place] for place in sorted(range(30), key=lambda place: -plain[place])]
    case = QualityCase(Question("q", "who built it?", ("x",), ("3",)), best_first, list(range(30)))
    attended = kept.attend(finch, case, "independent")
    assert attended.attention == pytest.approx(shares(best_first, "none"), abs=1e-6)
    assert attended.attention != pytest.approx(shares(best_first, "auto"), abs=1e-3)
