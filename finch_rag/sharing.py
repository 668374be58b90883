"""One engine for all who ask for the same model with the same settings."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .engine import Finch

_engines: weakref.WeakValueDictionary[str, Finch] = weakref.WeakValueDictionary()
_lock = threading.Lock()
_kept: Finch | None = None  # what was asked for last, so that it outlives its users


def shared_engine(model: str | Path, **settings: Any) -> Finch:
    """The engine of a model, loaded at the first call and shared by all.

    It stays loaded while anybody holds it. The one that was asked for last stays even when nobody does, so that a
    program that makes a new model for each request loads it once; it goes when another one is to be loaded, before
    that takes its memory, or with `release_engine`.

    Args:
        model: A hub id, a local folder, a GGUF file or "embedded".
        settings: Keyword arguments of `Finch.from_pretrained`; other settings are another engine.

    Raises:
        SettingsError: If a setting cannot work.
        ModelError: If the model cannot be loaded, or Finch cannot run it.
    """
    global _kept
    key = repr((str(model), _plain(settings)))
    engine = _engines.get(key)  # without the lock: what is loaded need not wait for what is loading
    if engine is None:
        # One at a time, also different models: transformers' loading is not thread-safe, it changes torch's defaults.
        with _lock:
            engine = _engines.get(key)
            if engine is None:
                _kept = None
                engine = _engines[key] = Finch.from_pretrained(model, **settings)
                weakref.finalize(engine, lambda kept: None, settings)  # while they live, nothing else has their ids
    _kept = engine
    return engine


def release_engine() -> None:
    """Lets go of the engine that was asked for last; its memory is free once nobody else holds it."""
    global _kept
    _kept = None


def _plain(value: Any) -> Any:
    """What tells a value from others: mappings in a fixed order, objects that are no plain values by themselves."""
    if isinstance(value, Mapping):
        return sorted((name, _plain(item)) for name, item in value.items())
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    plain = value is None or isinstance(value, (str, int, float, Path, torch.dtype, torch.device))
    return value if plain else (type(value).__name__, id(value))
