"""Headers of GGUF files that count more than the file holds: none is believed."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from finch_rag.errors import ModelError
from finch_rag.models.gguf_header import check_gguf

NUMBER, TEXT, LIST = 4, 8, 9


def text(value: str, order: str = "<") -> bytes:
    return struct.pack(f"{order}Q", len(value)) + value.encode()


def header(*fields: bytes, tensors: int = 0, count: int | None = None, order: str = "<", version: int = 3) -> bytes:
    """A header with fields, and tensors of nothing but zeros behind it."""
    counts = struct.pack(f"{order}IQQ", version, tensors, len(fields) if count is None else count)
    return b"GGUF" + counts + b"".join(fields) + bytes(32 * tensors)


def number(key: str, value: int, order: str = "<") -> bytes:
    return text(key, order) + struct.pack(f"{order}II", NUMBER, value)


def named(architecture: str, order: str = "<") -> bytes:
    return text("general.architecture", order) + struct.pack(f"{order}I", TEXT) + text(architecture, order)


def listed(key: str, kind: int, items: int, content: bytes = b"") -> bytes:
    return text(key) + struct.pack("<IIQ", LIST, kind, items) + content


def refusal(folder: Path, content: bytes) -> str:
    file = folder / "x.gguf"
    file.write_bytes(content)
    with pytest.raises(ModelError, match=r"x\.gguf is damaged: .*download it again") as caught:
        check_gguf(file)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("version", [2, 3])
def test_a_header_that_can_be_passes(tmp_path: Path, order: str, version: int) -> None:
    fields = [named("llama", order), number("llama.block_count", 2, order), number("llama.embedding_length", 64, order)]
    (tmp_path / "x").write_bytes(header(*fields, tensors=2, order=order, version=version))
    check_gguf(tmp_path / "x")


def test_lists_are_passed_over(tmp_path: Path) -> None:
    words = listed("words", TEXT, 3, text("a") + text("") + text("bcd"))
    deep = listed("deep", LIST, 1, struct.pack("<IQ", NUMBER, 2) + bytes(8))
    (tmp_path / "x").write_bytes(
        header(words, listed("kinds", NUMBER, 2, bytes(8)), deep, number("block_count", 1), tensors=1)
    )
    check_gguf(tmp_path / "x")
    assert "block_count is 2" in refusal(tmp_path, header(words, deep, number("a.block_count", 2), tensors=1))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (header(number("llama.block_count", 637534209), tensors=11), "block_count is 637534209, its 11 tensors"),
        (header(number("llama.embedding_length", 2**31)), "embedding_length is 2147483648"),
        (header(count=2**60), "1152921504606846976 metadata fields"),
        (header(tensors=0)[:8] + struct.pack("<QQ", 2**61, 0), "2305843009213693952 tensors"),
        (header(listed("a", NUMBER, 2**60)), "bytes of a list"),
        (header(listed("a", TEXT, 2**60)), "items of a list"),
        (header(listed("a", TEXT, 2, text("x") + struct.pack("<Q", 2**40)), number("b", 1)), "a word of a list ends"),
        (header(text("a") + struct.pack("<IQ", TEXT, 2**62)), "bytes of text"),
        (header(text("a") + struct.pack("<II", 13, 0)), "a value of type 13"),
        (header(listed("a", LIST, 1, struct.pack("<IQ", LIST, 1) * 9 + bytes(99))), "deeper than 4"),
        (header(named("llama"), number("lxama.block_count", 1), tensors=1), "it has no 'llama'.block_count"),
        (header(number("a", 1), number("b", 1))[:-2], "cut inside its header"),
    ],
)
def test_a_header_that_cannot_be_is_one_line(tmp_path: Path, content: bytes, reason: str) -> None:
    assert reason in refusal(tmp_path, content)


def test_a_model_in_several_files_is_left_to_what_reads_it(tmp_path: Path) -> None:
    parts = text("split.count") + struct.pack("<IH", 2, 3)
    (tmp_path / "x").write_bytes(header(number("llama.block_count", 80), parts))
    check_gguf(tmp_path / "x")


@pytest.mark.parametrize("content", [b"", b"GGUF", bytes(64), header(version=7), header(version=0)])
def test_what_is_no_gguf_is_left_to_what_reads_it(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    check_gguf(tmp_path / "x")
