"""Ids that no two passages share: a citation names a passage by its id, and a store knows it by that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..prompts.passages import Passage
from .files import shown


def with_own_ids(passages: Sequence[Passage]) -> tuple[list[Passage], list[str], frozenset[str]]:
    """Passages of which each has an id of its own, what to tell the user, and the ids that several had.

    A passage that was there before, with the same id, title and text, is left out. One that has the id of another one
    gets a number behind it: ID.2, ID.3 ..., the next that is free.

    Args:
        passages: All of a corpus, in their order; each has an id.
    """
    taken = {passage.id for passage in passages}
    last: dict[str | None, int] = {}  # numbers that ids have got
    there: set[tuple[str | None, str | None, str]] = set()
    kept: list[Passage] = []
    repeated: list[str | None] = []
    renamed: list[str | None] = []
    for passage in passages:
        own = passage.id
        if (known := (own, passage.title, passage.text)) in there:
            repeated.append(own)
            continue
        there.add(known)
        if own in last:
            renamed.append(own)
            while (new := f"{own}.{last[own] + 1}") in taken:
                last[own] += 1
            taken.add(new)
            passage = replace(passage, id=new)
        last[own] = last.get(own, 0) + 1
        kept.append(passage)
    warnings = []
    if repeated:
        what = _counted(repeated, "stands", "stand")
        warnings.append(f"{what} more than once, such as {_shown(repeated)}: each is read once")
    if renamed:
        what = _counted(renamed, "has", "have")
        warnings.append(
            f"{what} the id of another one, such as {_shown(renamed)}: the later ones are called ID.2, ID.3 ..."
        )
    return kept, warnings, frozenset(map(str, renamed))


def _counted(ids: Sequence[str | None], one: str, many: str) -> str:
    return f"1 passage {one}" if len(ids) == 1 else f"{len(ids):,} passages {many}"


def _shown(ids: Sequence[str | None]) -> str:
    return f"'{shown(str(ids[0]))}'"
