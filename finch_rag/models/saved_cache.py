"""A saved cache: one safetensors file, whose every part is checked when it is read. It may be anybody's."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import InputError, first_line
from ..paths import replacing, told_where
from .cached_document import CachedDocument
from .checksums import checksum, is_finite

_FORMAT = "finch-cache-3"
_EARLIER_FORMATS = ("finch-cache-1", "finch-cache-2")
_CHECKSUM = "sha256"  # in the metadata
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_PREFIX = re.compile(r"[0-9]{1,9}", re.ASCII)


class _DamagedError(Exception):
    """The file is not as `write_saved` writes it; the message says in what."""


class SavedCache(NamedTuple):
    """What is kept of a cache.

    Attributes:
        keys: Of each layer, shape [1, kv_heads, tokens, head_dim].
        values: The same, up to their head_dim.
        kept: See `finch_rag.models.kept_cache.KeptCache`.
        prefix: Tokens at the start that are no document's.
        document: What was read.
    """

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    kept: torch.Tensor
    prefix: int
    document: CachedDocument


def write_saved(path: Path, saved: SavedCache) -> None:
    """Writes a cache as one safetensors file.

    Args:
        path: File to write; an existing one is replaced, once the new one is complete.
        saved: The cache.

    Raises:
        InputError: If it cannot be written.
    """
    tensors = {"kept": saved.kept}
    for number, (keys, values) in enumerate(zip(saved.keys, saved.values, strict=True)):
        tensors[f"keys.{number}"], tensors[f"values.{number}"] = keys, values
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    size = sum(tensor.nbytes for name, tensor in tensors.items() if name != "kept")
    metadata = {"format": _FORMAT, "prefix": str(saved.prefix), "document": saved.document.to_json()}
    with told_where(f"the cache, {size} bytes,", path, InputError), replacing(path) as new:
        save_file(tensors, str(new), metadata=sealed(tensors, metadata))


def sealed(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """Metadata with the checksum of everything.

    Args:
        tensors: On the CPU, by name.
        metadata: With or without a checksum.
    """
    rest = {name: value for name, value in metadata.items() if name != _CHECKSUM}
    shapes = {name: [str(tensor.dtype), list(tensor.shape)] for name, tensor in tensors.items()}
    return {**rest, _CHECKSUM: checksum(tensors, json.dumps([rest, shapes], sort_keys=True))}


def read_saved(path: Path) -> SavedCache:
    """Reads what `write_saved` wrote.

    Args:
        path: The safetensors file.

    Returns:
        On the CPU.

    Raises:
        InputError: If the file is missing, damaged or not a cache.
    """
    try:
        if path.exists() and not path.is_file():  # opening a pipe would wait for ever
            raise _DamagedError("it is no file")
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") in _EARLIER_FORMATS:
                raise InputError(f"{path} was written by an earlier finch-rag: compress the passages again")
            if metadata.get("format") != _FORMAT:
                raise InputError(f"{path} is not a Finch cache: save one with CompressedCache.save")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        return _checked(tensors, metadata)
    except (OSError, SafetensorError, ValueError, _DamagedError) as error:
        raise _unreadable(path, error) from error
    except InputError as error:
        if str(error).startswith(str(path)):
            raise
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> InputError:
    return InputError(f"cannot read the cache {path}: {first_line(error)}; compress the passages again")


def _checked(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> SavedCache:
    """The cache that a file holds, if it holds one."""
    layers = sum(name.startswith("keys.") for name in tensors)
    keys, values = [f"keys.{number}" for number in range(layers)], [f"values.{number}" for number in range(layers)]
    if not layers or set(tensors) != {"kept", *keys, *values}:
        raise _DamagedError(f"it holds {', '.join(sorted(tensors)[:5])}, and not keys and values of every layer")
    _check_shapes([tensors[name] for name in keys], [tensors[name] for name in values])
    tokens = tensors["keys.0"].shape[2]
    written = metadata.get("prefix", "")
    prefix = int(written) if _PREFIX.fullmatch(written) else -1
    if not 0 <= prefix <= tokens:
        raise _DamagedError(f"its prefix is {written[:20]!r}, and it has {tokens} tokens")
    kept = tensors["kept"]
    shapes = [(number, tokens - prefix) for number in (1, layers)]
    if kept.dtype != torch.long or tuple(kept.shape) not in shapes:
        raise _DamagedError(f"its kept tokens are {_form(kept)}, and it needs torch.int64 {list(shapes[0])}")
    if sealed(tensors, metadata)[_CHECKSUM] != metadata.get(_CHECKSUM):
        raise _DamagedError("its checksum is wrong")
    for name in (*keys, *values):
        if not is_finite(tensors[name]):
            raise _DamagedError(f"{name} holds NaN or infinity")
    document = CachedDocument.from_json(metadata.get("document", ""))
    _check_kept(kept, document)
    return SavedCache([tensors[name] for name in keys], [tensors[name] for name in values], kept, prefix, document)


def _check_shapes(keys: list[torch.Tensor], values: list[torch.Tensor]) -> None:
    first = keys[0]
    for number, pair in enumerate(zip(keys, values, strict=True)):
        for name, tensor in zip(("keys", "values"), pair, strict=True):
            if tensor.dtype not in _DTYPES or tensor.dtype != first.dtype:
                raise _DamagedError(f"{name}.{number} is {tensor.dtype}, and keys.0 {first.dtype}")
            if tensor.dim() != 4 or tensor.shape[0] != 1 or not tensor.numel():
                raise _DamagedError(f"{name}.{number} is {_form(tensor)}, and not [1, heads, tokens, head_dim]")
            if tensor.shape[:3] != first.shape[:3] or (name == "keys" and tensor.shape != first.shape):
                raise _DamagedError(f"{name}.{number} is {_form(tensor)}, and keys.0 {_form(first)}")


def _check_kept(kept: torch.Tensor, document: CachedDocument) -> None:
    """Document positions: each once, and those of a passage in their order. The best passage may stand last."""
    lengths = torch.tensor(document.passage_tokens, dtype=torch.long)
    total = int(lengths.sum())
    if kept.numel() and not (int(kept.min()) >= 0 and int(kept.max()) < total):
        raise _DamagedError(f"it keeps the tokens {int(kept.min())} to {int(kept.max())} of a document of {total}")
    passage_of = torch.bucketize(kept, lengths.cumsum(0), right=True)
    backwards = (kept.diff() <= 0) & (passage_of.diff() == 0)
    if bool(backwards.any()) or any(len(row.unique()) < len(row) for row in kept):
        raise _DamagedError("its kept tokens are not in their order")
    whole = set(kept[0].tolist()) if bool((kept == kept[:1]).all()) else set()
    for sentence in document.sentences:
        if sentence.stop > total or not whole.issuperset(range(sentence.first, sentence.stop)):
            raise _DamagedError(f"the sentence {sentence.first} to {sentence.stop} is not kept whole")


def _form(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"
