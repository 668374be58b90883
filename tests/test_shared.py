from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from finch_rag.models.attention import use_finch_attention
from finch_rag.models.cache import CompressedLayer
from finch_rag.models.rope import KeyRotation
from finch_rag.prefill.batched import prefill_batched
from finch_rag.prefill.chunking import plan_chunks
from finch_rag.prefill.loop import prefill
from finch_rag.prefill.planning import PrefillPlan
from finch_rag.prefill.scan import Prefilled
from finch_rag.prefill.selection import SELECTIONS, Selection
from finch_rag.prefill.shared import scan_shared, shares_scan
from finch_rag.prefill.shortlists import prefill_shortlists
from finch_rag.prompts.builder import Prompt

from .small import ARCHITECTURES, small_model, small_prompt, texts

HEADS = {0: [1], 1: [0, 2]}
QUESTIONS = ("When was the lighthouse built?", "Who?", "Where did the ferry go?")


class Setup:
    """A small model that counts its passes."""

    def __init__(self, kind: str = "llama", **changes: Any) -> None:
        self.model = small_model(kind, **{"max_position_embeddings": 4096, **changes})
        self.rotation = KeyRotation.of(self.model, 4096)
        use_finch_attention(self.model)
        self.passes: list[int] = []  # tokens of each
        self.model.base_model.layers[0].register_forward_pre_hook(
            lambda layer, args: self.passes.append(args[0].shape[1])
        )

    def alone(self, prompts: Sequence[Prompt], plans: Sequence[PrefillPlan]) -> list[Prefilled]:
        return [prefill(self.model, prompt, plan, self.rotation) for prompt, plan in zip(prompts, plans, strict=True)]

    def together(self, prompts: Sequence[Prompt], plans: Sequence[PrefillPlan]) -> list[Prefilled]:
        self.passes.clear()
        return prefill_batched(self.model, prompts, plans, self.rotation)


def prefill_shared(setup: Setup, prompts: Sequence[Prompt], plan: PrefillPlan, *progress: Any) -> list[Prefilled]:
    scan = scan_shared(setup.model, prompts, plan, *progress)
    plans = [replace(plan, chunk_size=scan.steps.chunk_size)] * len(prompts)
    read = prefill_shortlists(setup.model, prompts, list(scan.attention), plans, setup.rotation)
    return [found._replace(steps=scan.steps) for found in read]


def same(found: Sequence[Prefilled], expected: Sequence[Prefilled]) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine.cache.kept, theirs.cache.kept)
        torch.testing.assert_close(mine.attention, theirs.attention, atol=1e-4, rtol=1e-4)
        assert (mine.cache.prefix, mine.cache.length) == (theirs.cache.prefix, theirs.cache.length)
        for layer, other in zip(mine.cache.layers, theirs.cache.layers, strict=True):
            assert isinstance(layer, CompressedLayer)
            assert isinstance(other, CompressedLayer)
            torch.testing.assert_close(layer.in_use(), other.in_use(), atol=1e-4, rtol=1e-4)


def prompts_of(counts: Sequence[int]) -> list[Prompt]:
    return [small_prompt(texts(n, seed=n), QUESTIONS[i % 3]) for i, n in enumerate(counts)]


@pytest.mark.parametrize("reread", [False, True])
@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_side_by_side_the_same_is_kept_as_alone(kind: str, selection: Selection, reread: bool) -> None:
    setup = Setup(kind)
    prompts = prompts_of([5, 9, 3])  # of which the last is not even as long as the budget
    plans = [PrefillPlan(60, 2000, selection, HEADS, reread and selection == "passage")] * 3
    expected = setup.alone(prompts, plans)
    same(setup.together(prompts, plans), expected)


def test_a_step_holds_as_many_questions_as_fit() -> None:
    setup = Setup()
    prompts = prompts_of([5, 6, 7])
    tokens = [len(p.prefix) + sum(map(len, p.passages)) + len(p.question) for p in prompts]
    plans = [PrefillPlan(1000, sum(tokens), "passage", HEADS)] * 3
    setup.together(prompts, plans)
    assert setup.passes == [sum(tokens)]
    plans = [PrefillPlan(1000, sum(tokens) - 1, "passage", HEADS)] * 3
    setup.together(prompts, plans)
    assert setup.passes == [tokens[0] + tokens[1], tokens[2]]


