"""Files of saved caches: each loads and can be asked, or is refused in one line."""

from __future__ import annotations

import json
import tempfile
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from finch_rag import Finch
from finch_rag.models.cache import CompressedCache
from finch_rag.models.saved_cache import sealed
from tests.small import small_finch

from .support import Choices, only

_TENSORS = ("kept", "keys.0", "values.0", "keys.1", "values.1", "keys.2", "keys.01", "x")
_DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.float64, torch.bool)
_SIZES = (0, 1, 2, 3, 16, 17, 5)
_FIELDS = (
    "passage_ids",
    "titles",
    "passage_tokens",
    "shares",
    "question",
    "model",
    "figures",
    "older_turns",
    "sentences",
)
_VALUES: tuple[Any, ...] = (
    *(None, True, 0, 1, -1, 3, 10**9, 2**63, 0.5, "", "a", "\U0001f600", [], {}, [None], [0], ["a"], [1, 2, 3]),
    *([[0, 1]], [[9, 9]], {"a": 1}, {"heads": []}, [{"passage": 0}], [{}], "x" * 1000, 1e400),
)
_HEADER = ("format", "prefix", "document", "x")
_WORDS = (
    "finch-cache-1",
    "finch-cache-2",
    "finch-cache-4",
    "0",
    "1",
    "5",
    "-1",
    "99",
    "1e3",
    "",
    " 3",
    "{",
    "[]",
    "null",
    "{}",
)
_RAW, _BUILT = 0, 1


@cache
def _finch() -> Finch:
    return small_finch(max_new_tokens=2)


@cache
def _saved() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "cache"
        _finch().compress("who?", ["The bridge. It is old."]).save(file)
        return file.read_bytes()


@cache
def _file() -> Path:
    return Path(tempfile.mkdtemp(prefix="finch-fuzz-")) / "cache.safetensors"


def seeds() -> list[bytes]:
    """A saved cache, cut and whole, and changes of it."""
    saved = _saved()
    header = 8 + int.from_bytes(saved[:8], "little")
    return [bytes((_RAW,)) + part for part in (saved, saved[:header], saved[: header // 2])] + [bytes((_BUILT,))]


def check(data: bytes) -> None:
    """A file's bytes, or changes of a saved cache."""
    choices = Choices(data)
    _file().write_bytes(choices.rest() if choices.number(2) == _RAW else _changed(choices))
    with only():
        loaded = CompressedCache.load(_file())
        _finch().ask_cached(loaded)
        loaded.fork(1).crop_to(1)


def _changed(choices: Choices) -> bytes:
    saved = _saved()
    header = json.loads(saved[8 : 8 + int.from_bytes(saved[:8], "little")])["__metadata__"]
    tensors, document = load(saved), json.loads(header["document"])
    while choices.left:
        kind = choices.number(4)
        if kind == 0:
            name = choices.one_of(_TENSORS)
            size = [choices.one_of(_SIZES) for _ in range(choices.number(5))]
            tensors[name] = torch.ones(size, dtype=choices.one_of(_DTYPES))
        elif kind == 1:
            tensors.pop(choices.one_of(_TENSORS), None)
        elif kind == 2:
            inner = document.get("figures")
            part = inner if choices.number(2) and isinstance(inner, dict) else document
            part[choices.one_of([*_FIELDS, *part])] = deepcopy(choices.one_of(_VALUES))
        elif choices.number(2):
            header[choices.one_of(_HEADER)] = choices.one_of(_WORDS)
        else:
            name = choices.one_of(_TENSORS)
            if name in tensors and tensors[name].numel():
                tensors[name] = _spoilt(tensors[name], choices.number(6))
    header.setdefault("document", "")
    if header["document"] not in _WORDS:
        header["document"] = json.dumps(document)
    return save(tensors, metadata=sealed(tensors, header))  # who changes a file on purpose makes its checksum anew


def _spoilt(tensor: torch.Tensor, how: int) -> torch.Tensor:
    if how < 2:
        return tensor[..., : tensor.shape[-1] // 2].contiguous() if tensor.dim() else tensor
    if how == 2:
        return tensor.flatten()
    if not tensor.is_floating_point():
        return tensor.clone().fill_((-1, 2**40, 7)[how - 3]) if tensor.dtype == torch.int64 else tensor
    return tensor.clone().fill_((float("nan"), float("inf"), 1e30)[how - 3])
