from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from finch_rag.engine import Finch
from finch_rag.errors import ModelError, SettingsError
from finch_rag.sharing import release_engine, shared_engine

from .small import CHATML, chat_tokenizer, small_finch, small_model, texts, tokenizer_with

SETTINGS: dict[str, Any] = {"heads": "all", "dtype": "float32", "device": "cpu"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    small_model().save_pretrained(folder)
    chat_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def nothing_is_kept() -> Iterator[None]:
    """Tests here share names of models, so that none may leave an engine to the next."""
    release_engine()
    yield
    release_engine()


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, dict[str, Any]]]:
    """What was loaded; small engines stand in for the loaded ones."""
    seen: list[tuple[Any, dict[str, Any]]] = []

    def load(model: Any, **settings: Any) -> Finch:
        time.sleep(0.01)  # so that threads meet here
        seen.append((model, settings))
        if model == "missing":
            raise ModelError("missing")
        return small_finch()

    monkeypatch.setattr(Finch, "from_pretrained", load)
    return seen


def test_a_shared_engine_is_loaded_with_its_settings_and_answers(folder: Path) -> None:
    engine = shared_engine(folder, budget=40, max_new_tokens=3, **SETTINGS)
    assert (engine.budget, engine.max_new_tokens, engine.name) == (40, 3, str(folder))
    alone = Finch.from_pretrained(folder, budget=40, max_new_tokens=3, **SETTINGS)
    assert engine.ask("When?", texts(3)).text == alone.ask("When?", texts(3)).text


def test_the_same_settings_give_the_same_engine(folder: Path) -> None:
    engine = shared_engine(folder, budget=40, **SETTINGS)
    assert shared_engine(folder, budget=40, **SETTINGS) is engine
    assert shared_engine(str(folder), budget=40, **SETTINGS) is engine


def test_the_order_of_settings_does_not_matter(loads: list[Any]) -> None:
    kwargs = {"a": {"x": 1, "y": [1, {"p": 1, "q": 2}]}, "b": 2}
    turned = {"b": 2, "a": {"y": [1, {"q": 2, "p": 1}], "x": 1}}
    engine = shared_engine("m", budget=40, dtype="float32", model_kwargs=kwargs)
    assert shared_engine("m", model_kwargs=turned, dtype="float32", budget=40) is engine
    assert len(loads) == 1
    assert loads[0] == ("m", {"budget": 40, "dtype": "float32", "model_kwargs": kwargs})


OTHERS: list[dict[str, Any]] = [
    {},
    {"budget": 41},
    {"budget": None},
    {"budget": "40"},
    {"budget": 40, "chunk_size": 40},
    {"chunk_size": 40},
    {"heads": [(0, 1)]},
    {"heads": [(1, 0)]},
    {"heads": "all"},
    {"model_kwargs": {"revision": "a"}},
    {"model_kwargs": {"revision": "b"}},
    {"model_kwargs": {"a": {"revision": "b"}}},
]


def test_other_settings_or_another_model_give_another_engine(loads: list[Any]) -> None:
    engines = [shared_engine("n"), *(shared_engine("m", **settings) for settings in OTHERS)]
    assert len(set(map(id, engines))) == len(loads) == len(OTHERS) + 1


def test_another_tokenizer_gives_another_engine(loads: list[Any]) -> None:
    engines = [shared_engine("m", tokenizer=tokenizer_with(template)) for template in (CHATML, f" {CHATML}")]
    assert engines[0] is not engines[1]


def test_an_engine_outlives_its_users_until_it_is_released(loads: list[Any]) -> None:
    alive = weakref.ref(shared_engine("m"))
    for _ in range(3):
        gc.collect()
        assert shared_engine("m") is alive()
    assert len(loads) == 1
    release_engine()
    gc.collect()
    assert alive() is None
    assert shared_engine("m") is not None
    assert len(loads) == 2


def test_the_engine_that_is_kept_is_gone_before_another_one_is_loaded(
    loads: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    alive = weakref.ref(shared_engine("m"))
    seen: list[Finch | None] = []
    load = Finch.from_pretrained

    def watched(model: Any, **settings: Any) -> Finch:
        seen.append(alive())
        return load(model, **settings)

    monkeypatch.setattr(Finch, "from_pretrained", watched)
    assert shared_engine("n") is shared_engine("n")
    assert seen == [None]


def test_only_the_engine_that_was_asked_for_last_is_kept(loads: list[Any]) -> None:
    one, two = shared_engine("m"), shared_engine("n")
    assert shared_engine("m") is one  # also where it need not be loaded
    first, second = weakref.ref(one), weakref.ref(two)
    del one, two
    gc.collect()
    assert second() is None
    assert first() is shared_engine("m")


def test_what_is_loaded_does_not_wait_for_what_is_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    loading, go_on = threading.Event(), threading.Event()
    running: list[str] = []

    def load(model: str, **settings: Any) -> Finch:
        running.append(model)
        assert len(running) == 1  # transformers cannot load two at once
        if model == "slow":
            loading.set()
            assert go_on.wait(10)
        running.remove(model)
        return small_finch()

    monkeypatch.setattr(Finch, "from_pretrained", load)
    ready = shared_engine("m")
    with ThreadPoolExecutor(2) as pool:
        slow = pool.submit(shared_engine, "slow")
        assert loading.wait(10)
        try:
            assert pool.submit(shared_engine, "m").result(timeout=10) is ready
            other = pool.submit(shared_engine, "other")
            time.sleep(0.05)  # it would begin to load here
        finally:
            go_on.set()
        assert slow.result() is not other.result()


def test_threads_that_ask_at_once_load_once(loads: list[Any]) -> None:
    start = threading.Barrier(8)

    def ask(_: int) -> Finch:
        start.wait()
        return shared_engine("m", budget=40)

    with ThreadPoolExecutor(8) as pool:
        engines = list(pool.map(ask, range(8)))
    assert len(loads) == 1
    assert len(set(map(id, engines))) == 1


def test_an_engine_that_cannot_be_loaded_is_not_remembered(loads: list[Any]) -> None:
    for _ in range(2):
        with pytest.raises(ModelError, match="missing"):
            shared_engine("missing")
    assert len(loads) == 2
    assert shared_engine("m") is not None  # and nothing stays locked


def test_a_bad_setting_is_a_settings_error(folder: Path) -> None:
    with pytest.raises(SettingsError, match="budget is 0"):
        shared_engine(folder, budget=0, **SETTINGS)
