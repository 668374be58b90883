"""Read far more passages than a model's window holds, in one chunked prefill, and answer from a small cache.

Example:
    >>> from finch_rag import Finch
    >>> finch = Finch.from_pretrained("embedded")
    >>> answer = finch.ask("Who signed it?", passages)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import (
    CorpusError,
    DeviceMemoryError,
    FinchError,
    InputError,
    MissingExtraError,
    ModelError,
    NumericsError,
    SettingsError,
    StoreError,
    WindowError,
)

if TYPE_CHECKING:
    from .answer import Answer, Citation, CompressionReport, Quote, Source, Statement
    from .checkup.checking import Finding, check_model
    from .engine import Finch
    from .heads.alone import find_alone_heads
    from .heads.search import find_heads
    from .models.cache import CompressedCache
    from .prompts.passages import Passage
    from .store.figures import Retrieved, StoreInfo
    from .store.store import PassageStore
    from .streaming import AnswerStream

__version__ = "0.1.0"

__all__ = [
    "Answer",
    "AnswerStream",
    "Citation",
    "CompressedCache",
    "CompressionReport",
    "CorpusError",
    "DeviceMemoryError",
    "Finch",
    "FinchError",
    "Finding",
    "InputError",
    "MissingExtraError",
    "ModelError",
    "NumericsError",
    "Passage",
    "PassageStore",
    "Quote",
    "Retrieved",
    "SettingsError",
    "Source",
    "Statement",
    "StoreError",
    "StoreInfo",
    "WindowError",
    "check_model",
    "find_alone_heads",
    "find_heads",
]

_LAZY = {  # torch and transformers take seconds to import, so these wait until they are used
    "Answer": "answer",
    "AnswerStream": "streaming",
    "Citation": "answer",
    "CompressedCache": "models.cache",
    "CompressionReport": "answer",
    "Finch": "engine",
    "Finding": "checkup.checking",
    "Passage": "prompts.passages",
    "PassageStore": "store.store",
    "Quote": "answer",
    "Retrieved": "store.figures",
    "Source": "answer",
    "Statement": "answer",
    "StoreInfo": "store.figures",
    "check_model": "checkup.checking",
    "find_alone_heads": "heads.alone",
    "find_heads": "heads.search",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
