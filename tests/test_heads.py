from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from finch_rag.engine import Finch
from finch_rag.errors import InputError, ModelError, SettingsError, WindowError
from finch_rag.heads import search as module
from finch_rag.heads import stored
from finch_rag.heads.examples import HeadExample, make_examples
from finch_rag.heads.pairs import check_heads, heads_by_layer
from finch_rag.heads.search import HeadScore, find_heads
from finch_rag.heads.stored import load_heads, resolve_heads, save_heads
from finch_rag.models.attention import use_finch_attention
from finch_rag.models.fingerprint import fingerprint
from finch_rag.prompts.builder import PromptBuilder

from .small import chat_tokenizer, small_config, small_model, texts

FOUND = [HeadScore(1, 2, 0.5), HeadScore(0, 3, 0.25)]


def roomy_model(**changes: Any) -> Any:
    """A small model whose window holds an example."""
    return small_model(max_position_embeddings=4096, **changes)


@pytest.fixture
def finds(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stands in for the search; one entry a search."""
    calls: list[str] = []

    def fake(*args: Any, **kwargs: Any) -> list[HeadScore]:
        calls.append("found")
        return FOUND

    monkeypatch.setattr(stored, "find_heads", fake)
    return calls


def stored_file(cache: Path, model: Any) -> Path:
    return cache / "heads" / f"{fingerprint(model)}.json"


def test_distinct_heads_of_the_model_are_found_by_falling_score() -> None:
    found = find_heads(roomy_model(), chat_tokenizer(), n=5, examples=3)
    assert len({(head.layer, head.head) for head in found}) == 5
    assert all(0 <= head.layer < 2 and 0 <= head.head < 4 for head in found)
    assert [head.score for head in found] == sorted((head.score for head in found), reverse=True)
    assert all(-1 <= head.score <= 1 for head in found)


def test_finding_heads_is_repeatable_and_reports_progress() -> None:
    seen: list[tuple[int, int]] = []
    model = roomy_model()
    first = find_heads(model, chat_tokenizer(), 3, 3, lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert find_heads(model, chat_tokenizer(), 3, 3) == first


def test_a_head_that_looks_at_the_right_passage_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    def planted(model: Any, builder: Any, example: HeadExample) -> torch.Tensor:
        attention = torch.full((2, 4, len(example.passages)), 0.01)
        attention[0, 0] = 0.09  # much attention, but alike on all
        attention[0, 1, 0] = 0.9  # the first passage, whatever is asked
        attention[1, 2, example.gold] = 0.5
        attention[1, 3, example.gold] = 0.2
        return attention

    monkeypatch.setattr(module, "attention_by_passage", planted)
    found = find_heads(roomy_model(), chat_tokenizer(), n=2, examples=24)
    assert [(head.layer, head.head) for head in found] == [(1, 2), (1, 3)]
    passages = 10
    assert found[0].score == pytest.approx(0.5 - (0.5 + 0.01 * (passages - 1)) / passages, abs=1e-5)


def test_attention_by_passage_is_eager_attention_of_the_questions_rows() -> None:
    model, example = roomy_model(), make_examples(1, 3)[0]
    use_finch_attention(model)
    builder = PromptBuilder(chat_tokenizer())
    found = module.attention_by_passage(model, builder, example)
    prompt = builder.build(example.question, module_passages(example))
    tokens = [*prompt.prefix, *(t for passage in prompt.passages for t in passage), *prompt.question]
    with torch.inference_mode():
        eager = small_model("llama", "eager", max_position_embeddings=4096)
        weights = torch.stack(eager(torch.tensor([tokens]), output_attentions=True).attentions)[:, 0]
    rows = weights[:, :, -len(prompt.question) :][:, :, prompt.own_tokens].mean(dim=2)
    start = len(prompt.prefix)
    for number, passage in enumerate(prompt.passages):
        expected = rows[..., start : start + len(passage)].sum(-1)
        torch.testing.assert_close(found[..., number], expected, atol=1e-5, rtol=1e-4)
        start += len(passage)


def module_passages(example: HeadExample) -> Any:
    from finch_rag.prompts.passages import as_passages

    return as_passages(example.passages)


def test_heads_are_looked_for_in_the_lower_two_thirds_of_the_layers_only() -> None:
    deep = small_model(max_position_embeddings=4096, num_hidden_layers=6)
    reached: set[tuple[int, int]] = set()
    for number, layer in enumerate(deep.base_model.layers):
        layer.register_forward_pre_hook(lambda _, args, number=number: reached.add((number, args[0].shape[1])))
    found = find_heads(deep, chat_tokenizer(), n=16, examples=2)
    assert {head.layer for head in found} == {0, 1, 2, 3}
    assert {number for number, tokens in reached if tokens > 1} == {0, 1, 2, 3}  # one token: the check of the model
    with pytest.raises(InputError, match=r"n is 17.*16 heads in the lower two thirds"):
        find_heads(deep, chat_tokenizer(), n=17)


@pytest.mark.parametrize("n", [0, -1, 9])
def test_more_heads_than_there_are_cannot_be_found(n: int) -> None:
    with pytest.raises(InputError, match=rf"n is {n}.*8 heads"):
        find_heads(roomy_model(), chat_tokenizer(), n=n)


def test_a_window_too_small_for_an_example_is_a_model_error() -> None:
    with pytest.raises(ModelError, match=r"window of 128.*heads=\"all\""):
        find_heads(small_model(max_position_embeddings=128), chat_tokenizer())


def test_ones_own_examples_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    own = [HeadExample("Who?", ("a", "b", "c"), 2), HeadExample("When?", ("d", "e"), 0)]
    read: list[HeadExample] = []
    seen: list[tuple[int, int]] = []

    def planted(model: Any, builder: Any, example: HeadExample) -> torch.Tensor:
        read.append(example)
        attention = torch.zeros(2, 4, len(example.passages))
        attention[1, 2, example.gold] = 0.6
        return attention

    monkeypatch.setattr(module, "attention_by_passage", planted)
    found = find_heads(small_model(), chat_tokenizer(), 1, own, lambda done, total: seen.append((done, total)))
    assert read == own
    assert seen == [(1, 2), (2, 2)]
    expected = (0.6 - 0.6 / 3 + 0.6 - 0.6 / 2) / 2
    assert [(head.layer, head.head) for head in found] == [(1, 2)]
    assert found[0].score == pytest.approx(expected)


def test_an_own_example_that_does_not_fit_the_window_is_named() -> None:
    own = [HeadExample("Who?", ("a", "b"), 0), HeadExample("When was it?", ("word " * 600, "b"), 0)]
    with pytest.raises(
        WindowError, match=r"example 2 \('When was it\?'\) has \d{4} tokens.*window is 512: give it fewer"
    ):
        find_heads(small_model(), chat_tokenizer(), 1, own)


def test_no_examples_find_no_heads() -> None:
    with pytest.raises(InputError, match="there are no examples"):
        find_heads(small_model(), chat_tokenizer(), 1, [])


def searched(monkeypatch: pytest.MonkeyPatch, model: Any) -> list[HeadExample]:
    """The examples that a search reads."""
    seen: list[HeadExample] = []

    def watch(model: Any, builder: Any, example: HeadExample) -> torch.Tensor:
        seen.append(example)
        return torch.zeros(2, 4, len(example.passages))

    monkeypatch.setattr(module, "attention_by_passage", watch)
    find_heads(model, chat_tokenizer(), n=1, examples=2)
    return seen


def test_a_small_window_is_searched_with_fewer_passages(monkeypatch: pytest.MonkeyPatch) -> None:
    examples = searched(monkeypatch, small_model(max_position_embeddings=1500))
    assert 2 <= len(examples[0].passages) < 10


def test_a_sliding_window_bounds_the_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    examples = searched(monkeypatch, small_model("mistral", max_position_embeddings=4096, sliding_window=1500))
    builder = PromptBuilder(chat_tokenizer())
    lengths = [module.prompt_tokens(builder, example) for example in examples]
    assert max(lengths) <= 1500


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_a_fingerprint_is_the_same_in_every_dtype(kind: str) -> None:
    whole = fingerprint(small_model(kind))
    assert fingerprint(small_model(kind).to(torch.bfloat16)) == whole
    assert fingerprint(small_model(kind)) == whole
    assert len(whole) == 16


def test_a_fingerprint_differs_with_other_weights_and_sizes() -> None:
    models = [small_model(), small_model(seed=1), small_model("qwen2"), small_model(num_hidden_layers=3)]
    assert len({fingerprint(model) for model in models}) == 4


@pytest.mark.parametrize("part", ["model.norm", "model.layers.1.input_layernorm", "model.embed_tokens"])
def test_a_fingerprint_differs_when_one_weight_does(part: str) -> None:
    model = small_model()
    before = fingerprint(model)
    with torch.no_grad():
        model.get_parameter(f"{part}.weight").view(-1)[3] += 1.0
    assert fingerprint(model) != before


def test_a_fingerprint_differs_when_only_projections_were_tuned() -> None:  # as merging a LoRA adapter does
    model = small_model()
    before = fingerprint(model)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight += 0.1 * torch.randn(32, 2) @ torch.randn(2, 64)
    assert fingerprint(model) != before


def test_saved_heads_load(private_cache: Path) -> None:
    model = small_model()
    assert load_heads(model) is None
    file = save_heads(model, "small", FOUND)
    assert file == stored_file(private_cache, model)
    assert load_heads(model) == [(1, 2), (0, 3)]
    assert load_heads(small_model(seed=1)) is None
    assert json.loads(file.read_text())["model"] == "small"


def test_heads_are_found_once_and_then_loaded(finds: list[str]) -> None:
    expected = {0: [3], 1: [2]}
    for _ in range(2):
        finch = Finch(small_model(), chat_tokenizer())
        assert finch.retrieval_heads() == expected
        assert finch.retrieval_heads() == expected
    assert finds == ["found"]
    assert Finch(small_model(seed=1), chat_tokenizer()).retrieval_heads() == expected
    assert finds == ["found", "found"]


def test_heads_are_not_looked_for_before_they_are_needed(finds: list[str]) -> None:
    finch = Finch(small_model(), chat_tokenizer(), budget=40, chunk_size=64, max_new_tokens=2)
    finch.ask("When?")
    finch.ask("When?", texts(3), selection="token")
    assert finds == []
    answer = finch.ask("When?", texts(3), strategy="loop")
    assert finds == ["found"]
    assert answer.report.heads == ((0, 3), (1, 2))


def test_progress_of_the_search_reaches_the_engine() -> None:
    seen: list[tuple[str, int, int]] = []

    def on_progress(stage: str, done: int, total: int) -> None:
        seen.append((stage, done, total))

    finch = Finch(small_model(max_position_embeddings=1024), chat_tokenizer(),
                  on_progress=on_progress)  # fmt: skip
    heads = finch.retrieval_heads()
    assert heads is not None
    assert sum(map(len, heads.values())) == 8
    assert seen == [("heads", done, module.EXAMPLES) for done in range(1, module.EXAMPLES + 1)]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"format": 1}',
        '{"format": 1, "heads": 5}',
        '{"format": 1, "heads": [[1]]}',
        '{"format": 1, "heads": []}',
        '{"format": 1, "heads": [[99, 0, 0.5]]}',
        "\0\0\0",
    ],
)
def test_a_damaged_file_is_found_again_with_a_warning(
    private_cache: Path, finds: list[str], caplog: pytest.LogCaptureFixture, content: str
) -> None:
    model = small_model()
    file = stored_file(private_cache, model)
    file.parent.mkdir(parents=True)
    file.write_text(content)
    with caplog.at_level(logging.WARNING, "finch_rag"):
        assert resolve_heads("auto", model, chat_tokenizer(), "small") == {0: [3], 1: [2]}
    assert finds == ["found"]
    assert str(file) in caplog.text
    assert load_heads(model) == [(1, 2), (0, 3)]


def test_a_search_is_announced_with_the_models_name(finds: list[str], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "finch_rag"):
        resolve_heads("auto", small_model(), chat_tokenizer(), "my model")
    assert "my model" in caplog.text


def test_all_heads_and_given_heads_are_taken_as_they_are(finds: list[str]) -> None:
    model: Any = small_model()
    assert resolve_heads("all", model, chat_tokenizer(), "small") is None
    assert resolve_heads([(1, 3), (0, 2), (1, 0), (1, 3)], model, chat_tokenizer(), "small") == {0: [2], 1: [0, 3]}
    assert finds == []


def test_heads_by_layer_sorts_and_takes_each_once() -> None:
    assert heads_by_layer([(3, 1), (0, 2), (3, 0), (3, 1)]) == {0: [2], 3: [0, 1]}


@pytest.mark.parametrize(
    ("heads", "reason"),
    [
        ("some", "'some'"),
        (7, "7"),
        (None, "None"),
        ([], "empty"),
        ([(2, 0)], r"\(2, 0\).*layers 0 to 1 of 4 heads"),
        ([(0, 4)], r"\(0, 4\)"),
        ([(-1, 0)], r"\(-1, 0\)"),
        ([(0, 1, 2)], r"\(0, 1, 2\)"),
        ([3], "3"),
        ([("a", 1)], "a"),
        ([(0.5, 1)], "0.5"),
    ],
)
def test_heads_that_do_not_exist_are_refused(heads: Any, reason: str) -> None:
    with pytest.raises(InputError, match=reason) as caught:
        check_heads(heads, small_config())
    assert "\n" not in str(caught.value)
    with pytest.raises(SettingsError, match=reason):
        Finch(small_model(), chat_tokenizer(), heads=heads)


@pytest.mark.parametrize("heads", ["auto", "all", [(0, 0)], ((1, 3), (0, 2)), [[1, 3]]])
def test_heads_that_exist_are_fine(heads: Any) -> None:
    check_heads(heads, small_config())


def test_heads_from_an_iterator_are_used() -> None:
    def pairs() -> Iterator[tuple[int, int]]:
        yield from ((0, 1), (1, 2))

    finch = Finch(small_model(), chat_tokenizer(), heads=pairs(), budget=40)  # type: ignore[arg-type]
    assert finch.retrieval_heads() == {0: [1], 1: [2]}


@pytest.mark.embedded
def test_the_embedded_models_heads_are_shipped(
    embedded: Finch, finds: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    pairs = load_heads(embedded.model)
    assert pairs is not None
    assert len(set(pairs)) == 8
    check_heads(pairs, embedded.model.config)
    assert resolve_heads("auto", embedded.model, embedded.tokenizer, "embedded") == heads_by_layer(pairs)
    assert finds == []


@pytest.mark.embedded
def test_the_shipped_heads_are_those_that_the_search_finds(embedded: Finch) -> None:
    shipped = set(load_heads(embedded.model) or ())
    found = {(head.layer, head.head) for head in find_heads(embedded.model, embedded.tokenizer, 8, examples=3)}
    assert len(shipped & found) >= 3  # of 270 heads, on an eighth of the examples


def test_heads_that_cannot_be_stored_are_used_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = tmp_path / "cache"
    blocked.write_text("a file where a folder is needed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    found = resolve_heads("auto", small_model(max_position_embeddings=4096), chat_tokenizer(), "small")
    assert found
    assert "cannot be stored" in caplog.text


def test_a_call_hears_of_the_search_that_it_waits_for() -> None:
    finch = Finch(small_model(max_position_embeddings=1024), chat_tokenizer(), max_new_tokens=2)
    seen: list[str] = []
    finch.ask("When?", texts(3), on_progress=lambda stage, done, total: seen.append(stage))
    assert seen.count("heads") == module.EXAMPLES
    assert "prefill" in seen


def test_a_cancelled_call_ends_the_search() -> None:
    finch = Finch(small_model(max_position_embeddings=1024), chat_tokenizer(), max_new_tokens=2)
    seen: list[str] = []

    def on_progress(stage: str, done: int, total: int) -> None:
        seen.append(stage)
        stream.cancel()

    stream = finch.stream("When?", texts(3), on_progress=on_progress)
    assert list(stream) == []
    assert seen == ["heads"]
    assert finch.ask("When?", texts(3)).report.heads  # found by the next call


def test_a_call_that_waits_for_anothers_search_can_be_cancelled() -> None:
    finch = Finch(small_model(max_position_embeddings=1024), chat_tokenizer(), max_new_tokens=2)
    begun, go_on = threading.Event(), threading.Event()

    def on_progress(stage: str, done: int, total: int) -> None:
        begun.set()
        go_on.wait(10)

    waiting = finch.stream("When?", texts(3))
    with ThreadPoolExecutor(2) as pool:
        searching = pool.submit(finch.ask, "When?", texts(3), on_progress=on_progress)
        begun.wait(10)
        given_up = pool.submit(list, waiting)
        waiting.cancel()
        assert given_up.result(5) == []
        assert not searching.done()
        go_on.set()
        assert searching.result(60).report.heads


def test_a_fingerprint_differs_with_what_the_configuration_computes() -> None:
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    models = [
        small_model(),
        small_model(rope_parameters=rope),
        small_model(rope_parameters={**rope, "factor": 2.0}),
        small_model(rope_parameters={"rope_type": "default", "rope_theta": 20000.0}),
        small_model(rms_norm_eps=1e-3),
        small_model(hidden_act="gelu"),
    ]
    assert len({fingerprint(model) for model in models}) == 6


@pytest.mark.parametrize("row", [1, 30, 63])
def test_a_fingerprint_differs_when_rows_beyond_the_first_do(row: int) -> None:
    model = small_model()
    before = fingerprint(model)
    with torch.no_grad():
        model.get_parameter("model.layers.1.self_attn.q_proj.weight")[row] += 0.1
    assert fingerprint(model) != before
