from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finch_rag.errors import DeviceMemoryError
from finch_rag.models.attention import use_finch_attention
from finch_rag.models.cache import CompressedCache, CompressedLayer
from finch_rag.models.forward import forward, memory_guard
from finch_rag.models.rope import KeyRotation
from finch_rag.prefill.loop import prefill
from finch_rag.prefill.planning import PrefillPlan
from finch_rag.prefill.selection import SELECTIONS, Selection
from finch_rag.prompts.builder import Prompt

from . import reference
from .small import ARCHITECTURES, small_model, small_prompt, texts

HEADS = {0: [1], 1: [0, 2]}


class Reader:
    """A small model with its rotation, ready for `prefill`."""

    def __init__(self, kind: str = "llama", **changes: Any) -> None:
        self.model = small_model(kind, **changes)
        self.window = self.model.config.max_position_embeddings
        self.rotation = KeyRotation.of(self.model, self.window)
        use_finch_attention(self.model)

    def read(
        self, prompt: Prompt, budget: int, chunk_size: int, selection: Selection, heads: Any = None, **rest: Any
    ) -> tuple[CompressedCache, torch.Tensor]:
        plan = PrefillPlan(budget, chunk_size, selection, heads)
        cache, attention, _ = prefill(self.model, prompt, plan, self.rotation, **rest)
        assert isinstance(cache, CompressedCache)
        return cache, attention


