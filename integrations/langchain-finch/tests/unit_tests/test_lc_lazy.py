from __future__ import annotations

import copy
import gc
import pickle
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
from langchain.chat_models import init_chat_model
from langchain_core.load import dumpd, dumps, load, loads
from langchain_core.runnables import ConfigurableField
from langchain_finch import ChatFinch, FinchLLM, create_finch_documents_chain
from lc_support import QUESTION, SETTINGS, one_line

from finch_rag import Finch, SettingsError
from finch_rag.sharing import release_engine

BOTH = pytest.mark.parametrize("kind", [ChatFinch, FinchLLM])


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The models that are loaded."""
    seen: list[str] = []
    load_model = Finch.from_pretrained

    def recorded(model: str, **settings: Any) -> Finch:
        seen.append(model)
        return load_model(model, **settings)

    monkeypatch.setattr(Finch, "from_pretrained", recorded)
    return seen


@BOTH
def test_thousands_of_instances_cost_nothing(kind: Any, loaded: list[str]) -> None:
    started = time.perf_counter()
    made = [kind(model="no/such-model", budget=n + 1) for n in range(3000)]
    assert time.perf_counter() - started < 10
    assert [model.budget for model in made[:2]] == [1, 2]
    assert loaded == []


def test_settings_of_calls_share_an_engine_and_those_of_loading_do_not(folder: str, loaded: list[str]) -> None:
    # A device by name, so that the engine is none of the other tests'.
    one, two = ChatFinch(model=folder, device="cpu", **SETTINGS), FinchLLM(model=folder, device="cpu", **SETTINGS)
    three = ChatFinch(model=folder, device="cpu", **{**SETTINGS, "budget": 30, "temperature": 0.7})
    assert loaded == []
    assert one.engine is two.engine is three.engine
    assert loaded == [folder]
    other = ChatFinch(model=folder, device="cpu", **{**SETTINGS, "heads": "all"})
    assert other.engine is not one.engine
    assert len(loaded) == 2


@BOTH
def test_models_that_are_made_for_one_call_load_once(kind: Any, folder: str, loaded: list[str]) -> None:
    for budget in (30, 40, 50):
        assert kind(model=folder, device="cpu", **{**SETTINGS, "budget": budget}).invoke("Hello")
        gc.collect()
    assert loaded == [folder]


def test_an_engine_goes_with_its_last_model_when_it_is_released(folder: str) -> None:
    model = ChatFinch(model=folder, device="cpu", **SETTINGS)
    model.invoke("Hello")
    engine = weakref.ref(model.engine)
    other = FinchLLM(model=folder, device="cpu", **SETTINGS)
    assert other.engine is engine()
    release_engine()
    del model
    gc.collect()
    assert engine() is not None
    del other
    gc.collect()
    assert engine() is None


@BOTH
def test_copies_share_what_is_loaded(kind: Any, folder: str, loaded: list[str]) -> None:
    model = kind(model=folder, device="cpu", **SETTINGS)
    copies = [model.model_copy(), model.model_copy(deep=True), copy.deepcopy(model)]
    held = copies[0].engine
    gc.collect()
    assert all(one.engine is held for one in (*copies, model))
    assert len(loaded) == 1


@BOTH
def test_a_pickled_model_loads_anew(kind: Any, folder: str, loaded: list[str]) -> None:
    model = kind(model=folder, device="cpu", **SETTINGS)
    answer = model.invoke("Hello")
    again = pickle.loads(pickle.dumps(model))
    assert again == model
    chain = pickle.loads(pickle.dumps(create_finch_documents_chain(model.bind(max_tokens=3))))
    assert chain.invoke({"context": ["a text"], "input": QUESTION})
    assert getattr(again.invoke("Hello"), "content", again.invoke("Hello")) == getattr(answer, "content", answer)


@BOTH
def test_a_given_engine_is_used_with_its_settings(kind: Any, shared: Finch, loaded: list[str]) -> None:
    own = Finch(shared.model, shared.tokenizer, name="own", max_new_tokens=3, heads="all")
    model = kind(engine=own)
    assert model.engine is own
    assert model.model == "own"
    assert model.get_num_tokens("harbour") == own.count_tokens("harbour")
    text = model.invoke(QUESTION)
    assert getattr(text, "content", text) == own.chat(QUESTION).text
    assert loaded == []


@BOTH
def test_a_given_engine_is_not_pickled_but_copied(kind: Any, shared: Finch) -> None:
    model = kind(engine=shared)
    for whole in (model, create_finch_documents_chain(model)):
        with pytest.raises(SettingsError, match=r"a model with engine= cannot be pickled.*: pass model=") as raised:
            pickle.dumps(whole)
        one_line(raised)
    assert copy.copy(model).engine is shared
    assert copy.copy(model.engine_source) is model.engine_source


def test_init_chat_model_knows_its_own_list_of_providers_only(folder: str) -> None:
    """Then the README's way is not the only one any more."""
    for provider in ("finch", "langchain_finch", "langchain_finch:ChatFinch"):
        with pytest.raises(ValueError, match=r"Unsupported (model_)?provider"):
            init_chat_model(folder, model_provider=provider)
    chosen: Any = ChatFinch(model="no/such-model", **SETTINGS).configurable_fields(model=ConfigurableField(id="model"))
    assert chosen.invoke("Hello", config={"configurable": {"model": folder}}).content


