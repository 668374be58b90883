from __future__ import annotations

import importlib.util
import json
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from transformers import DynamicCache

from finch_rag.bench import peer_methods, peers
from finch_rag.bench.cases import QualityCase, read_cases, write_cases
from finch_rag.bench.methods import Contestant, Outcome, run
from finch_rag.bench.peer_methods import PlainModel, compression_ratio, passages_with
from finch_rag.bench.quality import RunSettings
from finch_rag.corpus import Question
from finch_rag.engine import Finch
from finch_rag.errors import InputError, MissingExtraError
from finch_rag.models.loading import LoadedModel
from finch_rag.prompts.builder import PromptBuilder
from finch_rag.prompts.passages import Passage

from .small import chat_tokenizer, small_model, texts

ROOT = Path(__file__).parent.parent
COUNT = 12
BOTH = ("one", "two")
DIFFERENCE = 10  # tokens


class KeepsTheLast:
    """A press as kvpress has them: scores, a ratio, hooks for a ``with`` block; it keeps the last tokens."""

    def __init__(self) -> None:
        self.compression_ratio = 0.0
        self.hooks: list[Any] = []

    def score(self, module: Any, *rest: Any) -> torch.Tensor:
        tokens = rest[1].shape[2]
        return torch.arange(tokens).expand(1, 2, tokens)

    def __call__(self, model: Any) -> KeepsTheLast:
        def evict(module: Any, inputs: Any, kwargs: dict[str, Any], output: Any) -> None:
            layer = kwargs["past_key_values"].layers[module.layer_idx]
            kept = int(layer.keys.shape[2] * (1 - self.compression_ratio))
            if self.compression_ratio:
                self.score(module, None, layer.keys)
                layer.keys, layer.values = layer.keys[:, :, -kept:], layer.values[:, :, -kept:]

        for layer in model.model.layers:
            self.hooks.append(layer.self_attn.register_forward_hook(evict, with_kwargs=True))
        return self

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None:
        for hook in self.hooks:
            hook.remove()


class MasksTheFirst:
    """KVzipPress as far as it is used: a head loses its first tokens behind the sinks; one loses fewer, one more."""

    presses: ClassVar[list[MasksTheFirst]] = []

    def __init__(self, compression_ratio: float, n_sink: int) -> None:
        self.compression_ratio, self.n_sink = compression_ratio, n_sink
        self.read: list[int] = []
        self.presses.append(self)

    @contextmanager
    def __call__(self, model: Any) -> Iterator[None]:
        tokenizer = sys.modules["kvpress.presses.kvzip_press"].AutoTokenizer.from_pretrained("no such folder")
        self.prefix_length = len(tokenizer.encode("the template's"))

        def note(module: Any, inputs: Any, kwargs: dict[str, Any]) -> None:
            self.read = kwargs["input_ids"][0].tolist()

        hook = model.model.register_forward_pre_hook(note, with_kwargs=True)
        yield
        hook.remove()
        lost = round(len(self.read) * self.compression_ratio)
        for number, layer in enumerate(model.model.layers if lost else ()):
            counts = [lost + (0, DIFFERENCE)[number == 1], lost - (0, DIFFERENCE)[number == 0]]
            heads = torch.tensor([head for head, count in enumerate(counts) for _ in range(count)])
            places = torch.tensor([self.n_sink + place for count in counts for place in range(count)])
            layer.self_attn.masked_key_indices = (torch.zeros_like(heads), heads, places)


@pytest.fixture
def masking(monkeypatch: pytest.MonkeyPatch) -> list[MasksTheFirst]:
    """The presses that `kvzip_press` makes, where kvpress is not installed."""
    module: Any = ModuleType("kvpress.presses.kvzip_press")
    module.KVzipPress = MasksTheFirst
    presses: Any = ModuleType("kvpress.presses")
    presses.kvzip_press = module
    for name, each in (("kvpress", ModuleType("kvpress")), (presses.__name__, presses), (module.__name__, module)):
        monkeypatch.setitem(sys.modules, name, each)
    monkeypatch.setattr(MasksTheFirst, "presses", [])
    return MasksTheFirst.presses


def masks(reader: PlainModel) -> list[Any]:
    return [getattr(layer.self_attn, "masked_key_indices", None) for layer in reader.loaded.model.model.layers]


@pytest.fixture
def loaded() -> LoadedModel:
    return LoadedModel(small_model(max_position_embeddings=2048), chat_tokenizer(), "small")


