from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finch_rag.errors import ModelError, WindowError
from finch_rag.models.inspection import window_of
from finch_rag.prefill import planning
from finch_rag.prefill.planning import FixedTokens, chunk_within, default_chunk_size

FIXED = FixedTokens(prefix=30, question=20, tail=10, new=40)


def fit(
    positions: int,
    fixed: FixedTokens,
    budget: int | None,
    chunk_size: int | None,
    usual: int,
    longest: int = 0,
    document: int = 0,
) -> tuple[int, int]:
    return planning.fit(
        fixed,
        window=positions,
        budget=budget,
        chunk_size=chunk_size,
        usual_chunk_size=usual,
        longest_passage=longest,
        document=document,
    )


def window(**config: Any) -> int:
    return window_of(SimpleNamespace(**{"max_position_embeddings": 4096, **config}))


def test_fixed_tokens_add_up() -> None:
    assert FIXED.total == 100


@pytest.mark.parametrize(
    ("positions", "budget"), [(1024, 256), (4096, 256), (16384, 512), (32768, 1024), (131072, 2048)]
)
def test_the_default_budget_is_a_32nd_of_the_window_within_bounds(positions: int, budget: int) -> None:
    assert fit(positions, FIXED, None, None, 128)[0] == budget


@pytest.mark.parametrize(
    ("positions", "longest", "budget"),
    [(8192, 200, 256), (8192, 1030, 1030), (1024, 800, 462), (131072, 2048, 2048), (8192, 2049, 256)],
)
def test_the_default_budget_has_room_for_any_passage_of_usual_length(positions: int, longest: int, budget: int) -> None:
    assert fit(positions, FIXED, None, None, 128, longest)[0] == budget
    assert fit(positions, FIXED, 77, None, 128, longest)[0] == 77


def test_the_default_budget_leaves_room_for_a_chunk_in_a_small_window() -> None:
    budget, chunk_size = fit(200, FIXED, None, None, 1024)
    assert budget == 50
    assert chunk_size == 200 - 30 - 20 - 50


@pytest.mark.parametrize(
    ("device", "hidden", "expected"),
    [("cpu", 576, 1024), ("cpu", 4096, 1024), ("cuda", 576, 1024), ("cuda", 1536, 4096)],
)
def test_small_models_read_short_chunks_on_any_device(device: str, hidden: int, expected: int) -> None:
    assert default_chunk_size(device, SimpleNamespace(hidden_size=hidden)) == expected