@BOTH
def test_it_is_serialised_by_its_settings(kind: Any, folder: str) -> None:
    model = kind(model=folder, top_p=0.9, stop=["x"], **SETTINGS)
    dumped = dumpd(model)
    assert dumped["kwargs"]["budget"] == 60
    assert "engine_source" not in dumped["kwargs"]
    again = load(dumped, valid_namespaces=["langchain_finch"], allowed_objects=[kind])
    assert again == model
    assert again._identifying_params == model._identifying_params
    written = dumps(model)
    assert loads(written, valid_namespaces=["langchain_finch"], allowed_objects=[kind]) == model
    with pytest.raises(ValueError, match="Invalid namespace"):
        loads(written, allowed_objects=[kind])


@BOTH
def test_a_folder_may_be_a_path_and_a_stop_one_text(kind: Any, folder: str) -> None:
    model = kind(model=Path(folder), stop="x")
    assert (model.model, model.stop) == (folder, ["x"])


@BOTH
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "there is no model"),
        ({"model": None}, "there is no model"),
        ({"engine": "embedded"}, "engine is str"),
        ({"model": "m", "budget": 0}, "budget is 0: the least is 1 token"),
        ({"model": "m", "budget": "many"}, "budget is 'many': input should be a valid integer"),
        ({"model": "m", "chunk_size": -1}, "chunk_size is -1"),
        ({"model": "m", "selection": "word"}, "selection is 'word': input should be 'passage' or 'token'"),
        ({"model": "m", "max_tokens": 0}, "max_new_tokens is 0: the least is 1"),
        ({"model": "m", "max_tokens": 1, "max_new_tokens": 1}, "max_new_tokens and max_tokens are the same setting"),
        ({"model": "m", "temperature": -1}, "temperature is -1"),
        ({"model": "m", "top_p": 2}, "top_p is 2"),
        ({"model": "m", "top_k": 0}, "top_k is 0"),
        ({"model": "m", "stop": [""]}, "a stop string is empty"),
        ({"model": "m", "bugdet": 5}, "unknown setting bugdet: use budget, chunk_size"),
    ],
)
def test_bad_settings_are_refused_where_it_is_made(kind: Any, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError) as raised:
        kind(**settings)
    assert one_line(raised).startswith(said)


@BOTH
def test_parameters_of_servers_are_taken_and_mean_nothing(kind: Any) -> None:
    model = kind(model="m", timeout=60, max_retries=2, api_key="none", base_url="none", max_new_tokens=5)
    assert (model.max_tokens, model.max_new_tokens) == (5, 5)
    assert model == kind(model="m", max_tokens=5)
