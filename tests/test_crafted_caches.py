"""Saved caches that somebody has changed: every one is refused in one line, also where its checksum is right again."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from finch_rag.engine import Finch
from finch_rag.errors import InputError
from finch_rag.models import saved_cache
from finch_rag.models.cache import CompressedCache

from .crafted import DEEP, Change, Opened, opened, with_header, written
from .small import small_finch, texts

QUESTION = "When was the lighthouse built?"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("good") / "cache"
    small_finch().compress(QUESTION, texts(8)).save(file)
    return file


def refused(file: Path) -> str:
    """The line with which a file is refused."""
    with pytest.raises(InputError) as caught:
        CompressedCache.load(file)
    line = str(caught.value)
    assert "\n" not in line
    assert len(line) < 600
    assert str(file) in line
    return line


def set_tensor(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda content: content.tensors.update({name: make(content.tensors[name])})


def everywhere(make: Callable[[torch.Tensor], torch.Tensor], *kinds: str) -> Change:
    def change(content: Opened) -> None:
        for name, tensor in content.tensors.items():
            if name.startswith(kinds or ("keys", "values")):
                content.tensors[name] = make(tensor)

    return change


def drop(name: str) -> Change:
    return lambda content: content.tensors.pop(name)


def put(place: tuple[int, ...], value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def make(tensor: torch.Tensor) -> torch.Tensor:
        tensor[place] = value
        return tensor

    return make


def metadata(name: str, value: str | None) -> Change:
    if value is None:
        return lambda content: content.metadata.pop(name)
    return lambda content: content.metadata.update({name: value})


def document(change: Callable[[dict[str, Any]], Any]) -> Change:
    def of_content(content: Opened) -> None:
        fields = json.loads(content.metadata["document"])
        change(fields)
        content.metadata["document"] = json.dumps(fields)

    return of_content


def field(name: str, value: Any) -> Change:
    return document(lambda fields: fields.update({name: value}))


def first_of(name: str, value: Any) -> Change:
    return document(lambda fields: fields[name].__setitem__(0, value))


def figure(name: str, value: Any) -> Change:
    return document(lambda fields: fields["figures"].update({name: value}))


def sentence(**changes: Any) -> Change:
    return document(lambda fields: fields["sentences"][0].update(changes))


def without_last(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[:, :, :-1]


def crafted() -> Iterator[tuple[str, Change]]:
    """Changes of a file whose checksum is made right again afterwards."""
    value: Any
    for layer in (0, 1):
        for kind in ("keys", "values"):
            name = f"{kind}.{layer}"
            yield f"{name} dropped", drop(name)
            yield f"{name} of batch 0", set_tensor(name, lambda tensor: tensor[:0])
            yield f"{name} of batch 2", set_tensor(name, lambda tensor: torch.cat((tensor, tensor)))
            yield f"{name} shorter", set_tensor(name, without_last)
            yield f"{name} one token", set_tensor(name, lambda tensor: tensor[:, :, :1])
            yield f"{name} of one head", set_tensor(name, lambda tensor: tensor[:, :1])
            yield f"{name} of rank 3", set_tensor(name, lambda tensor: tensor[0])
            yield f"{name} of rank 0", set_tensor(name, lambda tensor: tensor.flatten()[0])
            yield f"{name} in int64", set_tensor(name, lambda tensor: tensor.long())
            yield f"{name} in another float", set_tensor(name, lambda tensor: tensor.half())
            yield f"{name} NaN", set_tensor(name, put((0, 1, 3, 5), float("nan")))
            yield f"{name} inf", set_tensor(name, put((0, 1, 3, 5), float("-inf")))
    yield "keys of another width", set_tensor("keys.1", lambda tensor: tensor[..., :-1])
    yield "no layer", lambda content: [content.tensors.pop(name) for name in list(content.tensors) if name != "kept"]
    yield "a layer more", lambda content: content.tensors.update({"keys.7": content.tensors["keys.0"].clone()})
    yield (
        "a layer by another name",
        lambda content: content.tensors.update(
            {"keys.01": content.tensors.pop("keys.1"), "values.01": content.tensors.pop("values.1")}
        ),
    )
    yield "a foreign tensor", lambda content: content.tensors.update({"weight": torch.ones(3)})
    for dtype in (torch.bool, torch.uint8, torch.complex64, torch.float8_e4m3fn):
        yield f"all in {dtype}", everywhere(lambda tensor, dtype=dtype: tensor.to(dtype))  # type: ignore[misc]
    yield "all shorter", everywhere(without_last)
    yield "no tokens", everywhere(lambda tensor: tensor[:, :, :0])
    yield "no heads", everywhere(lambda tensor: tensor[:, :0])
    yield "no width", everywhere(lambda tensor: tensor[..., :0])
    yield "kept dropped", drop("kept")
    yield "kept in float", set_tensor("kept", lambda kept: kept.float())
    yield "kept in int32", set_tensor("kept", lambda kept: kept.int())
    yield "kept of rank 1", set_tensor("kept", lambda kept: kept[0])
    yield "kept of rank 3", set_tensor("kept", lambda kept: kept[None])
    yield "kept of no layer", set_tensor("kept", lambda kept: kept[:0])
    yield "kept of three layers", set_tensor("kept", lambda kept: kept[:1].expand(3, -1))
    yield "kept shorter", set_tensor("kept", lambda kept: kept[:, 1:])
    yield "kept longer", set_tensor("kept", lambda kept: torch.cat((kept, kept[:, -1:] + 1), 1))
    yield "kept backwards", set_tensor("kept", lambda kept: kept.flip(1))
    yield "kept twice", set_tensor("kept", lambda kept: torch.cat((kept[:, :1], kept[:, :-1]), 1))
    yield "kept with two that changed places", set_tensor("kept", lambda kept: kept[:, [1, 0, *range(2, 60)]])
    yield "kept below 0", set_tensor("kept", put((0, 0), -1))
    yield "kept beyond the document", set_tensor("kept", put((0, -1), 10_000))
    yield "kept beyond all numbers", set_tensor("kept", put((0, -1), 2**62))
    for value in ("-1", "100000", "9" * 5000, "1e3", "", "many", "3.0", " 3", "٣", "0", None):
        yield f"prefix {str(value)[:8]!r}", metadata("prefix", value)
    for value in ("", "{", "[]", "7", "null", '"text"', "NaN", "{}", DEEP, '{"figures": ' + DEEP + "}", None):
        yield f"document {str(value)[:20]!r}", metadata("document", value)
    for depth in (300, 900, 980):
        yield f"titles {depth} deep", metadata("document", '{"titles": ' + "[" * depth + "]" * depth + "}")
    yield "document huge", metadata("document", "[" + "0," * 2_000_000 + "0]")
    yield "document with a huge number", first_of("passage_tokens", 10**400)
    for name in ("passage_ids", "titles", "passage_tokens", "shares", "figures"):
        yield f"no {name}", document(lambda fields, name=name: fields.pop(name))  # type: ignore[misc]
        yield f"{name} text", field(name, "text")
        yield (
            f"{name} shorter",
            document(
                lambda fields, name=name: fields.update({name: list(fields[name])[1:]})  # type: ignore[misc]
            ),
        )
    for value in (-1, 1.5, "3", None, True, 2**40, [3]):
        yield f"passage_tokens {value!r}", first_of("passage_tokens", value)
    for value in (-0.5, "1", None, float("nan"), float("inf"), [0.5], True):
        yield f"shares {value!r}", first_of("shares", value)
    yield "fewer tokens than kept", field("passage_tokens", [1] * 8)
    yield "an id that is a number", first_of("passage_ids", 5)
    yield "a title that is a list", first_of("titles", ["x"])
    yield "a title of half a surrogate pair", first_of("titles", "\ud800")
    yield "a question of half a surrogate pair", field("question", "\ud800")
    for value in (5, None, ["x"]):
        yield f"question {value!r}", field("question", value)
        yield f"model {value!r}", field("model", value)
    for value in (-1, 9, "1", 10**30, True):
        yield f"older_turns {value!r}", field("older_turns", value)
    yield "a field more", field("colour", 1)
    for name in ("budget", "chunks", "rounds", "known_tokens"):
        for value in (-1, "many", 1.5):
            yield f"{name} {value!r}", figure(name, value)
    for value in (-1.0, float("nan"), "x", None):
        yield f"prefill_seconds {value!r}", figure("prefill_seconds", value)
    for value in ([[1]], [["a", "b"]], "heads", [[-1, 0]], [[1.5, 0]], [[float("inf"), 0]], 5, [5]):
        yield f"heads {value!r}", figure("heads", value)
    yield "a figure more", figure("colour", 1)
    yield "reread a number", figure("reread", 1)
    yield "strategy a list", figure("strategy", [])
    for value in (5, {}, "text", [5], [None], [{}]):
        yield f"sentences {value!r}", field("sentences", value)
    yield "sentence of no passage", sentence(passage=99)
    yield "sentence that ends before it starts", sentence(start=9, end=3)
    yield "sentence before the document", sentence(first=-1)
    yield "sentence of no tokens", sentence(stop=0)
    yield "sentence of all tokens", sentence(first=0, stop=2**40)
    yield "sentence with text that is none", sentence(text=5)
    yield "sentence with a field more", sentence(colour=1)
    yield (
        "sentence that is not kept",
        document(lambda fields: fields["sentences"][0].update(first=0, stop=sum(fields["passage_tokens"]))),
    )


CRAFTED = dict(crafted())


@pytest.mark.parametrize("name", CRAFTED)
def test_a_crafted_cache_with_a_right_checksum_is_refused_in_one_line(good: Path, tmp_path: Path, name: str) -> None:
    content = opened(good)
    CRAFTED[name](content)
    written(tmp_path / "cache", Opened(content.tensors, saved_cache.sealed(content.tensors, content.metadata)))
    refused(tmp_path / "cache")


@pytest.mark.parametrize("name", [name for name in CRAFTED if len(name) < 30][::3])
def test_a_crafted_cache_is_refused_in_one_line(good: Path, tmp_path: Path, name: str) -> None:
    content = opened(good)
    CRAFTED[name](content)
    written(tmp_path / "cache", content)
    refused(tmp_path / "cache")


def test_what_is_put_together_again_is_taken(good: Path, tmp_path: Path) -> None:
    content = opened(good)
    written(tmp_path / "cache", Opened(content.tensors, saved_cache.sealed(content.tensors, content.metadata)))
    assert CompressedCache.load(tmp_path / "cache").document.question == QUESTION


BROKEN: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "text": lambda content: b"Once upon a time there was a cache.\n" * 99,
    "zeros": lambda content: bytes(len(content)),
    "header as long as all numbers": lambda content: struct.pack("<Q", 2**64 - 1) + content[8:],
    "header longer than the file": lambda content: struct.pack("<Q", len(content) * 2) + content[8:],
    "header of no length": lambda content: struct.pack("<Q", 0) + content[8:],
    "header of 90 MB": lambda content: struct.pack("<Q", 90_000_000) + b" " * 90_000_000 + content[8:],
    "header that is deep": lambda content: struct.pack("<Q", 2 * len(DEEP)) + (DEEP * 2).encode() + content,
    "twice": lambda content: content * 2,
    "a byte more": lambda content: content + b"x",
    "tensors that overlap": lambda content: with_header(
        content, lambda header: header["keys.0"].update(data_offsets=header["keys.1"]["data_offsets"])
    ),
    "tensors beyond the end": lambda content: with_header(
        content, lambda header: header["keys.0"].update(data_offsets=[0, 2**60])
    ),
    "shapes beyond all numbers": lambda content: with_header(
        content, lambda header: header["keys.0"].update(shape=[2**33, 2**33, 2, 2])
    ),
    "negative shapes": lambda content: with_header(content, lambda header: header["keys.0"].update(shape=[-1, 2])),
    "metadata that is no text": lambda content: with_header(
        content, lambda header: header["__metadata__"].update(prefix=5)
    ),
    "no metadata": lambda content: with_header(content, lambda header: header.pop("__metadata__")),
    "an unknown dtype": lambda content: with_header(content, lambda header: header["keys.0"].update(dtype="F33")),
    **{f"cut at {n}/10": lambda content, n=n: content[: len(content) * n // 10] for n in range(1, 10)},  # type: ignore[misc]
    "without the last byte": lambda content: content[:-1],
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_refused_in_one_line(good: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "cache").write_bytes(BROKEN[name](good.read_bytes()))
    refused(tmp_path / "cache")


def test_any_byte_that_has_changed_is_found(good: Path, tmp_path: Path) -> None:
    whole = good.read_bytes()
    for place in [*range(0, 1024, 61), *range(1024, len(whole), len(whole) // 120), len(whole) - 1]:
        content = bytearray(whole)
        content[place] ^= 1 << place % 8
        (tmp_path / "cache").write_bytes(content)
        refused(tmp_path / "cache")


@pytest.mark.parametrize("kind", ["folder", "missing", "pipe"])
def test_what_is_no_file_is_refused_in_one_line(tmp_path: Path, kind: str) -> None:
    if kind == "folder":
        (tmp_path / "cache").mkdir()
    elif kind == "pipe":
        os.mkfifo(tmp_path / "cache")
    refused(tmp_path / "cache")


FOREIGN: dict[str, Change] = {
    "a layer less": lambda content: [content.tensors.pop(name) for name in ("keys.1", "values.1")],
    "a layer more": lambda content: content.tensors.update(
        {name: content.tensors["keys.0"].clone() for name in ("keys.2", "values.2")}
    ),
    "one head": everywhere(lambda tensor: tensor[:, :1]),
    "three heads": everywhere(lambda tensor: torch.cat((tensor, tensor[:, :1]), 1)),
    "keys of another width": everywhere(lambda tensor: tensor[..., :8], "keys"),
    "values of another width": everywhere(lambda tensor: tensor[..., :8], "values"),
    "all of another width": everywhere(lambda tensor: torch.cat((tensor, tensor), -1)),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_cache_of_another_shape_than_the_models_is_refused_in_one_line(
    finch: Finch, good: Path, tmp_path: Path, name: str
) -> None:
    content = opened(good)
    FOREIGN[name](content)
    written(tmp_path / "cache", Opened(content.tensors, saved_cache.sealed(content.tensors, content.metadata)))
    cache = CompressedCache.load(tmp_path / "cache")
    with pytest.raises(InputError, match="compress the passages again") as caught:
        finch.ask_cached(cache)
    assert "\n" not in str(caught.value)
