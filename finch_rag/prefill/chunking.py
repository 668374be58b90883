"""Passages -> prefill chunks. Integers only: a chunk is a range of token positions in the document.

The document is the concatenation of all passages' tokens; position ``i`` is the document's ``i``-th token.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate


def plan_chunks(passage_lengths: Sequence[int], chunk_size: int, start: int = 0) -> list[range]:
    """Cuts the document into chunks of at most ``chunk_size`` tokens, whole passages first.

    A passage that does not fit into what is left of a chunk opens the next one, so that its score is made from all
    its tokens at once. Only a passage that is longer than ``chunk_size`` is cut.

    Args:
        passage_lengths: Tokens of each passage, in document order.
        chunk_size: The most tokens that a chunk may have, at least 1.
        start: The document position to begin at; what stands before it has been read.

    Returns:
        Ranges that cover the document from ``start`` to its end without gap or overlap; none is empty.
    """
    chunks: list[range] = []  # and ``start`` is that of the chunk being filled
    for passage_end, length in zip(accumulate(passage_lengths), passage_lengths, strict=True):
        passage_start = passage_end - length
        if passage_end - start > chunk_size and passage_start > start:
            chunks.append(range(start, passage_start))
            start = passage_start
        while passage_end - start > chunk_size:
            chunks.append(range(start, start + chunk_size))
            start += chunk_size
    if (document_end := sum(passage_lengths)) > start:
        chunks.append(range(start, document_end))
    return chunks
