"""Answers that are held to a JSON schema."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from typing import Any, Literal

import pytest
import torch
from pydantic import BaseModel, ConfigDict, TypeAdapter
from typing_extensions import TypedDict

from finch_rag.adapters import can_force_json
from finch_rag.answer import Answer
from finch_rag.decode import constraint as module
from finch_rag.decode.constraint import JsonConstraints, closed
from finch_rag.decode.cuda_graphs import CudaGraphs
from finch_rag.decode.generation import Writer
from finch_rag.decode.sampling import Sampling
from finch_rag.engine import Finch
from finch_rag.errors import InputError, MissingExtraError, ModelError, NumericsError
from finch_rag.prompts.builder import PromptBuilder

from .small import chat_tokenizer, small_finch, small_model, texts

QUESTION = "When was it built?"
PASSAGES = texts(6)
BUILDER = PromptBuilder(chat_tokenizer())
END: int = chat_tokenizer().eos_token_id
COLOUR = {"enum": ["red", "green", "blue"]}


class Kind(Enum):
    ARCH = "arch"
    BEAM = "beam"


class Person(BaseModel):
    retired: bool
    kind: Literal["engineer", "captain"]


class Bridge(BaseModel):
    """Everything in it ends by itself, so that random weights come to an end, too."""

    kind: Kind
    builder: Person
    spans: tuple[Person, Person]
    toll: Literal[3, 40, 500] | None


class BridgeDict(TypedDict):
    kind: Literal["arch", "beam"]
    open: bool


JSON_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["arch", "beam"]},
        "lanes": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3},
        "year": {"type": "integer", "minimum": 1800, "maximum": 1999},
    },
    "required": ["kind", "lanes", "year"],
}
SCHEMAS: dict[str, tuple[dict[str, Any], TypeAdapter[Any]]] = {
    "pydantic": (Bridge.model_json_schema(), TypeAdapter(Bridge)),
    "typed dict": (TypeAdapter(BridgeDict).json_schema(), TypeAdapter(BridgeDict)),
    "json schema": (JSON_SCHEMA, TypeAdapter(dict[str, Any])),
}


def ids(text: str) -> list[int]:
    return BUILDER.encode([text])[0]


def favouring(*tokens: int, columns: int = 400) -> torch.Tensor:
    """Logits that favour tokens, the first of them most."""
    logits = torch.zeros(1, columns)
    for place, token in enumerate(tokens):
        logits[0, token] = 9.0 - place
    return logits


def writer(schema: dict[str, Any], ends: frozenset[int] = frozenset({END}), **sampling: Any) -> Writer:
    chosen = Sampling(**{"max_new_tokens": 200, **sampling})
    return Writer(chosen, ends, BUILDER.decode, JsonConstraints(BUILDER, ends).of(json.dumps(schema)))


def said(running: Writer, text: str, *then: int) -> str:
    """What is written where the model wants to say a text."""
    deltas = []
    for token in [*ids(text), *then]:
        deltas.append(running.push(favouring(token)))
        if running.ended:
            break
    return "".join(deltas)


def keeps_to(answer: Answer, name: str) -> Any:
    """The value of an answer, which must be complete and of a schema."""
    assert answer.report.stop_reason == "eos"
    value = json.loads(answer.text)
    assert answer.text == json.dumps(value, ensure_ascii=False)  # no other white space
    SCHEMAS[name][1].validate_python(value) if name != "pydantic" else Bridge.model_validate_json(answer.text)
    if name == "json schema":
        assert set(value) == {"kind", "lanes", "year"}
        assert 1800 <= value["year"] <= 1999
        assert 2 <= len(value["lanes"]) <= 3
    return value


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody has installed the extra."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "llguidance"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "llguidance", None)


# Calls


@pytest.mark.parametrize("name", SCHEMAS)
@pytest.mark.parametrize("sampling", [{}, {"temperature": 2.0, "seed": 3}], ids=["greedy", "sampled"])
def test_random_weights_write_json_of_the_schema(finch: Finch, name: str, sampling: dict[str, Any]) -> None:
    options: Any = {"json_schema": SCHEMAS[name][0], "max_new_tokens": 250, **sampling}
    first, again = (finch.ask(QUESTION, PASSAGES[:2], **options) for _ in range(2))
    keeps_to(first, name)
    assert first.text == again.text


def test_a_seed_decides_what_is_sampled(finch: Finch) -> None:
    options: Any = {"json_schema": COLOUR, "temperature": 3.0, "max_new_tokens": 40}
    answers = [finch.ask(QUESTION, PASSAGES, seed=seed, **options).text for seed in range(8)]
    assert set(map(json.loads, answers)) == {"red", "green", "blue"}
    narrow = [finch.ask(QUESTION, PASSAGES, seed=seed, top_k=1, **options).text for seed in range(4)]
    assert narrow == [finch.ask(QUESTION, PASSAGES, **{**options, "temperature": 0}).text] * 4


def test_every_way_of_asking_heeds_it(finch: Finch) -> None:
    options: Any = {"json_schema": COLOUR, "max_new_tokens": 20}
    expected = finch.ask(QUESTION, PASSAGES, **options)
    stream = finch.stream(QUESTION, PASSAGES, **options)
    deltas = list(stream)
    assert len(deltas) > 1
    assert "".join(deltas) == stream.answer.text == expected.text
    assert json.loads(expected.text) in COLOUR["enum"]
    assert expected.report.stop_reason == "eos"
    assert json.loads(finch.chat(QUESTION, PASSAGES, **options).text) in COLOUR["enum"]
    assert asyncio.run(finch.aask(QUESTION, PASSAGES, **options)).text == expected.text
    cache = finch.compress(QUESTION, PASSAGES)
    assert json.loads(finch.ask_cached(cache, **options).text) in COLOUR["enum"]


def test_answers_side_by_side_are_held_to_it(finch: Finch) -> None:
    options: Any = {"json_schema": SCHEMAS["pydantic"][0], "max_new_tokens": 200}
    questions = [QUESTION, "Who?", "Where was it?"]
    lists = [PASSAGES[:2], PASSAGES[2:4], PASSAGES[4:]]
    together = finch.ask_many(questions, lists, **options)
    assert [answer.text for answer in together] == [
        finch.ask(question, own, **options).text for question, own in zip(questions, lists, strict=True)
    ]
    for answer in together:
        keeps_to(answer, "pydantic")


def test_steps_of_a_fixed_shape_are_masked_afterwards() -> None:
    finch = small_finch()
    options: Any = {"json_schema": JSON_SCHEMA, "max_new_tokens": 100}
    plain = finch.ask(QUESTION, PASSAGES, **options).text
    plain_many = [answer.text for answer in finch.ask_many([QUESTION, "Who?"], PASSAGES, **options)]
    finch.runtime.graphs = graphs = CudaGraphs(finch.model)
    graphs.enabled = True
    assert finch.ask(QUESTION, PASSAGES, **options).text == plain
    assert [answer.text for answer in finch.ask_many([QUESTION, "Who?"], PASSAGES, **options)] == plain_many
    assert graphs.idle


def test_threads_share_one_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    from llguidance import hf

    made: list[int] = []
    make = hf.from_tokenizer

    def counted(*args: Any, **kwargs: Any) -> Any:
        made.append(threading.get_ident())
        return make(*args, **kwargs)

    monkeypatch.setattr(hf, "from_tokenizer", counted)
    finch = small_finch()
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(finch.ask, QUESTION, PASSAGES, json_schema=COLOUR, max_new_tokens=20) for _ in range(6)]
        assert len({call.result().text for call in calls}) == 1
    assert len(made) == 1


def test_an_answer_that_is_cut_says_so(finch: Finch) -> None:
    answer = finch.ask(QUESTION, PASSAGES, json_schema=JSON_SCHEMA, max_new_tokens=5)
    assert (answer.report.stop_reason, answer.report.new_tokens) == ("length", 5)
    with pytest.raises(json.JSONDecodeError):
        json.loads(answer.text)


def test_the_schema_is_a_copy(finch: Finch) -> None:
    schema: dict[str, Any] = {"enum": ["red"]}
    stream = finch.stream(QUESTION, PASSAGES, json_schema=schema, max_new_tokens=20)
    schema["enum"][0] = "blue"
    assert stream.read().text == '"red"'


# What cannot work


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "strng"}, "Invalid type: strng"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"$ref": "#/$defs/Missing"}, "does not exist"),
        ({"type": "integer", "minimum": 5, "maximum": 1}, "greater than maximum"),
        ({"properties": []}, "properties must be an object"),
    ],
    ids=str,
)
def test_a_schema_that_cannot_be_kept_to_is_refused_before_anything_is_read(
    finch: Finch, schema: dict[str, Any], reason: str
) -> None:
    cache = finch.compress(QUESTION, PASSAGES)
    stages: list[str] = []

    def told(stage: str, done: int, total: int) -> None:
        stages.append(stage)

    options: Any = {"json_schema": schema, "on_progress": told}
    calls = [
        lambda: finch.ask(QUESTION, PASSAGES, **options),
        lambda: finch.stream(QUESTION, PASSAGES, **options),
        lambda: finch.chat(QUESTION, PASSAGES, **options),
        lambda: finch.ask_many([QUESTION], PASSAGES, **options),
        lambda: finch.ask_cached(cache, json_schema=schema),
    ]
    for call in calls:
        with pytest.raises(InputError, match=r"^an answer cannot be held to json_schema: ") as caught:
            call()
        assert reason in str(caught.value)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 250
    assert stages == []


def test_without_the_extra_the_error_names_it(missing: None) -> None:
    assert not can_force_json()
    finch = small_finch()
    with pytest.raises(MissingExtraError, match=r"pip install 'finch-rag\[json\]'") as caught:
        finch.stream(QUESTION, PASSAGES, json_schema=COLOUR)
    assert "\n" not in str(caught.value)
    assert finch.ask(QUESTION, PASSAGES).text


def test_the_extra_is_imported_by_who_needs_it_only() -> None:
    assert can_force_json()
    assert not hasattr(module, "LLMatcher")


def test_a_tokenizer_that_cannot_be_read_is_a_model_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from llguidance import hf

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise ValueError("Only fast\ntokenizers are supported")

    monkeypatch.setattr(hf, "from_tokenizer", refuse)
    with pytest.raises(ModelError, match=r"does not work with this tokenizer .*: Only fast tokenizers") as caught:
        small_finch().ask(QUESTION, PASSAGES, json_schema=COLOUR)
    assert "\n" not in str(caught.value)


def test_nan_is_told_as_without_a_schema() -> None:
    running = writer(COLOUR)
    with pytest.raises(NumericsError):
        running.push(torch.full((1, 400), float("nan")))


def test_a_token_that_is_not_allowed_is_told() -> None:
    with pytest.raises(InputError, match="cannot be held to json_schema") as caught:
        writer(COLOUR).take(ids("x")[0], broken=False)
    assert "\n" not in str(caught.value)


def test_a_model_that_forbids_all_that_is_allowed_is_told() -> None:
    logits = torch.full((1, 400), -torch.inf)
    logits[0, ids("x")[0]] = 1.0
    with pytest.raises(NumericsError, match="logits are NaN or infinite"):
        writer(COLOUR).push(logits)


# Tokens


def test_columns_that_stand_for_no_token_are_never_chosen() -> None:
    columns = 450
    running = writer(COLOUR)
    for _ in range(50):
        running.push(favouring(449, 430, 401, 400, columns=columns))
        if running.ended:
            break
    assert json.loads(BUILDER.decode(running.token_ids)) in COLOUR["enum"]
    finch = Finch(small_model(vocab_size=448), chat_tokenizer(), heads="all")
    answer = finch.ask(QUESTION, PASSAGES[:2], json_schema=COLOUR, max_new_tokens=20)
    assert json.loads(answer.text) in COLOUR["enum"]


def test_logits_with_fewer_columns_than_tokens_are_masked_as_far_as_they_go() -> None:
    mask = JsonConstraints(BUILDER, frozenset({END})).of(json.dumps(COLOUR)).mask
    logits = favouring(columns=390)
    assert mask(logits).shape == (1, 390)
    assert bool((logits == 0).all())  # they stay as they are: a captured step writes there again


def test_json_ends_where_nothing_can_follow() -> None:
    running = writer(COLOUR)
    assert said(running, '"green"') == '"green"'
    assert (running.ended, running.stop_reason) == (True, "eos")
    assert END not in running.token_ids


def test_json_that_may_go_on_ends_by_the_models_own_end_tokens() -> None:
    other = chat_tokenizer().pad_token_id
    for end in (END, other):
        running = writer({"type": "integer"}, frozenset({END, other}))
        assert said(running, "18", end) == "18"
        assert (running.ended, running.stop_reason, running.token_ids[-1]) == (True, "eos", end)


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_an_end_token_is_not_chosen_before_the_json_is_complete(ignore_eos: bool) -> None:
    running = writer(COLOUR, ignore_eos=ignore_eos)
    for _ in range(50):
        running.push(favouring(END))
        if running.ended:
            break
    assert json.loads(BUILDER.decode(running.token_ids)) in COLOUR["enum"]
    assert running.stop_reason == "eos"


def test_a_model_without_end_tokens_ends_where_the_json_does() -> None:
    running = writer(COLOUR, frozenset())
    assert said(running, '"blue"') == '"blue"'
    assert running.ended


def test_stop_strings_and_stop_tokens_do_not_cut_json_apart() -> None:
    running = writer(COLOUR, stop=("e", '"gr'), stop_token_ids=tuple(ids('"green"')))
    assert said(running, '"green"') == '"green"'
    assert running.stop_reason == "eos"


def test_the_last_token_that_fits_may_complete_the_json() -> None:
    running = writer(COLOUR, max_new_tokens=len(ids('"red"')))
    assert said(running, '"red"') == '"red"'
    assert running.stop_reason == "eos"


def test_text_of_json_comes_character_by_character() -> None:
    text = '{"name": "Zoë 東京 🙂"}'
    running = writer({"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]})
    assert said(running, text) == text


@pytest.mark.parametrize("wanted", ["\n", " ", "\t"])
def test_a_model_that_wants_white_space_gets_no_more_than_one(wanted: str) -> None:
    running = writer({"type": "array", "items": {"type": "boolean"}, "minItems": 3, "maxItems": 3})
    deltas = []
    while not running.ended:
        deltas.append(running.push(favouring(*ids(wanted))))
    text = "".join(deltas)
    assert text == json.dumps(json.loads(text))


# Objects have no other properties than those that are named


def test_objects_are_closed_where_a_schema_leaves_it_open() -> None:
    shut = {"additionalProperties": False}
    inner = {"type": "object", "properties": {"properties": {"type": "integer"}}}
    assert closed({"properties": {"a": inner}}) == {"properties": {"a": {**inner, **shut}}, **shut}
    assert closed({"$defs": {"A": inner}, "$ref": "#/$defs/A"}) == {
        "$defs": {"A": {**inner, **shut}},
        "$ref": "#/$defs/A",
    }
    assert closed({"items": [inner], "anyOf": [inner]}) == {"items": [{**inner, **shut}], "anyOf": [{**inner, **shut}]}


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object"},
        {"properties": {"a": {}}, "additionalProperties": True},
        {"properties": {"a": {}}, "additionalProperties": {"type": "integer"}},
        {"const": {"properties": {"a": 1}}},
        {"allOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]},
        {"properties": {"a": {}}, "anyOf": [{"properties": {"b": {}}}, {"properties": {"c": {}}}]},
        {"properties": []},
    ],
    ids=str,
)
def test_what_a_schema_says_of_other_properties_holds(schema: dict[str, Any]) -> None:
    expected = json.dumps(schema)
    if schema == {"properties": []}:
        assert closed(schema)["properties"] == []
    else:
        assert json.dumps(closed(schema)) == expected
    assert json.dumps(schema) == expected


def test_a_model_cannot_add_properties_without_end() -> None:
    running = writer({"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]})
    text = said(running, '{"a": true, "b": 1}')
    assert text.startswith('{"a": true')
    assert "b" not in json.loads(text + ("" if running.ended else "}"))


# The embedded model


class Ferry(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str
    captain: str
    passengers: int
    kind: Literal["car ferry", "passenger ferry"]


class Fleet(BaseModel):
    ferries: list[Ferry]


class FerryDict(TypedDict):
    name: str
    passengers: int


FERRIES = [
    "MV Tystie is a passenger ferry of 1998. Captain Nan Corrigall has commanded her since 2011; she is licensed for "
    "38 passengers.",
    "MV Solan is a car ferry with 14 vehicles on her deck. Her captain is Rory Flett; she may carry 95 passengers.",
    "The harbour has two slipways, and a crane that lifts nine tons.",
]
ASKED = "What is the ferry that Captain Nan Corrigall commands, and how many passengers may she carry?"


@pytest.mark.slow
@pytest.mark.embedded
@pytest.mark.parametrize(
    ("adapter", "schema"),
    [
        (TypeAdapter(Ferry), Ferry.model_json_schema()),
        (TypeAdapter(FerryDict), TypeAdapter(FerryDict).json_schema()),
        (
            TypeAdapter(dict[str, Any]),
            {
                "type": "object",
                "properties": {"ship": {"type": "string", "maxLength": 40}, "capacity": {"type": "integer"}},
                "required": ["ship", "capacity"],
            },
        ),
    ],
    ids=["pydantic", "typed dict", "json schema"],
)
def test_a_small_model_answers_by_a_schema(embedded: Finch, adapter: TypeAdapter[Any], schema: dict[str, Any]) -> None:
    instructions = f"Answer with a JSON object by this JSON schema, and with nothing else:\n{json.dumps(schema)}"
    options: Any = {"json_schema": schema, "instructions": instructions, "max_new_tokens": 120}
    answer = embedded.ask(ASKED, FERRIES, **options)
    assert answer.report.stop_reason == "eos"
    adapter.validate_json(answer.text)
    assert "Tystie" in answer.text  # what it says is the model's; how it says it is not
    sampled = embedded.ask(ASKED, FERRIES, temperature=0.8, seed=1, **options)
    if sampled.report.stop_reason == "eos":
        adapter.validate_json(sampled.text)


@pytest.mark.slow
@pytest.mark.embedded
def test_a_small_model_answers_several_questions_by_a_nested_schema(embedded: Finch) -> None:
    schema = Fleet.model_json_schema()
    schema["properties"]["ferries"]["maxItems"] = 2
    options: Any = {"json_schema": schema, "max_new_tokens": 160}
    for answer in embedded.ask_many([ASKED, "Which ferries are there?"], [FERRIES, FERRIES], **options):
        assert answer.report.stop_reason == "eos"
        Fleet.model_validate_json(answer.text)