def test_a_question_of_several_steps_and_one_without_passages_are_read_alone() -> None:
    setup = Setup()
    prompts = prompts_of([4, 5, 30, 0, 4, 6])
    plans = [PrefillPlan(60, 200, "passage", HEADS, True)] * 6
    assert len(plan_chunks([len(p) for p in prompts[2].passages], 200)) > 1
    same(setup.together(prompts, plans), setup.alone(prompts, plans))


def test_a_reading_that_ends_at_the_last_head_is_not_mixed_with_one_that_runs_all_layers() -> None:
    setup = Setup()
    prompts = prompts_of([9, 2, 8, 7])  # the second evicts nothing, so it is answered from its scan
    plans = [PrefillPlan(60, 2000, "passage", {0: [1, 2]}, True)] * 4
    expected = setup.alone(prompts, plans)
    assert [len(found.cache.layers) for found in expected] == [2] * 4
    same(setup.together(prompts, plans), expected)
    assert len(setup.passes) == 5  # scans and re-prefills of the first, of the last two, and the second's scan


def test_where_two_have_no_memory_each_is_read_alone() -> None:
    setup = Setup()
    prompts = prompts_of([6, 7])
    plans = [PrefillPlan(60, 1000, "passage", HEADS, True)] * 2
    expected = setup.alone(prompts, plans)
    most = max(setup.passes)

    def check(layer: Any, args: tuple[torch.Tensor, ...]) -> None:
        if args[0].shape[1] > most:
            raise torch.OutOfMemoryError("out of memory")

    setup.model.base_model.layers[1].register_forward_pre_hook(check)
    same(setup.together(prompts, plans), expected)
    assert setup.passes[0] > most


@torch.inference_mode()
def plain_attention(setup: Setup, prompt: Prompt, chunk_size: int, heads: dict[int, list[int]]) -> list[float]:
    """What a question pays to each passage behind prefix and chunk, by eager attention and loops."""
    model = small_model(attention="eager", max_position_embeddings=4096)
    document = [token for passage in prompt.passages for token in passage]
    passage_of = [number for number, passage in enumerate(prompt.passages) for _ in passage]
    paid = [0.0] * len(prompt.passages)
    for chunk in plan_chunks([len(passage) for passage in prompt.passages], chunk_size):
        tokens = [*prompt.prefix, *document[chunk.start : chunk.stop], *prompt.question]
        weights = model(torch.tensor([tokens]), output_attentions=True).attentions
        own = range(len(tokens) - len(prompt.question), len(tokens))[prompt.own_tokens]
        for layer, chosen in heads.items():
            for head in chosen:
                for token in own:
                    for n, place in enumerate(chunk):
                        paid[passage_of[place]] += float(weights[layer][0, head, token, len(prompt.prefix) + n])
    return paid


def test_a_shared_list_is_read_once_and_each_question_reads_its_shortlist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finch_rag.prefill.shortlists._SHORTLIST_TOKENS", 150)
    setup = Setup()
    prompts = [small_prompt(texts(40), question) for question in QUESTIONS]
    plan = PrefillPlan(60, 120, "passage", HEADS, True)
    passages = prompts[0].passages
    seen: list[tuple[int, int]] = []
    read = prefill_shared(setup, prompts, plan, lambda done, total: seen.append((done, total)))

    document, chunks = sum(map(len, passages)), plan_chunks([len(p) for p in passages], 120)
    assert seen == [(chunk.stop, document) for chunk in chunks]
    questions = sum(len(prompt.question) for prompt in prompts)
    first = len(prompts[0].prefix) + len(chunks[0]) + questions
    assert setup.passes[: len(chunks)] == [first, *(len(chunk) + questions for chunk in chunks[1:])]

    starts = [sum(map(len, passages[:n])) for n in range(len(passages))]
    lists = []
    for prompt, found in zip(prompts, read, strict=True):
        paid = plain_attention(setup, prompt, 120, HEADS)
        chosen, tokens = [], 0
        for number in sorted(range(len(passages)), key=lambda n: -paid[n]):
            tokens += len(passages[number])
            if tokens > 150:
                break
            chosen.append(number)
        chosen.sort()
        lists.append(chosen)
        short = Prompt(prompt.prefix, [passages[n] for n in chosen], *(prompt.question, prompt.own_tokens, prompt.tail))
        expected = prefill(setup.model, short, plan, setup.rotation)
        places = [starts[n] + i for n in chosen for i in range(len(passages[n]))]
        assert found.cache.kept.tolist() == [[places[i] for i in expected.cache.kept[0].tolist()]]
        for layer, other in zip(found.cache.layers, expected.cache.layers, strict=True):
            assert isinstance(layer, CompressedLayer)
            assert isinstance(other, CompressedLayer)
            torch.testing.assert_close(layer.in_use(), other.in_use(), atol=1e-4, rtol=1e-4)
        for number, share in enumerate(found.attention.tolist()):
            later = dict(zip(chosen, expected.attention.tolist(), strict=True))
            assert share == pytest.approx(later.get(number, paid[number]), rel=1e-3, abs=1e-5)
        assert found.steps.chunks == len(chunks)
    assert len({tuple(chosen) for chosen in lists}) == 3  # or nothing is shown


