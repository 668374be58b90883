"""Safetensors files taken apart, changed and put together again, also as an attacker would who knows the checksum."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

DEEP = "[" * 100_000 + "]" * 100_000


class Opened(NamedTuple):
    """What a safetensors file holds; both may be changed in place.

    Attributes:
        tensors: By name.
        metadata: By name.
    """

    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str]


Change = Callable[[Opened], Any]


def opened(file: Path) -> Opened:
    """A file's content."""
    with safe_open(str(file), framework="pt") as content:
        metadata = dict(content.metadata() or {})
    return Opened({name: tensor.clone() for name, tensor in load_file(str(file)).items()}, metadata)


def written(file: Path, content: Opened) -> None:
    """Writes it to a file."""
    save_file({name: tensor.contiguous() for name, tensor in content.tensors.items()}, str(file), content.metadata)


def with_header(content: bytes, change: Callable[[dict[str, Any]], Any]) -> bytes:
    """A file's bytes with another header; the tensors' bytes stay where they are."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + length :]