@pytest.fixture
def reader(loaded: LoadedModel) -> PlainModel:
    return PlainModel(loaded, max_new_tokens=6)


@pytest.fixture
def cases() -> list[QualityCase]:
    passages = [Passage(text, id=f"p{n}", title="Elmsworth" if n % 2 else None) for n, text in enumerate(texts(COUNT))]
    questions = [Question(f"q{n}", text, ("x",), (f"p{n}",)) for n, text in enumerate(texts(4, seed=1))]
    return [QualityCase(q, passages[n:] + passages[:n], [*range(COUNT)]) for n, q in enumerate(questions)]


@pytest.fixture
def folder(tmp_path: Path, cases: list[QualityCase]) -> Path:
    """What finch-rag bench quality leaves behind."""
    settings = RunSettings(
        model="small", data="made", retriever="bm25", top_k=COUNT, order="rank", limit=4, seed=0, max_new_tokens=7
    )
    (tmp_path / "settings.json").write_text(json.dumps(asdict(settings)))
    write_cases(cases, tmp_path / "cases.jsonl.gz")
    return tmp_path


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, loaded: LoadedModel) -> list[tuple[str, int, int]]:
    """Peers that need nothing, and what they were asked: question, budget, longest answer."""
    calls = []

    def answer(reader: PlainModel, case: QualityCase, budget: int) -> Outcome:
        calls.append((case.question.id, budget, reader.max_new_tokens))
        if case.question.id == "q3":
            reader.build(case, [Passage("much " * 2000)])
        return Outcome("x", ["p0"], budget, 1.0, 2.0)

    monkeypatch.setattr(peers, "PEERS", {"one": ("torch", answer), "two": ("torch", answer)})
    monkeypatch.setattr(peers, "load_model", lambda model, dtype, device: loaded)
    return calls


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for file in folder.glob("results-peers*") for line in file.read_text().splitlines()]


