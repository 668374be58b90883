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


def shared_engine(model: str | Path, **settings: Any) -> Finch:
    """The engine of a model, loaded at the first call and shared while anybody holds it.

    Args:
        model: A hub id, a local folder, a GGUF file or "embedded".
        settings: Keyword arguments of `Finch.from_pretrained`; other settings are another engine.

    Raises:
        SettingsError: If a setting cannot work.
        ModelError: If the model cannot be loaded, or Finch cannot run it.
    """
    key = repr((str(model), _plain(settings)))
    with _lock:  # also while it loads, so that nobody loads it twice
        engine = _engines.get(key)
        if engine is None:
            engine = _engines[key] = Finch.from_pretrained(model, **settings)
            weakref.finalize(engine, lambda kept: None, settings)  # while they live, nothing else has their ids
        return engine


def _plain(value: Any) -> Any:
    """What tells a value from others: mappings in a fixed order, objects that are no plain values by themselves."""
    if isinstance(value, Mapping):
        return sorted((name, _plain(item)) for name, item in value.items())
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    plain = value is None or isinstance(value, (str, int, float, Path, torch.dtype, torch.device))
    return value if plain else (type(value).__name__, id(value))