def in_use(cache: Any, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A layer's keys and values, each [kv_heads, tokens, head_dim]."""
    keys, values = cache.layers[layer].in_use()
    return keys[0], values[0]


def ends_of(prompt: Prompt) -> list[int]:
    return list(accumulate(map(len, prompt.passages)))


def document_of(prompt: Prompt) -> list[int]:
    return [token for passage in prompt.passages for token in passage]


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("chunk_size", [400, 64, 17])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_with_room_for_all_the_logits_are_those_of_one_plain_forward(
    kind: str, chunk_size: int, selection: Selection
) -> None:
    prompt = small_prompt(texts(8))
    document, ending = document_of(prompt), [*prompt.question, *prompt.tail]
    reader = Reader(kind)
    cache, _ = reader.read(prompt, len(document), chunk_size, selection)
    with torch.inference_mode():
        found = reader.model(torch.tensor([ending]), past_key_values=cache.fork(len(ending))).logits[0]
        everything = torch.tensor([[*prompt.prefix, *document, *ending]])
        for attention in ("eager", "sdpa"):
            expected = small_model(kind, attention)(everything).logits[0, -len(ending) :]
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("selection", "heads"), [("token", None), ("passage", None), ("passage", HEADS)])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_what_is_kept_is_what_a_plain_second_implementation_keeps(
    kind: str, selection: Selection, heads: dict[int, list[int]] | None
) -> None:
    prompt = small_prompt(texts(10))  # 338 tokens: at least 6 rounds
    expected, expected_attention = reference.read(small_model(kind, "eager"), prompt, 70, 64, selection, heads)
    cache, attention = Reader(kind).read(prompt, 70, 64, selection, heads)
    assert attention.tolist() == pytest.approx(expected_attention, rel=1e-3)
    kept = cache.kept.expand(len(expected), -1).tolist()
    for layer, states in enumerate(expected):
        assert kept[layer] == states.positions
        keys, values = in_use(cache, layer)
        torch.testing.assert_close(keys, states.keys, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(values, states.values, atol=1e-4, rtol=1e-4)


def test_the_layers_of_token_selection_choose_their_own() -> None:
    cache, _ = Reader().read(small_prompt(texts(10)), 70, 64, "token")
    assert cache.kept.shape == (2, 70)
    assert cache.kept[0].tolist() != cache.kept[1].tolist()


def test_kept_tokens_compete_again() -> None:
    prompt = small_prompt(texts(10))
    first, _ = Reader().read(prompt, 70, 90, "passage")
    begun, _ = Reader().read(Prompt(prompt.prefix, prompt.passages[:2], prompt.question, prompt.own_tokens, []), 70,
                             90, "passage")  # fmt: skip
    assert not set(begun.kept[0].tolist()) <= set(first.kept[0].tolist())


def spans_of(prompt: Prompt) -> list[range]:
    """Document positions of each passage."""
    return [range(end - len(p), end) for end, p in zip(ends_of(prompt), prompt.passages, strict=True)]


@pytest.mark.parametrize("chunk_size", [64, 100])
def test_reread_tokens_have_the_keys_and_values_of_a_text_without_the_evicted(chunk_size: int) -> None:
    prompt = small_prompt(texts(10))
    reader = Reader()
    scanned, scanned_attention = reader.read(prompt, 120, chunk_size, "passage", HEADS)
    plan = PrefillPlan(120, chunk_size, "passage", HEADS, reread=True, cutoff=0.0)
    reread, attention, *_ = prefill(reader.model, prompt, plan, reader.rotation)
    assert attention.tolist() == scanned_attention.tolist()
    spans = spans_of(prompt)
    whole = [n for n in range(10) if set(spans[n]) <= set(scanned.kept[0].tolist())]
    best = sorted(whole, key=lambda passage: -attention[passage])
    fit = [n for n in range(len(best) + 1) if sum(len(spans[passage]) for passage in best[:n]) <= 120][-1]
    assert fit > 1
    expected = [position for passage in reversed(best[:fit]) for position in spans[passage]]
    assert reread.kept.tolist() == [expected]
    document = document_of(prompt)
    alone = CompressedCache(2, len(prompt.prefix) + 120)
    forward(reader.model, torch.tensor([*prompt.prefix, *(document[n] for n in expected)]), alone)
    for layer in range(2):
        for found, plain in zip(in_use(reread, layer), in_use(alone, layer), strict=True):
            torch.testing.assert_close(found, plain, atol=1e-4, rtol=1e-4)


class LayerRuns:
    """Counts how often the layers' outputs are computed."""

    def __init__(self, model: Any) -> None:
        self.counts = [0] * len(model.model.layers)
        for number, layer in enumerate(model.model.layers):
            layer.mlp.register_forward_hook(lambda *_, number=number: self._note(number))

    def _note(self, number: int) -> None:
        self.counts[number] += 1


def test_a_first_reading_that_only_chooses_ends_at_the_last_head() -> None:
    prompt = small_prompt(texts(10))
    heads = {0: [1], 1: [0, 2]}
    reader = Reader(num_hidden_layers=4)
    _, expected = reader.read(prompt, 70, 64, "passage", heads)
    plan = PrefillPlan(70, 64, "passage", heads, reread=True, cutoff=0.0)
    runs = LayerRuns(reader.model)
    cache, attention, *_ = prefill(reader.model, prompt, plan, reader.rotation)
    torch.testing.assert_close(attention, expected)
    assert 0 < cache.kept_tokens <= 70
    assert cache.length == len(prompt.prefix) + cache.kept_tokens
    reread = -(-cache.length // 64)
    assert runs.counts[2:] == [reread] * 2
    assert runs.counts[1] == reread  # its queries and keys are enough
    assert runs.counts[0] > reread + 5


@pytest.mark.parametrize("change", [{"reread": False}, {"budget": 20}, {"budget": 1000}, {"heads": None}])
def test_otherwise_the_first_reading_runs_all_layers(change: dict[str, Any]) -> None:
    passages = [[5] * 30, [6] * 25, [7] * 28]
    settings: dict[str, Any] = {
        "budget": 60,
        "chunk_size": 64,
        "selection": "passage",
        "heads": {0: [1], 2: [3]},
        "reread": True,
    }
    lengths = [len(passage) for passage in passages]
    assert PrefillPlan(**settings).layers_to_scan(lengths, 9) == 3
    assert PrefillPlan(**{**settings, **change}).layers_to_scan(lengths, 9) == 9


def test_passages_far_below_the_best_are_left_out_of_the_second_reading() -> None:
    prompt = small_prompt(texts(10))
    reader = Reader()
    kept, attention, *_ = prefill(
        reader.model, prompt, PrefillPlan(200, 64, "passage", HEADS, reread=True, cutoff=0.0), reader.rotation
    )
    lengths = torch.tensor([len(passage) for passage in prompt.passages])
    passage_of = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    of_each = attention[passage_of[kept.kept[0]].unique_consecutive()]
    cutoff = float(of_each[1] / of_each[-1]) + 1e-6  # the two worst are below it, the last one is the best
    fewer, *_ = prefill(
        reader.model, prompt, PrefillPlan(200, 64, "passage", HEADS, reread=True, cutoff=cutoff), reader.rotation
    )
    assert (
        passage_of[fewer.kept[0]].unique_consecutive().tolist()
        == (passage_of[kept.kept[0]].unique_consecutive().tolist()[2:])
    )


def test_fragments_of_one_large_passage_are_not_read_again() -> None:
    prompt = small_prompt([" ".join(texts(10))])
    reader = Reader()
    scanned, _ = reader.read(prompt, 40, 64, "passage", HEADS)
    reread, *_ = prefill(reader.model, prompt, PrefillPlan(40, 64, "passage", HEADS, reread=True), reader.rotation)
    assert reread.kept.tolist() == scanned.kept.tolist()
    torch.testing.assert_close(in_use(reread, 1), in_use(scanned, 1))


@pytest.mark.parametrize("selection", SELECTIONS)
def test_the_prefix_is_untouched(selection: Selection) -> None:
    prompt = small_prompt(texts(10))
    reader = Reader()
    cache, _ = reader.read(prompt, 40, 32, selection)
    alone = CompressedCache(2, len(prompt.prefix))
    with torch.inference_mode():
        forward(reader.model, torch.tensor(prompt.prefix), alone)
    for layer in range(2):
        for found, expected in zip(in_use(cache, layer), in_use(alone, layer), strict=True):
            torch.testing.assert_close(found[:, : len(prompt.prefix)], expected)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_the_question_leaves_no_trace_in_the_length(selection: Selection) -> None:
    prompt = small_prompt(texts(10))
    cache, _ = Reader().read(prompt, 40, 32, selection)
    assert cache.prefix == len(prompt.prefix)
    assert cache.kept_tokens == 40
    assert [layer.length for layer in cache.layers] == [len(prompt.prefix) + 40] * 2


class Watcher:
    """Writes down every append to a cache and every position that the model is given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
        self.lengths: list[int] = []
        self.positions: list[list[int]] = []
        update = CompressedLayer.update

        def watched(layer: CompressedLayer, *args: Any, **kwargs: Any) -> Any:
            result = update(layer, *args, **kwargs)
            self.lengths.append(layer.length)
            return result

        monkeypatch.setattr(CompressedLayer, "update", watched)
        model.model.rotary_emb.register_forward_hook(self._note, with_kwargs=True)

    def _note(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        positions = kwargs["position_ids"] if "position_ids" in kwargs else args[1]
        self.positions.append(positions[0].tolist())


@pytest.mark.parametrize("selection", SELECTIONS)
def test_lengths_and_positions_stay_within_bounds_far_beyond_the_window(
    monkeypatch: pytest.MonkeyPatch, selection: Selection
) -> None:
    reader = Reader(max_position_embeddings=128)
    watcher = Watcher(monkeypatch, reader.model)
    prompt = small_prompt(texts(30))
    assert len(document_of(prompt)) > 5 * reader.window
    reader.read(prompt, 50, 40, selection)
    bound = len(prompt.prefix) + 50 + 40 + len(prompt.question)
    assert max(watcher.lengths) == bound <= reader.window
    for positions in watcher.positions:
        assert positions == list(range(positions[0], positions[0] + len(positions)))
        assert positions[-1] < reader.window
    assert watcher.positions[0][0] == 0
    assert watcher.positions[-1][0] == len(prompt.prefix) + 50  # right behind what is kept


def test_no_passages_leave_only_the_prefix() -> None:
    prompt = small_prompt([])
    cache, attention = Reader().read(prompt, 40, 32, "passage")
    assert (cache.length, cache.kept_tokens, len(attention)) == (len(prompt.prefix), 0, 0)


def test_an_empty_prefix_is_no_obstacle() -> None:
    full = small_prompt(texts(10))
    cache, _ = Reader().read(Prompt([], full.passages, full.question, full.own_tokens, []), 40, 32, "passage")
    assert (cache.prefix, cache.length) == (0, 40)


def test_progress_counts_document_tokens() -> None:
    prompt = small_prompt(texts(10))
    seen: list[tuple[int, int]] = []
    Reader().read(prompt, 40, 64, "passage", on_progress=lambda done, total: seen.append((done, total)))
    total = len(document_of(prompt))
    assert seen[-1] == (total, total)
    assert {whole for _, whole in seen} == {total}
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_attention_by_passage_is_what_each_got_when_it_last_competed() -> None:
    prompt = small_prompt(texts(6))
    document = document_of(prompt)
    _, attention = Reader().read(prompt, len(document), len(document), "passage")
    with torch.inference_mode():
        tokens = torch.tensor([[*prompt.prefix, *document, *prompt.question]])
        weights = torch.stack(small_model("llama", "eager")(tokens, output_attentions=True).attentions)[:, 0]
    rows = weights[:, :, -len(prompt.question) :][:, :, prompt.own_tokens].sum(dim=(0, 1, 2))
    start = len(prompt.prefix)
    for passage, share in zip(prompt.passages, attention.tolist(), strict=True):
        assert share == pytest.approx(float(rows[start : start + len(passage)].sum()), rel=1e-4)
        start += len(passage)


def test_every_passage_gets_some_attention_also_those_evicted() -> None:
    _, attention = Reader().read(small_prompt(texts(10)), 40, 32, "passage")
    assert bool((attention > 0).all())


@lru_cache  # hypothesis runs many examples
def tiny_reader() -> Reader:
    return Reader(num_hidden_layers=1)


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[int], int, int, Selection]:
    """Passage lengths from one token to three chunks, chunk size, budget, selection."""
    size = draw(st.integers(1, 30))
    lengths: Sequence[int] = draw(st.lists(st.integers(1, 3 * size), min_size=1, max_size=6))
    return list(lengths), size, draw(st.integers(1, 60)), draw(st.sampled_from(SELECTIONS))


@given(cases())
@settings(deadline=None, max_examples=40)
def test_any_lengths_chunk_size_and_budget_keep_what_they_should(case: tuple[list[int], int, int, Selection]) -> None:
    lengths, size, budget, selection = case
    passages = [[5 + (7 * n + i) % 300 for i in range(length)] for n, length in enumerate(lengths)]
    prompt = Prompt([3, 4, 5], passages, [50, 51, 52, 53], slice(1, 4), [])
    cache, attention = tiny_reader().read(prompt, budget, size, selection)
    kept = cache.kept[0].tolist()
    assert len(kept) == min(budget, sum(lengths))
    assert kept == sorted(set(kept))
    assert set(kept) <= set(range(sum(lengths)))
    assert cache.length == 3 + len(kept)
    assert attention.shape == (len(lengths),)
    if budget >= sum(lengths):
        assert kept == list(range(sum(lengths)))


def starve(reader: Reader, most: int) -> list[int]:
    """Lets a model run out of memory above so many tokens, in its second layer; lists what it was given."""
    given: list[int] = []

    def check(layer: Any, args: tuple[torch.Tensor, ...]) -> None:
        given.append(args[0].shape[1])
        if args[0].shape[1] > most:
            raise torch.OutOfMemoryError("out of memory")

    reader.model.base_model.layers[1].register_forward_pre_hook(check)
    return given


@pytest.mark.parametrize("selection", SELECTIONS)
def test_where_memory_runs_out_the_reading_goes_on_with_half_the_chunk(
    selection: Selection, caplog: pytest.LogCaptureFixture
) -> None:
    prompt = small_prompt(texts(60))
    plan = PrefillPlan(200, 400, selection, HEADS if selection == "passage" else None)
    starved = Reader(max_position_embeddings=4096)
    around = len(prompt.prefix) + len(prompt.question)  # of the first chunk
    given = starve(starved, 150 + around)
    with caplog.at_level("WARNING"):
        found = prefill(starved.model, prompt, plan, starved.rotation)
    tried = next(tokens for tokens in given if tokens > 200) - around  # whole passages, so not quite 400
    assert found.steps.chunk_size == 100  # 400, 200, 100
    assert f"no memory for chunks of {tried} tokens: going on with chunks of 200" in caplog.messages[0]
    roomy = Reader(max_position_embeddings=4096)
    smaller = PrefillPlan(200, found.steps.chunk_size, selection, plan.heads)
    expected = prefill(roomy.model, prompt, smaller, roomy.rotation)
    assert found.steps == expected.steps
    assert torch.equal(found.cache.kept, expected.cache.kept)
    torch.testing.assert_close(found.attention, expected.attention)
    for layer in range(2):
        for mine, theirs in zip(in_use(found.cache, layer), in_use(expected.cache, layer), strict=True):
            torch.testing.assert_close(mine, theirs)


def test_memory_that_runs_out_on_the_way_leaves_what_was_read() -> None:
    prompt = small_prompt(texts(60))
    reader = Reader(max_position_embeddings=4096)
    plan = PrefillPlan(200, 300, "passage", HEADS)
    calls = 0

    def check(layer: Any, args: tuple[torch.Tensor, ...]) -> None:
        nonlocal calls
        calls += args[0].shape[1] > 100
        if calls == 3:  # once, in the third chunk
            raise torch.OutOfMemoryError("out of memory")

    reader.model.base_model.layers[1].register_forward_pre_hook(check)
    seen: list[int] = []
    found = prefill(reader.model, prompt, plan, reader.rotation, lambda done, total: seen.append(done))
    assert seen == sorted(set(seen))
    assert seen[-1] == len(document_of(prompt))
    assert all(later - earlier <= 150 for earlier, later in pairwise(seen[1:]))
    assert found.steps.chunk_size <= 150
    assert found.cache.kept_tokens == 200


def test_a_device_without_memory_for_the_smallest_chunk_is_an_error() -> None:
    reader = Reader(max_position_embeddings=4096)
    starve(reader, 20)
    with pytest.raises(DeviceMemoryError, match="smaller chunk_size"):
        reader.read(small_prompt(texts(60)), 200, 300, "passage", HEADS)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_on_a_gpu_no_step_waits_for_the_host_and_the_same_is_kept() -> None:
    prompt = small_prompt(texts(60))
    expected, _ = Reader(max_position_embeddings=4096).read(prompt, 200, 300, "passage", HEADS)
    reader = Reader(max_position_embeddings=4096)
    reader.model.to("cuda")
    steps: list[int] = []

    def from_the_second_on(done: int, total: int) -> None:
        steps.append(done)
        torch.cuda.set_sync_debug_mode("default" if done == total else "error")

    try:
        found, _ = reader.read(prompt, 200, 300, "passage", HEADS, on_progress=from_the_second_on)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(steps) > 3
    assert torch.equal(found.kept, expected.kept)


def test_a_device_without_memory_says_what_to_do() -> None:
    model = small_model()
    with (
        pytest.raises(DeviceMemoryError, match=r"cpu .*77 tokens.*smaller chunk_size"),
        memory_guard(model, "77 tokens"),
    ):
        raise torch.OutOfMemoryError("out of memory")
    with pytest.raises(DeviceMemoryError), memory_guard(model, "too much"):
        torch.empty(2**58, dtype=torch.uint8)


def test_other_errors_pass_the_memory_guard() -> None:
    with pytest.raises(KeyError), memory_guard(small_model(), "77 tokens"):
        raise KeyError("x")