def test_kvpress_keeps_as_many_tokens_as_the_ratio_is_made_for() -> None:
    for tokens in (*range(1, 60), 511, 12_600, 131_072):
        for kept in {1, tokens // 3, tokens // 2, tokens - 1, tokens} - {0}:
            ratio = compression_ratio(tokens, kept)
            assert 0 <= ratio < 1
            assert max(1, int(tokens * (1 - ratio))) == kept  # as kvpress rounds
    assert compression_ratio(10, 12) == 0


def test_a_passage_is_kept_if_one_of_its_tokens_is() -> None:
    passages = [Passage("a", id="a"), Passage("b", id="b"), Passage("c", id="c")]
    alive = [False, True, False, False, False, True, True]  # the last one is the question's
    assert passages_with(alive, [2, 3, 1], passages) == ["a", "c"]


def test_without_a_press_the_reader_is_the_plain_model(reader: PlainModel, cases: list[QualityCase]) -> None:
    contestant = Contestant(Finch(reader.loaded.model, chat_tokenizer(), heads=[(0, 1)]), 60, 6)
    answers = set()
    for case in cases:
        outcome = peer_methods.pressed(reader, KeepsTheLast(), case, 10_000, [], rotates_keys=False)
        full = run("full", contestant, case)
        assert (outcome.prediction, outcome.kv_tokens) == (full.prediction, full.kv_tokens)
        assert set(outcome.kept_ids) == set(full.kept_ids) == {f"p{n}" for n in range(COUNT)}
        answers.add(outcome.prediction)
    assert len(answers) > 1  # else every prompt would do


def test_a_cases_instructions_are_read_by_peers_too(reader: PlainModel, cases: list[QualityCase]) -> None:
    case = replace(cases[0], instructions="Sing it.")
    prompt = reader.build(case, case.passages)
    assert prompt.prefix != reader.build(cases[0], case.passages).prefix
    assert prompt.prefix == reader.prompts.build(case.question.question, case.passages, "Sing it.").prefix


def test_a_press_leaves_the_budget_beside_prefix_and_question(reader: PlainModel, cases: list[QualityCase]) -> None:
    prompt = reader.build(cases[0], cases[0].passages)
    # The last tokens are the question, and before it passages: the prefix goes, and its room is theirs.
    behind = [sum(map(len, prompt.passages[n + 1 :])) for n in range(COUNT)]
    for first in (1, 5):
        budget = behind[first] + 1 - len(prompt.prefix)  # room for one token of this passage
        outcome = peer_methods.pressed(reader, KeepsTheLast(), cases[0], budget, [], rotates_keys=False)
        assert outcome.kv_tokens == budget
        assert outcome.kept_ids == [f"p{n}" for n in range(first, COUNT)]


@pytest.mark.parametrize("rotates_keys", [True, False])
def test_the_answer_goes_on_where_the_keys_end(
    reader: PlainModel, cases: list[QualityCase], rotates_keys: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PlainModel, "answer", lambda self, cache, tail, position: str(position))
    outcome = peer_methods.pressed(reader, KeepsTheLast(), cases[0], 20, [], rotates_keys=rotates_keys)
    prompt = reader.build(cases[0], cases[0].passages)
    fixed = len(prompt.prefix) + len(prompt.question)
    assert int(outcome.prediction) == fixed + (20 if rotates_keys else sum(map(len, prompt.passages)))


def test_a_press_that_does_not_see_the_question_leaves_the_budget_beside_the_prefix(
    reader: PlainModel, cases: list[QualityCase], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[list[int]] = []
    asked: list[Any] = []
    plain_read = PlainModel.read

    def watched(self: PlainModel, tokens: list[int]) -> DynamicCache:
        read.append(tokens)
        return plain_read(self, tokens)

    def answer(self: PlainModel, cache: DynamicCache, *rest: Any) -> str:
        asked.append(rest)
        return "x"

    monkeypatch.setattr(PlainModel, "read", watched)
    monkeypatch.setattr(PlainModel, "answer", answer)
    prompt = reader.build(cases[0], cases[0].passages)
    behind = sum(map(len, prompt.passages[6:]))  # the last tokens are passages', the prefix goes
    for kept, first in ((behind, 6), (behind + 1, 5)):
        outcome = peer_methods.pressed(
            reader, KeepsTheLast(), cases[0], kept - len(prompt.prefix), [], rotates_keys=False, sees_question=False
        )
        assert outcome.kv_tokens == kept - len(prompt.prefix)
        assert outcome.kept_ids == [f"p{n}" for n in range(first, COUNT)]
    context = [*prompt.prefix, *(token for tokens in prompt.passages for token in tokens)]
    assert read == [context] * 2
    assert asked == [([*prompt.question, *prompt.tail], len(context))] * 2


@pytest.mark.parametrize("method", ["kvpress-expected", "kvpress-kvzip"])
def test_a_question_behind_everything_is_answered_as_by_the_plain_model(
    reader: PlainModel, cases: list[QualityCase], masking: Any, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module: Any = ModuleType("kvpress.presses.expected_attention_press")
    module.ExpectedAttentionPress = KeepsTheLast
    monkeypatch.setitem(sys.modules, module.__name__, module)
    contestant = Contestant(Finch(reader.loaded.model, chat_tokenizer(), heads=[(0, 1)]), 60, 6)
    for case in cases:
        outcome, full = peers.PEERS[method][1](reader, case, 10_000), run("full", contestant, case)
        assert (outcome.prediction, outcome.kv_tokens) == (full.prediction, full.kv_tokens)
        assert set(outcome.kept_ids) == {f"p{n}" for n in range(COUNT)}


def test_kvzip_masks_what_does_not_fit_until_the_answer_is_there(
    reader: PlainModel, cases: list[QualityCase], masking: list[MasksTheFirst], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def answer(self: PlainModel, cache: DynamicCache, *rest: Any) -> str:
        asked.append((cache.get_seq_length(), *rest))
        assert all(mask is not None for mask in masks(reader))
        if len(asked) > 2:
            raise KeyboardInterrupt
        return "x"

    monkeypatch.setattr(PlainModel, "answer", answer)
    prompt = reader.build(cases[0], cases[0].passages)
    context = [*prompt.prefix, *(token for tokens in prompt.passages for token in tokens)]
    behind = sum(map(len, prompt.passages[6:]))
    for alive, first in ((behind, 6), (behind + 1, 5)):  # by the head that loses the fewest
        outcome = peer_methods.kvzip_press(reader, cases[0], alive - DIFFERENCE)
        assert outcome.kv_tokens == alive - DIFFERENCE  # the mean of all heads
        assert outcome.kept_ids == [f"p{n}" for n in range(first, COUNT)]
        assert masks(reader) == [None] * len(masks(reader))
    with pytest.raises(KeyboardInterrupt):
        peer_methods.kvzip_press(reader, cases[0], 30)
    assert masks(reader) == [None] * len(masks(reader))
    before = len(context) + len(prompt.question) + len(prompt.tail) - 1
    assert asked == [(before, prompt.tail[-1:], before)] * 3
    for press in masking:
        assert press.read == context
        assert press.prefix_length == press.n_sink == len(prompt.prefix)


def test_a_question_is_read_token_by_token_where_no_mask_is_found_for_all_of_it(
    reader: PlainModel, cases: list[QualityCase], masking: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain_read = PlainModel.read
    steps: list[int] = []

    def failing(self: PlainModel, tokens: list[int], cache: DynamicCache | None = None) -> DynamicCache:
        cache = plain_read(self, tokens, cache)
        steps.append(len(tokens))
        if len(tokens) > 1 and len(steps) > 1:
            last: Any = cache.layers[-1]
            last.crop(-len(tokens))  # its mask fails, the other layers have read
            raise ValueError("Could not find fake keys")
        return cache

    expected = peer_methods.kvzip_press(reader, cases[1], 10_000).prediction
    monkeypatch.setattr(PlainModel, "read", failing)
    assert peer_methods.kvzip_press(reader, cases[1], 10_000).prediction == expected
    assert steps[1] > 1
    assert steps[2:] == [1] * steps[1]


@pytest.mark.skipif(importlib.util.find_spec("kvpress") is None, reason="only the environment of bench-peers has it")
@pytest.mark.parametrize("method", [method for method, (package, _) in peers.PEERS.items() if package == "kvpress"])
def test_the_presses_of_kvpress_answer_one_question_after_another(
    loaded: LoadedModel, cases: list[QualityCase], method: str
) -> None:
    plain = replace(PlainModel(loaded, 6), separator=peer_methods.add_separator(loaded))
    answer = peers.PEERS[method][1]
    with torch.inference_mode():
        everything = [answer(plain, case, 10_000).prediction for case in cases]
        for case, prediction in zip(cases, everything, strict=True):
            prompt = plain.build(case, case.passages)
            context = [*prompt.prefix, *(token for tokens in prompt.passages for token in tokens), *prompt.question]
            assert plain.answer(plain.read(context), prompt.tail, len(context)) == prediction
            assert answer(plain, case, 80).kv_tokens == 80
            assert answer(plain, case, 10_000).prediction == prediction  # whatever was evicted or masked before


def test_generation_uses_the_positions_it_is_told(reader: PlainModel, cases: list[QualityCase]) -> None:
    prompt = reader.build(cases[0], cases[0].passages)
    context = [*prompt.prefix, *prompt.passages[0], *prompt.question]

    seen: list[list[int]] = []
    forward = reader.loaded.model.forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["position_ids"][0].tolist())
        return forward(*args, **kwargs)

    cache = reader.read(context)
    assert isinstance(cache, DynamicCache)
    reader.loaded.model.forward = watched
    reader.answer(cache, prompt.tail, 500)
    assert seen[0] == [500 + n for n in range(len(prompt.tail))]
    assert [step for steps in seen[1:] for step in steps] == [500 + len(prompt.tail) + n for n in range(len(seen) - 1)]


def test_an_end_token_ends_the_answer(
    loaded: LoadedModel, cases: list[QualityCase], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PromptBuilder, "decode", lambda self, tokens: json.dumps(tokens))
    long, short = PlainModel(loaded, 6), PlainModel(loaded, 6)
    prompt = long.build(cases[0], cases[0].passages)
    tokens = json.loads(long.answer(long.read(prompt.prefix), prompt.tail, len(prompt.prefix)))
    assert len(tokens) == 6
    loaded.model.generation_config.eos_token_id = [tokens[-1]]
    ended = json.loads(short.answer(short.read(prompt.prefix), prompt.tail, len(prompt.prefix)))
    assert ended == tokens[: tokens.index(tokens[-1])]


def test_records_are_those_of_the_quality_bench(folder: Path, asked: Any) -> None:
    summary = peers.main(folder, methods=BOTH, budgets=(30, 60))
    found = records(folder)
    assert [key for key in asked if key[0] == "q0"] == [("q0", budget, 7) for budget in (30, 60, 30, 60)]
    names = {"id", "label", "budget"}
    assert all(set(r) == names | {f.name for f in fields(Outcome)} for r in found if r["id"] != "q3")
    assert all(set(r) == names | {"skipped"} for r in found if r["id"] == "q3")
    assert all("and the window has 2048" in r["skipped"] for r in found if r["id"] == "q3")
    assert {(r["label"], r["budget"]) for r in found} == {(f"{m}@{b}", b) for m in ("one", "two") for b in (30, 60)}
    row = summary["methods"]["two@60"]
    assert (row["n"], row["skipped"], row["kv_tokens"], row["accuracy"]["mean"]) == (3, 1, 60, 1.0)


def test_a_run_goes_on_where_it_stopped(folder: Path, asked: Any) -> None:
    (folder / "results-0.jsonl").write_text(json.dumps({"id": "q0", "label": "two@60", "skipped": "elsewhere"}) + "\n")
    peers.main(folder, methods=BOTH, budgets=(60,))
    assert len(asked) == 2 * 4 - 1
    file = folder / "results-peers-0.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:5]) + '{"id": "q1", "lab')
    asked.clear()
    peers.main(folder, methods=BOTH, budgets=(60,))
    assert len(asked) == 2
    asked.clear()
    peers.main(folder, methods=BOTH, budgets=(60,))
    assert asked == []


def test_shards_share_the_first_questions(folder: Path, asked: Any) -> None:
    peers.main(folder, methods=("one",), limit=3, shard=(1, 2), max_new_tokens=5)
    assert asked == [("q1", 512, 5)]
    peers.main(folder, methods=("one",), limit=3, shard=(0, 2))
    assert [question for question, *_ in asked] == ["q1", "q0", "q2"]
    assert {file.name for file in folder.glob("results*")} == {"results-peers-0.jsonl", "results-peers-1.jsonl"}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--methods", "guess,one"], "method guess is unknown: use one, two"),
        (["--methods", ""], "no method to run: use one, two"),
        (["--budgets", "60,0"], "--budgets is '60,0': use whole numbers from 1"),
        (["--limit", "0"], "--limit is 0: the least is 1"),
        (["--max-new-tokens", "0"], "--max-new-tokens is 0: the least is 1"),
        (["--shard", "3/2"], "--shard is '3/2': use I/N with I from 1 to N"),
    ],
)
def test_arguments_that_cannot_work_are_refused_in_one_line(
    folder: Path, asked: Any, wrong: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert peers.command([str(folder), "--methods", "one", *wrong]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert message in line
    assert asked == []


def test_the_command_hands_on_its_options(folder: Path, asked: Any) -> None:
    arguments = ["--methods", "two, one", "--budgets", "8,9", "--shard", "2/4", "--max-new-tokens", "3"]
    assert peers.command([str(folder), *arguments, "--limit", "2"]) == 0
    assert asked == [("q1", budget, 3) for budget in (8, 9, 8, 9)]
    assert [record["label"] for record in records(folder)] == ["two@8", "two@9", "one@8", "one@9"]


@pytest.mark.parametrize("name", ["settings.json", "cases.jsonl.gz"])
def test_a_folder_without_results_is_named(folder: Path, asked: Any, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(InputError, match=r"is no results folder .* make one by finch-rag bench quality"):
        peers.main(folder, methods=BOTH)


@pytest.mark.parametrize(("method", "package"), [("kvpress-snapkv", "kvpress"), ("longllmlingua", "llmlingua")])
def test_a_missing_package_is_named_before_the_model_is_loaded(
    folder: Path, method: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "load_model", lambda *_: pytest.fail("loaded"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=f"{package} is not installed here: `make bench-peers`"):
        peers.main(folder, methods=(method,))
    assert not records(folder)


def test_finch_press_without_its_separator_is_refused(reader: PlainModel, folder: Path) -> None:
    case = next(read_cases(folder / "cases.jsonl.gz"))
    with pytest.raises(InputError, match="add_separator"):
        peer_methods.finch_press(reader, case, 60)


def test_the_peers_environment_fits_finch_and_kvpress() -> None:
    pins = dict(
        line.split("==")
        for line in (ROOT / "finch_rag/bench/peers-requirements.txt").read_text().splitlines()
        if not line.startswith("#")
    )
    version = tuple(map(int, pins["transformers"].split(".")))
    assert (5, 0) <= version < (5, 3)
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {dependency.split(">")[0].lower().replace("-", "_") for dependency in dependencies}
    assert names <= {name.lower().replace("-", "_") for name in pins}
    constrained = (ROOT / "constraints.txt").read_text()
    assert f"torch=={pins['torch']}\n" in constrained  # one build of it for both environments