@pytest.mark.parametrize(("gigabytes", "expected"), [(80, 4096), (2.5, 4096), (1.5, 2048), (0.6, 1024), (0.001, 256)])
def test_the_usual_chunk_takes_at_most_half_of_the_free_memory(gigabytes: float, expected: int) -> None:
    shape = {"hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32}
    llama = SimpleNamespace(**shape, num_attention_heads=32, num_key_value_heads=8)
    assert chunk_within(int(gigabytes * 2**30), 4096, llama, 2) == expected


def test_the_default_chunk_size_is_the_devices_where_it_fits() -> None:
    assert fit(8192, FIXED, 512, None, 1024) == (512, 1024)
    assert fit(1024, FIXED, 512, None, 1024) == (512, 1024 - 30 - 20 - 512)


@pytest.mark.parametrize(
    ("document", "longest", "expected"),
    [
        (300, 80, 1024),  # one chunk anyway
        (1400, 100, 1500),  # one chunk of a little more than usual in place of two
        (2100, 100, 1150),  # two in place of two and a tail
        (10_240, 100, 1124),
        (10_240, 5000, 1280),  # long passages cannot come out even
    ],
)
def test_default_chunks_come_out_even(document: int, longest: int, expected: int) -> None:
    assert fit(16384, FIXED, 512, None, 1024, longest, document)[1] == expected
    assert fit(16384, FIXED, 512, 900, 1024, longest, document)[1] == 900


def test_what_is_asked_for_is_taken() -> None:
    assert fit(4096, FIXED, 77, 33, 1024) == (77, 33)


@given(
    st.integers(2, 4096), st.integers(0, 60), st.integers(1, 60), st.integers(0, 20), st.integers(1, 60),
    st.none() | st.integers(1, 5000), st.none() | st.integers(1, 5000),
)  # fmt: skip
def test_what_fits_never_passes_the_window(
    positions: int, prefix: int, question: int, tail: int, new: int, budget: int | None, chunk_size: int | None
) -> None:
    fixed = FixedTokens(prefix, question, tail, new)
    try:
        budget, chunk_size = fit(positions, fixed, budget, chunk_size, 1024)
    except WindowError:
        return
    assert budget >= 1
    assert chunk_size >= 1
    assert prefix + budget + chunk_size + question <= positions  # while reading
    assert fixed.total + budget <= positions  # while answering


def test_a_budget_too_large_names_both_numbers_and_one_that_works() -> None:
    with pytest.raises(WindowError, match=r"900.*\b512\b") as caught:
        fit(512, FIXED, 900, None, 1024)
    cure = int(re.findall(r"budget=(\d+)", str(caught.value))[0])
    assert fit(512, FIXED, cure, None, 1024)[0] == cure
    with pytest.raises(WindowError):
        fit(512, FIXED, cure + 1, None, 1024)


def test_a_chunk_size_too_large_names_both_numbers_and_one_that_works() -> None:
    with pytest.raises(WindowError, match=r"500.*\b512\b") as caught:
        fit(512, FIXED, 100, 500, 1024)
    cure = int(re.findall(r"chunk_size=(\d+)", str(caught.value))[0])
    assert fit(512, FIXED, 100, cure, 1024) == (100, cure)
    with pytest.raises(WindowError):
        fit(512, FIXED, 100, cure + 1, 1024)


def test_a_question_too_long_names_the_numbers_and_a_cure_that_works() -> None:
    with pytest.raises(WindowError, match=r"30.*\b30\b.*\b40\b.*\b100\b.*max_new_tokens"):
        fit(100, FIXED, None, None, 1024)
    assert fit(100, FixedTokens(30, 20, 10, new=30), None, None, 1024) == (5, 45)
    with pytest.raises(WindowError, match=r"60 tokens.*\b30\b.*\b90\b: shorten them$") as caught:
        fit(90, FixedTokens(30, 50, 10, new=0), None, None, 1024)
    assert "answer" not in str(caught.value)


@pytest.mark.parametrize(("budget", "chunk_size"), [(0, None), (-3, None), (8, 0), (8, -1)])
def test_sizes_below_one_are_refused(budget: int, chunk_size: int | None) -> None:
    with pytest.raises(WindowError, match=r"least is 1"):
        fit(512, FIXED, budget, chunk_size, 1024)


def test_the_window_is_the_trained_one() -> None:
    assert window() == 4096
    assert window(sliding_window=None) == 4096
    assert window(rope_parameters={"rope_type": "yarn", "original_max_position_embeddings": 1024}) == 4096


def test_a_sliding_window_bounds_the_window() -> None:
    assert window(sliding_window=1024) == 1024
    assert window(sliding_window=8192) == 4096


@pytest.mark.parametrize(
    ("kind", "size"), [("sliding_attention", "sliding_window"), ("chunked_attention", "attention_chunk_size")]
)
def test_layers_that_see_a_part_beside_others_are_stayed_below_on_request(kind: str, size: str) -> None:
    config = SimpleNamespace(max_position_embeddings=4096, layer_types=["full_attention", kind], model_type="small")
    assert window_of(SimpleNamespace(**vars(config), **{size: 4096})) == 4096
    assert window_of(SimpleNamespace(**vars(config), **{size: 2048}), held=True) == 2048
    with pytest.raises(ModelError, match=r'see 2048 of 4096 tokens only; one made with strategy="loop" stays below'):
        window_of(SimpleNamespace(**vars(config), **{size: 2048}))
    with pytest.raises(ModelError, match=r"layers of small see 1024 of 4096 tokens only; the loop's cache needs 2048"):
        window_of(SimpleNamespace(**vars(config), **{size: 1024}), held=True)


def test_a_sliding_window_that_no_layer_uses_does_not() -> None:
    assert window(sliding_window=1024, use_sliding_window=False) == 4096
    assert window(sliding_window=1024, layer_types=["full_attention"]) == 4096


def test_long_rope_stays_below_its_switch_of_frequencies() -> None:
    assert window(rope_parameters={"rope_type": "longrope", "original_max_position_embeddings": 1024}) == 1024
