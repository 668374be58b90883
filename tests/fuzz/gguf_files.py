"""GGUF files: a model loads, or one line says why not; no count in a header is believed."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

import gguf
import numpy as np

from finch_rag.models.loading import load_model

from .support import Choices, holds, only

_WORDS, _WIDTH = 14, 8


@cache
def _file() -> Path:
    return Path(tempfile.mkdtemp(prefix="finch-fuzz-")) / "small.gguf"


def seeds() -> list[bytes]:
    """A tiny model, whole and cut."""
    whole = _model()
    return [whole, whole[: len(whole) // 2], whole[:200], whole[:24]]


@cache
def _model() -> bytes:
    file = _file().with_name("whole.gguf")
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(32)
    writer.add_embedding_length(_WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(_WIDTH)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(4)
    writer.add_vocab_size(_WORDS)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    words = ["<|end|>", *"abcdefgh", "ab", "cd", "abcd", "ef", "gh"]
    writer.add_token_list(words)
    writer.add_token_types([3, *[1] * (_WORDS - 1)])
    writer.add_token_merges(["a b", "c d", "ab cd", "e f", "g h"])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(0)
    rng = np.random.default_rng(0)

    def add(name: str, *shape: int) -> None:
        writer.add_tensor(name, rng.standard_normal(shape, dtype=np.float32))

    add("token_embd.weight", _WORDS, _WIDTH)
    add("output_norm.weight", _WIDTH)
    for name, shape in (
        ("attn_norm", (_WIDTH,)),
        ("attn_q", (_WIDTH, _WIDTH)),
        ("attn_k", (_WIDTH // 2, _WIDTH)),
        ("attn_v", (_WIDTH // 2, _WIDTH)),
        ("attn_output", (_WIDTH, _WIDTH)),
        ("ffn_norm", (_WIDTH,)),
        ("ffn_gate", (_WIDTH, _WIDTH)),
        ("ffn_up", (_WIDTH, _WIDTH)),
        ("ffn_down", (_WIDTH, _WIDTH)),
    ):
        add(f"blk.0.{name}.weight", *shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    load_model(file, dtype="float32", device="cpu")  # imports what it needs, which takes seconds
    return file.read_bytes()


def check(data: bytes) -> None:
    """A file's bytes."""
    _model()
    _file().write_bytes(Choices(data).rest())
    with only():
        loaded = load_model(_file(), dtype="float32", device="cpu")
        holds(len(loaded.tokenizer) > 0, "no tokenizer")
