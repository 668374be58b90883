"""How well the passages support an answer."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from finch_rag import DeviceMemoryError, Finch, ModelError, Passage
from finch_rag.models.attention import use_finch_attention
from finch_rag.models.cache import CompressedCache
from finch_rag.paths import cache_folder
from finch_rag.quotes import support
from finch_rag.quotes.choosing import sharpness
from finch_rag.quotes.support import JUDGEMENT, Signs, fitted

from .small import small_finch, small_model
from .test_own_models import new_finch

QUESTION = "When was the lighthouse built?"
PASSAGES = [
    Passage("The harbour was built in 1874. It closed in the winter.", id="a", title="The harbour"),
    Passage("The museum opened in 1931! Its director is Hugo Kessler.", id="b"),
    Passage("The lighthouse was lit in 1902. Who drew it?", id="c", title="Light"),
]
ANSWERED = [Signs(2.0 + n % 3, 0.5 + 0.01 * n) for n in range(12)]
UNANSWERED = [Signs(-1.0 + n % 4, 0.05 + 0.01 * n) for n in range(12)]


@pytest.fixture
def finch(monkeypatch: pytest.MonkeyPatch) -> Finch:
    monkeypatch.setattr(support, "signs_of_examples", lambda runtime, told: (ANSWERED, UNANSWERED))
    return small_finch(reread=True, budget=100)


def chance(weights: tuple[float, ...], signs: Signs) -> float:
    return 1 / (1 + math.exp(-sum(w * x for w, x in zip(weights, signs.row(), strict=True))))


def test_the_regression_is_at_its_best() -> None:
    weights = torch.tensor(fitted(ANSWERED, UNANSWERED), dtype=torch.double, requires_grad=True)
    rows = torch.tensor([signs.row() for signs in (*ANSWERED, *UNANSWERED)], dtype=torch.double)
    right = torch.tensor([1.0] * 12 + [0.0] * 12, dtype=torch.double)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(rows @ weights, right)
    (loss + 0.025 * ((weights[1:] * rows[:, 1:].std(0)) ** 2).sum()).backward()
    assert weights.grad is not None
    assert weights.grad.abs().max() < 1e-6
    found = tuple(weights.tolist())
    assert min(chance(found, signs) for signs in ANSWERED) > max(chance(found, signs) for signs in UNANSWERED)


def test_too_few_examples_say_nothing() -> None:
    with pytest.raises(ModelError, match=r"only 7 and 12 of 24 examples could be judged, and support needs 8 of each"):
        fitted(ANSWERED[:7], UNANSWERED)
    with pytest.raises(ModelError, match="judgement is not finite"):
        fitted([*ANSWERED, Signs(math.nan, 0.1)], UNANSWERED)


def test_support_is_what_the_regression_says(finch: Finch, monkeypatch: pytest.MonkeyPatch) -> None:
    judged: list[float] = []
    judgement: Any = support._judgement

    def recorded(*args: Any) -> float:
        judged.append(judgement(*args))
        return judged[-1]

    monkeypatch.setattr(support, "_judgement", recorded)
    plain = finch.ask(QUESTION, PASSAGES)
    answer = finch.ask(QUESTION, PASSAGES, support=True)
    assert plain.support is None
    assert (answer.text, answer.statements, answer.citations) == (plain.text, plain.statements, plain.citations)
    assert answer.support is not None
    weights = fitted(ANSWERED, UNANSWERED)
    sharp = (math.log(answer.support / (1 - answer.support)) - weights[0] - weights[1] * judged[0]) / weights[2]
    assert 0 < math.exp(sharp) - 1e-3 < 1
    assert answer.report.quote_seconds > plain.report.quote_seconds * 0.1
    for other in (
        *finch.ask_many([QUESTION, "Who drew it?"], PASSAGES, support=True)[:1],
        finch.stream(QUESTION, PASSAGES, support=True).read(),
        finch.ask(QUESTION, PASSAGES, support=True, quotes=False),
    ):
        assert other.support == pytest.approx(answer.support, abs=1e-4)
    assert finch.ask(QUESTION, PASSAGES, support=True, quotes=False).statements == ()


def test_the_judgement_is_read_behind_the_passages(finch: Finch, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    judgement: Any = support._judgement

    def recorded(runtime: Any, written: Any) -> float:
        seen.append((written, judgement(runtime, written)))
        return float(seen[-1][1])

    monkeypatch.setattr(support, "_judgement", recorded)
    finch.ask(QUESTION, PASSAGES, support=True)
    [(written, found)] = seen
    prompt, encode = written.request.prompt, finch.prompts.encode
    document = [token for passage in prompt.passages for token in passage]
    kept = [document[place] for place in written.cache.kept[0].tolist()]
    tokens = [*prompt.prefix, *kept, *encode([f"Question: {QUESTION}\n{JUDGEMENT}"])[0], *prompt.tail]
    with torch.no_grad():
        logits = small_model()(input_ids=torch.tensor([tokens])).logits[0, -1]
    yes = sorted({encode([word])[0][0] for word in ("yes", "Yes", " yes", " Yes")})
    no = sorted({encode([word])[0][0] for word in ("no", "No", " no", " No")})
    assert found == pytest.approx(float(logits[yes].logsumexp(0) - logits[no].logsumexp(0)), abs=1e-4)


def test_an_answer_with_less_support_is_withheld(finch: Finch) -> None:
    answer = finch.ask(QUESTION, PASSAGES, support=True)
    assert answer.support is not None
    given = finch.ask(QUESTION, PASSAGES, min_support=answer.support * 0.99)
    assert (given.text, given.support) == (answer.text, answer.support)
    withheld = finch.ask(QUESTION, PASSAGES, min_support=min(1.0, answer.support * 1.01))
    assert (withheld.text, withheld.statements, withheld.report.stop_reason) == ("", (), "unsupported")
    assert withheld.support == answer.support
    assert [c.index for c in withheld.citations] == [c.index for c in answer.citations]
    assert not any(citation.quotes for citation in withheld.citations)
    stream = finch.stream(QUESTION, PASSAGES, min_support=1)
    assert list(stream) == []
    assert stream.answer.text == ""
    assert list(finch.stream(QUESTION, PASSAGES, min_support=0)) == [answer.text]
    assert finch.ask_many([QUESTION], PASSAGES, min_support=1)[0].text == ""


@pytest.mark.parametrize("options", [{"selection": "token", "budget": 20}, {"reread": True}])
def test_where_nothing_can_be_looked_at_there_is_none(finch: Finch, options: dict[str, Any]) -> None:
    passages = PASSAGES if "selection" in options else []
    answer = finch.ask(QUESTION, passages, min_support=1, **options)
    assert answer.text
    assert answer.support is None


def test_a_cache_is_judged_too(finch: Finch, tmp_path: Path) -> None:
    cache = finch.compress(QUESTION, PASSAGES)
    cache.save(tmp_path / "cache")
    answer = finch.ask_cached(CompressedCache.load(tmp_path / "cache"), support=True)
    direct = finch.ask(QUESTION, PASSAGES, support=True)
    assert answer.support == pytest.approx(direct.support, abs=1e-4)


def test_a_cancellation_while_it_is_calibrated_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def signs(runtime: Any, told: Any) -> Any:
        stream.cancel()
        told(1, 24)
        return ANSWERED, UNANSWERED

    monkeypatch.setattr(support, "signs_of_examples", signs)
    stream = small_finch(reread=True, budget=100, seed=9).stream(QUESTION, PASSAGES, support=True)
    assert stream.read().support is not None


def test_a_model_that_cannot_be_calibrated_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    def signs(runtime: Any, told: Any) -> Any:
        tried.append(1)
        return ANSWERED[:3], UNANSWERED[:4]

    monkeypatch.setattr(support, "signs_of_examples", signs)
    finch = small_finch(reread=True, budget=100, seed=7)
    answer = finch.ask(QUESTION, PASSAGES, support=True)
    assert answer.support is None
    assert any("only 3 and 4 of 24 examples" in note for note in answer.report.notes)
    with pytest.raises(ModelError, match="only 3 and 4 of 24 examples"):
        finch.ask(QUESTION, PASSAGES, min_support=0.5)
    assert len(tried) == 1


@pytest.mark.parametrize("kind", ["gemma2", "qwen3_next"])
def test_models_with_attention_of_their_own_are_judged(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "signs_of_examples", lambda runtime, told: (ANSWERED, UNANSWERED))
    answer = new_finch(kind, max_new_tokens=6).ask(QUESTION, PASSAGES, support=True)
    assert answer.support is not None
    assert 0 <= answer.support <= 1


def test_a_calibration_is_made_once_and_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made: list[int] = []

    def signs(runtime: Any, told: Any) -> Any:
        made.append(1)
        told(1, 24)
        return ANSWERED, UNANSWERED

    monkeypatch.setattr(support, "signs_of_examples", signs)
    stages: list[str] = []
    options: dict[str, Any] = {"support": True, "on_progress": lambda stage, done, total: stages.append(stage)}
    first = small_finch(reread=True, seed=5).ask(QUESTION, PASSAGES, **options)
    assert "support" in stages
    [file] = (cache_folder("support")).glob("*.json")
    assert json.loads(file.read_text())["weights"] == pytest.approx(fitted(ANSWERED, UNANSWERED), abs=1e-4)
    again = small_finch(reread=True, seed=5).ask(QUESTION, PASSAGES, support=True)
    assert again.support == pytest.approx(first.support, abs=1e-4)
    assert len(made) == 1
    file.write_text('{"format": 1, "weights": [1, 2]}')
    small_finch(reread=True, seed=5).ask(QUESTION, PASSAGES, support=True)
    assert len(made) == 2


def test_examples_are_answered_with_and_without_the_right_passage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "EXAMPLES", 2)
    model = small_model(max_position_embeddings=4096)
    use_finch_attention(model)
    finch = Finch(model, small_finch().tokenizer, heads=[(0, 1)], alone_heads=[(0, 1)])
    done: list[int] = []
    answered, unanswered = support.signs_of_examples(finch.runtime, lambda number, total: done.append(number))
    assert (len(answered), len(unanswered), done) == (2, 2, [1, 2])
    assert answered != unanswered
    assert all(0 <= signs.sharpness <= 1 for signs in (*answered, *unanswered))


def test_an_answer_outlives_memory_that_runs_out(finch: Finch, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> float:
        raise DeviceMemoryError("no memory")

    monkeypatch.setattr(support, "_judgement", fails)
    answer = finch.ask(QUESTION, PASSAGES, support=True)
    assert answer.text
    assert answer.support is None
    assert "no support: no memory" in answer.report.notes


def test_sharpness_is_that_of_the_whole_answer() -> None:
    attention = torch.tensor([[[0.9, 0.0], [0.0, 0.3]]])
    assert sharpness(attention, torch.tensor([1, 2])) == pytest.approx(0.3)
    assert sharpness(attention, torch.tensor([3, 1])) == pytest.approx(0.675)


@pytest.mark.embedded
def test_a_model_that_cannot_judge_says_that_it_does_not_know(embedded: Finch) -> None:
    facts = [f"The {name} was built in {1800 + 7 * n}." for n, name in enumerate(("mill", "pier", "bridge", "tower"))]
    answer = embedded.ask("When was the bridge built?", facts, support=True)  # its calibration is shipped
    assert answer.support is not None
    assert 0.3 < answer.support < 0.7