def test_a_passage_larger_than_a_shortlist_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finch_rag.prefill.shortlists._SHORTLIST_TOKENS", 10)
    setup = Setup()
    prompts = [small_prompt([" ".join(texts(6, seed=n)) for n in range(8)], question) for question in QUESTIONS]
    read = prefill_shared(setup, prompts, PrefillPlan(5, 100, "passage", HEADS, True))
    assert all(found.cache.kept_tokens == 5 for found in read)


def test_a_shared_reading_goes_on_in_halves_where_memory_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finch_rag.prefill.shortlists._SHORTLIST_TOKENS", 150)
    prompts = [small_prompt(texts(60), question) for question in QUESTIONS]
    starved, roomy = Setup(), Setup()
    most = 120 + sum(len(p.question) for p in prompts) + len(prompts[0].prefix)

    def check(layer: Any, args: tuple[torch.Tensor, ...]) -> None:
        if args[0].shape[1] > most:
            raise torch.OutOfMemoryError("out of memory")

    starved.model.base_model.layers[1].register_forward_pre_hook(check)
    found = prefill_shared(starved, prompts, PrefillPlan(60, 400, "passage", HEADS, True))
    expected = prefill_shared(roomy, prompts, PrefillPlan(60, 100, "passage", HEADS, True))
    assert found[0].steps.chunk_size == 100
    same(found, expected)


@pytest.mark.parametrize(
    ("selection", "document", "questions", "shared"),
    [
        ("passage", 32_768, 8, True),
        ("passage", 32_768, 1, False),
        ("passage", 8_192, 2, False),  # 8,192 and two shortlists of 4,096 are no less than twice 8,192
        ("passage", 8_193, 2, True),
        ("passage", 4_096, 8, False),
        ("token", 32_768, 8, False),
    ],
)
def test_a_reading_is_shared_where_that_is_fewer_tokens(
    selection: Selection, document: int, questions: int, shared: bool
) -> None:
    plan = PrefillPlan(512, 1024, selection, HEADS, True)
    assert shares_scan(plan, [1] * document, questions) is shared


def test_a_shortlist_has_twice_the_budget() -> None:
    plan = PrefillPlan(4000, 1024, "passage", HEADS, True)
    assert not shares_scan(plan, [16_000], 2)
    assert shares_scan(plan, [16_001], 2)


def test_any_number_of_questions_reads_a_shared_list_once(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = Setup()
    prompts = [small_prompt(texts(40), f"{question} {n}?") for n in range(7) for question in QUESTIONS]
    plan = PrefillPlan(60, 120, "passage", HEADS, True)
    chunks = plan_chunks([len(passage) for passage in prompts[0].passages], 120)
    questions = sum(len(prompt.question) for prompt in prompts)
    assert questions > 2 * 120  # so that the questions of a chunk take several passes
    found = scan_shared(setup.model, prompts, plan)
    assert sum(setup.passes) == len(prompts[0].prefix) + sum(map(len, chunks)) + len(chunks) * questions
    assert max(setup.passes) <= len(prompts[0].prefix) + 2 * 120
    for number in (0, 11, 20):
        alone = scan_shared(setup.model, [prompts[number]], plan)
        torch.testing.assert_close(found.attention[number], alone.attention[0], atol=1e-4, rtol=1e-4)
