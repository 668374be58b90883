"""Which sentences of the passages an answer rests on."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from finch_rag import CompressedCache, DeviceMemoryError, Finch, Passage
from finch_rag.answer import Answer, citations, report
from finch_rag.answering import Written
from finch_rag.corpus import read_corpus
from finch_rag.models.cached_document import CachedDocument
from finch_rag.quotes import attention as watching
from finch_rag.quotes import choosing, finding
from finch_rag.quotes.attention import watched_heads
from finch_rag.quotes.choosing import LEAST_ATTENTION, QUOTE_PART, choose, shares_of
from finch_rag.reading import read_request
from finch_rag.resolving import resolve

from .small import small_finch, small_model
from .test_own_models import FAMILIES, family, new_finch

QUESTION = "When was the lighthouse built?"
PASSAGES = [
    Passage("The harbour was built in 1874. It closed in the winter.", id="a", title="The harbour. A title."),
    Passage("The museum opened in 1931! Its director is Hugo Kessler. It has maps.", id="b"),
    Passage("A system of canals carries water", id="c"),
    Passage("  ", id="d"),
    Passage("The lighthouse was lit in 1902. Who drew it?", id="e", title="Light"),
]

ROOT = Path(__file__).parents[1]


def told(answer: Answer) -> list[Any]:
    """The statements and quotes, shares rounded."""
    found: list[Any] = [
        (
            each.text,
            [(s.index, round(s.share, 3), [(q.text, round(q.share, 3)) for q in s.quotes]) for s in each.sources],
        )
        for each in answer.statements
    ]
    return [*found, *((c.index, [(q.text, round(q.share, 3)) for q in c.quotes]) for c in answer.citations)]


def check_places(answer: Answer, passages: list[Passage]) -> None:
    """Offsets lead to what is quoted, and what a statement rests on is quoted by a citation."""
    assert answer.statements
    cited = {citation.index: citation for citation in answer.citations}
    for statement in answer.statements:
        assert answer.text[statement.start : statement.end] == statement.text
        assert [s.share for s in statement.sources] == sorted((s.share for s in statement.sources), reverse=True)
        for source in statement.sources:
            assert source.quotes
            assert sum(quote.share for quote in source.quotes) <= source.share + 1e-5
            places = [(quote.start, quote.end) for quote in source.quotes]
            assert set(places) <= {(quote.start, quote.end) for quote in cited[source.index].quotes}
    for citation in answer.citations:
        for quote in citation.quotes:
            assert passages[citation.index].text[quote.start : quote.end] == quote.text
        assert list(citation.quotes) == sorted(citation.quotes, key=lambda quote: quote.start)
    assert any(citation.quotes for citation in answer.citations)


def quote_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random heads look at nothing sharply."""
    monkeypatch.setattr(choosing, "LEAST_ATTENTION", 0.0)


