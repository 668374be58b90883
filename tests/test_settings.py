"""Every option of every call that cannot work is one FinchError of one line, and what can work is taken."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from finch_rag.adapters import check_options
from finch_rag.engine import Finch
from finch_rag.errors import FinchError, InputError, SettingsError
from finch_rag.settings import RULES, CallOptions, Settings

from .small import small_finch, texts

QUESTION = "When was it built?"
SURROGATE = "caf\udce9"
NAN, INFINITE = float("nan"), float("inf")
BAD: dict[str, list[Any]] = {
    "max_new_tokens": [0, -1, 1.5, NAN, "x", None, True, 2**70 * 1.0],
    "budget": [0, -3, 1.5, True, False, "many", [5], NAN],
    "chunk_size": [0, -3, 1.5, True, "large", [5]],
    "strategy": ["best", None, 5, True, ["loop"]],
    "selection": ["best", None, 5, ["token"]],
    "reread": [None, 1, "yes"],
    "cutoff": [-0.1, 1.1, NAN, "x", True],
    "prior": ["scores", None, True, 1],
    "rounds": [0, 3, 1.5, True, "2"],
    "strict": ["yes", 1, None],
    "notes": ["text", 7, [7]],
    "store": ["", " ", 5, []],
    "shortlist_tokens": [-1, 1.5, True, "x"],
    "max_context_tokens": [0, 1.5, True, "x"],
    "instructions": [5, b"a", ["a"], SURROGATE],
    "system_prompt": [5, b"a", ["a"], SURROGATE],
    "history": [None, 5, "hello", {"role": "user"}, [5], [{"role": "user", "content": SURROGATE}]],
    "render": [5, "x"],
    "temperature": [-0.5, NAN, INFINITE, -INFINITE, 1e-38, "hot", None, True],
    "top_p": [0, -1, 1.5, NAN, "x", True],
    "top_k": [0, -1, 2.5, NAN, "x", True],
    "seed": [1.5, "x", 2**64, -(2**70), True],
    "repetition_penalty": [0, -1, NAN, INFINITE, "x", True],
    "stop": [5, [5], b"a", [["a"]], ["a", ""], [b"a"], {"a": 1}, SURROGATE],
    "stop_token_ids": [5.5, 5, [5.5], ["5"], "5", [True], [-1]],
    "json_schema": [5, "x", b"x", [{"type": "object"}], True, {"const": NAN}, {"enum": {1, 2}}, {"const": SURROGATE}],
    "quotes": [None, 1, "yes"],
    "support": [None, 1, "yes"],
    "min_support": [-0.1, 1.1, NAN, "x", True],
    "on_progress": [5, "print"],
}
GOOD: dict[str, list[Any]] = {
    "max_new_tokens": [1, np.int64(2)],
    "budget": [None, 40, np.int32(40)],
    "chunk_size": [None, "auto", 64],
    "strategy": ["auto", "loop", "independent"],
    "selection": ["passage", "token"],
    "reread": [True, False],
    "cutoff": [None, 0, 0.5, 1],
    "prior": ["auto", "none"],
    "rounds": [None, 1, 2],
    "strict": [True, False],
    "notes": [(), ["text"]],
    "store": [None, False, True],
    "shortlist_tokens": [None, 0, 4096],
    "max_context_tokens": [None, 10_000],
    "instructions": [None, "", "Answer."],
    "system_prompt": [None, "", "Be brief."],
    "history": [[], (), [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "Good day."}]],
    "render": [None],
    "temperature": [0, 0.5, 1e-4, np.float32(0.5)],
    "top_p": [None, 1, 0.5],
    "top_k": [None, 1],
    "seed": [None, 0, -(2**63), 2**64 - 1],
    "repetition_penalty": [None, 1, 1.2, 0.5],
    "stop": [None, "", "a", ["a"], ("a", "b"), []],
    "stop_token_ids": [None, [], [5], (5,)],
    "json_schema": [None, {}, {"type": "integer"}, MappingProxyType({"type": "string"})],
    "quotes": [True, False],
    "support": [True, False],
    "min_support": [None, 0, 0.5, 1],
    "on_progress": [None, print],
}
CALLS: dict[str, Callable[[Finch, Any], Any]] = {
    "ask": lambda finch, options: finch.ask(QUESTION, texts(2), **options),
    "stream": lambda finch, options: finch.stream(QUESTION, texts(2), **options),
    "chat": lambda finch, options: finch.chat(QUESTION, texts(2), **options),
    "ask_many": lambda finch, options: finch.ask_many([QUESTION], texts(2), **options),
    "aask": lambda finch, options: asyncio.run(finch.aask(QUESTION, texts(2), **options)),
    "aask_many": lambda finch, options: asyncio.run(finch.aask_many([QUESTION], texts(2), **options)),
    "rank": lambda finch, options: finch.rank(QUESTION, texts(2), **options),
    "compress": lambda finch, options: finch.compress(QUESTION, texts(2), **options),
}


def cases(values: dict[str, list[Any]]) -> list[Any]:
    return [pytest.param(name, value, id=f"{name}-{value!r:.20}") for name in values for value in values[name]]


def test_the_tables_name_every_option() -> None:
    assert set(BAD) == set(GOOD) == set(RULES) == set(CallOptions.__annotations__)


@pytest.mark.parametrize(("name", "value"), cases(BAD))
def test_a_bad_option_is_an_input_error_of_one_line_in_every_call(finch: Finch, name: str, value: Any) -> None:
    for call in CALLS.values():
        with pytest.raises(InputError) as caught:
            call(finch, {name: value})
        assert "\n" not in str(caught.value)
        assert name in str(caught.value) or name in ("stop", "history")
        assert len(str(caught.value)) < 250


@pytest.mark.parametrize(("name", "value"), cases(BAD))
def test_a_bad_setting_is_a_settings_error(name: str, value: Any) -> None:
    if name in ("history",) and isinstance(value, list):
        pytest.skip("what is in a history is looked at when it is read")
    with pytest.raises(SettingsError) as caught:
        check_options({name: value}, SettingsError)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "value"), cases(GOOD))
def test_a_good_option_is_taken(finch: Finch, name: str, value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # The small window has no room for the examples that support is calibrated on.
    monkeypatch.setattr("finch_rag.quotes.support.calibrated", lambda runtime, told: (0.0, 1.0, 1.0))
    reread = name == "strategy"  # passages that are read alone are always read again
    options: Any = {"max_new_tokens": 2, "reread": reread, name: value}
    assert finch.ask(QUESTION, texts(2), **options).report.new_tokens <= 2


def test_settings_stay_as_they_are_when_options_take_their_place() -> None:
    settings = Settings().updated({"budget": 5, "temperature": 1, "instructions": "Go."})
    changed = settings.updated({"budget": None, "stop": "x"})
    assert (settings.reading.budget, changed.reading.budget) == (5, None)
    assert (changed.sampling.temperature, changed.sampling.stop, changed.prompt.instructions) == (1.0, ("x",), "Go.")
    assert settings.sampling.stop == ()


@pytest.mark.parametrize("questions", [None, 5, "When?", b"When?"])
def test_questions_that_are_no_list_are_an_input_error(finch: Finch, questions: Any) -> None:
    with pytest.raises(InputError, match="questions is") as caught:
        finch.ask_many(questions, texts(2))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "messages",
    [
        SURROGATE,
        [{"role": "user", "content": SURROGATE}],
        [{"role": "system", "content": SURROGATE}, {"role": "user", "content": "x"}],
        None,
        5,
        [5],
        b"hello",
    ],
)
def test_a_chat_that_is_no_text_is_an_input_error(finch: Finch, messages: Any) -> None:
    with pytest.raises(InputError) as caught:
        finch.chat(messages)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_new_tokens": 1.5},
        {"budget": True},
        {"instructions": 5},
        {"system_prompt": SURROGATE},
        {"on_progress": 5},
        {"reread": "no"},
        {"heads": [(True, 0)]},
        {"heads": [(0.0, 0)]},
        {"heads": 5},
        {"alone_heads": "all"},
        {"alone_heads": [(True, 0)]},
        {"alone_heads": [(0, 99)]},
        {"alone_heads": []},
        {"alone_heads": 5},
        {"strategy": "best"},
    ],
)
def test_an_engine_is_not_built_with_what_cannot_work(settings: dict[str, Any]) -> None:
    with pytest.raises(SettingsError) as caught:
        small_finch(**settings)
    assert "\n" not in str(caught.value)


def test_what_a_user_writes_is_shown_short() -> None:
    with pytest.raises(FinchError) as caught:
        check_options({"budget": "9" * 10_000})
    assert len(str(caught.value)) < 200
