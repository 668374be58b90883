from __future__ import annotations

from itertools import accumulate, pairwise

from hypothesis import given
from hypothesis import strategies as st

from finch_rag.prefill.chunking import plan_chunks

lengths_and_size = st.integers(1, 40).flatmap(
    lambda size: st.tuples(st.lists(st.integers(0, 3 * size), max_size=12), st.just(size))
)


@given(lengths_and_size)
def test_chunks_cover_the_document_in_order_and_none_is_empty(case: tuple[list[int], int]) -> None:
    lengths, size = case
    assert [token for chunk in plan_chunks(lengths, size) for token in chunk] == list(range(sum(lengths)))
    assert all(1 <= len(chunk) <= size for chunk in plan_chunks(lengths, size))


@given(lengths_and_size, st.integers(0, 60))
def test_what_was_read_before_is_left_out(case: tuple[list[int], int], start: int) -> None:
    lengths, size = case
    chunks = plan_chunks(lengths, size, start)
    assert [token for chunk in chunks for token in chunk] == list(range(start, sum(lengths)))
    assert all(1 <= len(chunk) <= size for chunk in chunks)
    if start in (0, *accumulate(lengths)):  # at the start of a passage: nothing was cut
        place = (0, *accumulate(lengths)).index(start)
        rest = plan_chunks(lengths[place:], size)
        assert chunks == [range(start + chunk.start, start + chunk.stop) for chunk in rest]


@given(lengths_and_size)
def test_a_passage_that_fits_into_a_chunk_is_never_cut(case: tuple[list[int], int]) -> None:
    lengths, size = case
    chunks = plan_chunks(lengths, size)
    for end, length in zip(accumulate(lengths), lengths, strict=True):
        if 0 < length <= size:
            assert sum(chunk.start < end and end - length < chunk.stop for chunk in chunks) == 1


@given(lengths_and_size)
def test_a_chunk_ends_only_where_the_next_passage_does_not_fit(case: tuple[list[int], int]) -> None:
    lengths, size = case
    ends = list(accumulate(lengths))
    for chunk, following in pairwise(plan_chunks(lengths, size)):
        passage_end = next(end for end in ends if end > following.start)
        assert passage_end - chunk.start > size


def test_passages_that_fit_share_a_chunk() -> None:
    assert plan_chunks([3, 4, 5, 2], 8) == [range(7), range(7, 14)]


def test_a_passage_larger_than_a_chunk_opens_one_and_is_cut() -> None:
    assert plan_chunks([3, 10, 2], 4) == [range(3), range(3, 7), range(7, 11), range(11, 15)]


def test_no_passages_make_no_chunks() -> None:
    assert plan_chunks([], 8) == []