def record_attention(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was watched of each answer, and the attention that was found; quotes however little that is."""
    seen: list[Any] = []
    quoting = finding._quoting
    quote_all(monkeypatch)

    def recorded(own: Any, attention: torch.Tensor) -> Answer:
        seen.append((own, attention))
        return quoting(own, attention)

    monkeypatch.setattr(finding, "_quoting", recorded)
    return seen


def eager_attention(model: Any, own: Any, heads: Any) -> torch.Tensor:
    """The same by a model's eager attention, of everything in one pass."""
    written, prompt = own.written, own.written.request.prompt
    document = [token for passage in prompt.passages for token in passage]
    kept = [document[place] for place in written.cache.kept[0].tolist()]
    before = [*prompt.prefix, *kept, *prompt.question, *prompt.tail]
    tokens = [*before, *written.token_ids[: own.rows]]
    with torch.no_grad():
        weights = model(input_ids=torch.tensor([tokens]), output_attentions=True, use_cache=False).attentions
    first = len(before) - watching.LEAD
    watched = torch.stack([weights[layer][0, head] for layer in heads for head in heads[layer]])
    watched = watched[:, first : first + own.rows]
    columns = {place: len(prompt.prefix) + column for column, place in enumerate(written.cache.kept[0].tolist())}
    paid = torch.stack(
        [watched[..., [columns[n] for n in range(s.first, s.stop)]].sum(-1) for s in own.sentences], dim=-1
    )
    owners = torch.tensor(own.statement_of)
    means = [paid[:, owners == number].mean(1) for number in range(len(own.spans))]
    return torch.stack(means, dim=1).nan_to_num()


@pytest.mark.parametrize("lead", [0, 1])
@pytest.mark.parametrize("budget", [60, 400])
def test_the_attention_is_that_of_the_models_own_pass(budget: int, lead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "LEAD", lead)
    monkeypatch.setattr(finding, "LEAD", lead)
    seen = record_attention(monkeypatch)
    finch = small_finch(reread=True, budget=budget, cutoff=0, max_new_tokens=20)
    answer = finch.ask(QUESTION, PASSAGES)
    [(own, attention)] = seen
    expected = eager_attention(small_model(attention="eager"), own, watched_heads(finch.model))
    assert attention.shape == (len(expected), len(own.spans), len(own.sentences))
    assert 0 < own.rows <= 20
    assert (attention - expected).abs().max() < 1e-5
    assert attention.max() > 0.01
    check_places(answer, PASSAGES)
    assert answer.report.quote_seconds > 0


@pytest.mark.parametrize("rows", [1, 7])
def test_long_answers_are_read_in_parts(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    finch = small_finch(reread=True, max_new_tokens=20)
    whole = finch.ask(QUESTION, PASSAGES)
    monkeypatch.setattr(finding, "_ROWS", rows)
    monkeypatch.setattr(watching, "_WEIGHTS", 1)
    assert told(finch.ask(QUESTION, PASSAGES)) == told(whole)
    assert list(map(told, finch.ask_many([QUESTION] * 2, PASSAGES))) == [told(whole)] * 2


@pytest.mark.parametrize(
    ("kind", "changes", "again"),
    [
        ("gemma2", {}, True),  # the window has left tokens behind
        ("gemma2", {"sliding_window": 512}, False),
        ("gpt_oss", {}, True),
        ("gpt_oss", {"sliding_window": 512}, False),
        ("qwen3_next", {}, True),
        ("gpt2", {}, False),
        ("gptj", {}, False),
        ("falcon", {}, False),
    ],
)
def test_a_models_own_attention_is_watched_too(
    kind: str, changes: dict[str, Any], again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FAMILIES, kind, {**FAMILIES[kind], **changes})
    seen = record_attention(monkeypatch)
    read: list[int] = []
    forward_own: Any = vars(finding)["forward_own"]

    def counted(model: Any, tokens: torch.Tensor, observer: Any) -> None:
        read.append(tokens.shape[1])
        forward_own(model, tokens, observer)

    monkeypatch.setattr(finding, "forward_own", counted)
    plain, finch = family(kind), new_finch(kind, max_new_tokens=12)
    answer = finch.ask(QUESTION, PASSAGES)
    [(own, attention)] = seen
    if kind != "qwen3_next":  # it tells the attention of some layers only
        expected = eager_attention(plain, own, watched_heads(finch.model))
        assert (attention - expected).abs().max() < 1e-4
    assert attention.max() > 0.001
    assert bool(read) == again
    check_places(answer, PASSAGES)
    assert told(finch.ask_many([QUESTION], PASSAGES)[0]) == told(answer)


def test_all_ways_of_asking_say_the_same(finch: Finch) -> None:
    options: dict[str, Any] = {"reread": True, "budget": 100, "max_new_tokens": 24}
    expected = finch.ask(QUESTION, PASSAGES, **options)
    check_places(expected, PASSAGES)
    stream = finch.stream(QUESTION, PASSAGES, **options)
    assert "".join(stream) == expected.text
    assert told(stream.answer) == told(expected)
    assert told(asyncio.run(finch.aask(QUESTION, PASSAGES, **options))) == told(expected)
    assert told(finch.chat([{"role": "user", "content": QUESTION}], PASSAGES, **options)) == told(expected)
    others = finch.ask_many([QUESTION, "Who drew it?", QUESTION], PASSAGES, **options)
    assert told(others[0]) == told(others[2]) == told(expected)
    assert told(others[1]) == told(finch.ask("Who drew it?", PASSAGES, **options))


def test_steps_that_leave_the_cache_behind_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    finch = small_finch(reread=True)
    expected = told(finch.ask(QUESTION, PASSAGES))
    monkeypatch.setattr(finch.runtime.graphs, "enabled", True)  # as on a GPU
    assert told(finch.ask(QUESTION, PASSAGES)) == expected
    assert told(finch.ask_many([QUESTION] * 3, PASSAGES)[2]) == expected


@pytest.mark.parametrize(
    "settings",
    [{"strategy": "independent", "alone_heads": [(0, 1)]}, {"heads": "all"}, {"store": True, "alone_heads": [(1, 2)]}],
)
def test_every_reading_brings_quotes(settings: dict[str, Any]) -> None:
    finch = small_finch(**{"reread": True, "budget": 100, **settings})
    check_places(finch.ask(QUESTION, PASSAGES), PASSAGES)


def test_without_quotes_nothing_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    finch = small_finch(reread=True)
    passes: list[int] = []
    model: Any = finch.model
    model.base_model.layers[0].register_forward_pre_hook(lambda layer, args: passes.append(args[0].shape[1]))
    with_them = finch.ask(QUESTION, PASSAGES)
    taken, rows = len(passes), passes[-1]
    passes.clear()
    without = finch.ask(QUESTION, PASSAGES, quotes=False)
    assert len(passes) == taken - 1
    assert 1 <= rows <= with_them.report.new_tokens
    assert without.text == with_them.text
    assert (without.statements, without.report.quote_seconds) == ((), 0.0)
    assert [citation.quotes for citation in without.citations] == [()] * len(without.citations)
    assert small_finch(reread=True, quotes=False).ask(QUESTION, PASSAGES).statements == ()


@pytest.mark.parametrize(
    ("passages", "options"),
    [([], {}), (PASSAGES, {"selection": "token", "budget": 20}), ([Passage("one sentence " * 60)], {"reread": True})],
    ids=["no passages", "single tokens", "no sentence kept whole"],
)
def test_where_nothing_can_be_quoted_all_is_empty(finch: Finch, passages: Any, options: Any) -> None:
    answer = finch.ask(QUESTION, passages, **options)
    assert answer.text
    assert answer.statements == ()
    assert not any(citation.quotes for citation in answer.citations)


def test_the_beginning_of_a_passage_gives_its_whole_sentences() -> None:
    text = " ".join(f"Sentence {number} was built in the harbour." for number in range(14))
    finch = small_finch(reread=True, strategy="independent", alone_heads=[(0, 1)], budget=60, shortlist_tokens=0)
    answer = finch.ask(QUESTION, [text])
    check_places(answer, [Passage(text)])
    assert answer.citations[0].kept_tokens < answer.citations[0].passage_tokens
    sentences = CachedDocument.from_json(finch.compress(QUESTION, [text]).document.to_json()).sentences
    assert 0 < len(sentences) < 14
    assert [each.text for each in sentences] == [
        f"Sentence {n} was built in the harbour." for n in range(len(sentences))
    ]


def test_a_saved_cache_quotes_like_the_passages(finch: Finch, tmp_path: Path) -> None:
    options: dict[str, Any] = {"reread": True, "budget": 100}
    cache = finch.compress(QUESTION, PASSAGES, **options)
    cache.save(tmp_path / "cache")
    loaded = CompressedCache.load(tmp_path / "cache")
    assert loaded.document == cache.document
    answer = finch.ask_cached(loaded, "Who drew it?")
    check_places(answer, PASSAGES)
    assert told(finch.ask_cached(loaded, "Who drew it?")) == told(answer)  # it stayed as it was
    assert finch.ask_cached(loaded, "Who drew it?", quotes=False).statements == ()


def test_a_cache_without_sentences_quotes_nothing(finch: Finch) -> None:
    cache = finch.compress(QUESTION, PASSAGES)
    assert cache.document.sentences
    cache.document = replace(cache.document, sentences=())
    answer = finch.ask_cached(cache)
    assert answer.text
    assert answer.statements == ()


def test_an_engine_without_quotes_keeps_no_text_in_a_cache() -> None:
    finch = small_finch(quotes=False)
    assert finch.compress(QUESTION, PASSAGES).document.sentences == ()


def test_an_answer_outlives_memory_that_runs_out(finch: Finch, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = finch.ask(QUESTION, PASSAGES).text

    def fails(*args: Any, **options: Any) -> None:
        raise DeviceMemoryError("no memory")

    monkeypatch.setattr(finding, "forward", fails)
    answer = finch.ask(QUESTION, PASSAGES)
    assert (answer.text, answer.statements) == (expected, ())
    assert any("quotes" in note for note in answer.report.notes)


def test_older_turns_are_not_quoted() -> None:
    finch = small_finch(reread=True, budget=60)
    turn = [{"role": "user", "content": "Who built it? " * 12}, {"role": "assistant", "content": "Clara Novak. " * 12}]
    answer = finch.ask(QUESTION, PASSAGES[:1], history=turn * 3)
    assert answer.report.passages > 1
    assert all(source.index == 0 for each in answer.statements for source in each.sources)


def test_everything_can_be_written_as_json(finch: Finch) -> None:
    answer = finch.ask(QUESTION, PASSAGES, reread=True, budget=100)
    written = answer.to_dict()
    assert json.loads(json.dumps(written))["statements"] == written["statements"]
    assert written["statements"][0]["sources"][0]["quotes"][0].keys() == {"text", "start", "end", "share"}
    assert any(citation["quotes"] for citation in written["citations"])


@pytest.mark.parametrize("before", ["", " \n"])
def test_each_token_of_an_answer_belongs_to_its_statement(finch: Finch, before: str) -> None:
    statements = ["It was built in 1874.", "The caf\u00e9 opened!", "Nobody came."]
    text = " ".join(statements)
    tokens = finch.prompts.encode([before + text + " STOP"])[0]
    request = resolve(finch.runtime, QUESTION, PASSAGES, finch.settings.updated({"budget": 400}))
    cache = read_request(finch.runtime, request)
    answer = Answer(text, citations(cache), report(cache, 1))  # a stop string has cut it off
    ended = [*tokens, int(finch.tokenizer.eos_token_id)]
    own = finding._watched(finch.runtime, Written(answer, request, cache, cache.length, ended))
    assert own is not None
    assert [text[start:end] for start, end in own.spans] == statements
    parts = [
        finch.prompts.decode([token for token, owner in zip(tokens, own.statement_of, strict=False) if owner == number])
        for number in range(3)
    ]
    assert [part.strip() for part in parts] == statements
    assert finch.prompts.decode(tokens[: own.rows]).strip() == text


def test_a_statement_rests_on_what_its_sharpest_heads_look_at() -> None:
    faint = torch.full((38, 2, 4), 0.25)  # all but a twentieth of the heads look at much, and at nothing sharply
    sharp = torch.tensor(
        [
            [[0.8, 0.1, 0.0, 0.0], [0.0, 0.3, 0.6 * QUOTE_PART * 1.01, 0.0]],
            [[0.6, 0.1, 0.0, 0.1], [0.0, 0.9, 0.6 * QUOTE_PART * 1.01, 0.6 * QUOTE_PART * 0.98]],
        ]
    )
    first, second = choose(torch.cat((faint, sharp)))
    assert first.quotes == [0]
    assert torch.allclose(first.attention, torch.tensor([0.7, 0.1, 0.0, 0.05]))
    assert second.quotes == [1, 2]
    # Each statement has sharpest heads of its own.
    [of_third, of_fourth] = choose(torch.tensor([[[0.9, 0.0], [0.1, 0.1]], [[0.1, 0.1], [0.0, 0.5]]]))
    assert (of_third.quotes, of_fourth.quotes) == ([0], [1])
    assert of_fourth.attention.tolist() == [0.0, 0.5]


def test_a_statement_that_looks_at_nothing_rests_on_nothing() -> None:
    [little] = choose(torch.tensor([[[0.99, 0.5]]]) * LEAST_ATTENTION)
    assert little.quotes == []
    assert shares_of(little.attention) == pytest.approx([0.99 / 1.49, 0.5 / 1.49])
    assert shares_of(torch.zeros(3)) == [0.0] * 3


def test_heads_of_the_middle_layers_are_watched() -> None:
    watched = watched_heads(small_model(num_hidden_layers=6))
    assert {layer: list(heads) for layer, heads in watched.items()} == {layer: [0, 1, 2, 3] for layer in (2, 3, 4)}


@pytest.fixture(scope="module")
def ferries() -> list[Passage]:
    return [passage for passage in read_corpus(ROOT / "examples" / "corpus").passages if "ferries" in str(passage.id)]


@pytest.mark.embedded
@pytest.mark.parametrize("way", ["ask", "ask_many", "ask_cached"])
def test_what_an_answer_copies_is_quoted(embedded: Finch, ferries: list[Passage], way: str) -> None:
    question = "Who is the captain of the ferry that is licensed for 38 passengers?"
    options: dict[str, Any] = {"max_new_tokens": 24}
    if way == "ask_cached":
        answer = embedded.ask_cached(embedded.compress(question, ferries), **options)
    elif way == "ask_many":
        answer = embedded.ask_many([question, "When was the MV Stella Corran built?"], ferries, **options)[0]
    else:
        answer = embedded.ask(question, ferries, **options)
    assert "Nan Corrigall" in answer.text
    check_places(answer, ferries)
    source = answer.statements[0].sources[0]
    assert ferries[source.index].title == "MV Tystie"
    best = max(source.quotes, key=lambda quote: quote.share)
    assert best.text == (
        "Nan Corrigall, captain of the Tystie since 2012, belongs to the tenth generation of her family on Tarsk."
    )
