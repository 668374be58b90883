"""Answers to several questions, in groups that are read and answered together."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .decode import decode_many
from .errors import InputError
from .options import sampling_of
from .prefill_many import prefill_many, prefill_shared, shares_reading
from .prompt import Passage, as_passages
from .reading import Reading
from .report import Answer, citations, report

if TYPE_CHECKING:
    from .cache import CompressedCache
    from .decode import Sampling
    from .engine import Finch

# Questions that are read and answered together. A group's caches are in memory at once.
_GROUP = 8


def answer_many(
    finch: Finch,
    questions: Iterable[str],
    passages: Iterable[str | Passage] | Iterable[Iterable[str | Passage]],
    options: Mapping[str, Any],
) -> list[Answer]:
    """See `finch_rag.Finch.ask_many`."""
    sampling = sampling_of(options, finch.max_new_tokens)
    asked = _listed(questions)
    lists, shared = _lists(passages, len(asked))
    readings: list[Reading] = []
    for question, its in zip(asked, lists, strict=True):
        like = readings[0] if shared and readings else None
        readings.append(Reading(finch, question, its, sampling.max_new_tokens, options, like=like))
    answers: list[Answer] = []
    for start in range(0, len(readings), _GROUP):
        group = readings[start : start + _GROUP]
        answers += _write(finch, group, _read(finch, group, shared), sampling)
    return answers


def _read(finch: Finch, readings: Sequence[Reading], shared: bool) -> list[CompressedCache]:
    plans = [reading.plan for reading in readings]
    prompts = [reading.prompt for reading in readings]
    least = replace(plans[0], chunk_size=min(plan.chunk_size for plan in plans), budget=min(p.budget for p in plans))
    start = time.perf_counter()
    if shared and shares_reading(least, [len(its) for its in prompts[0].passages], len(readings)):
        read = prefill_shared(finch.model, prompts, least, finch.rotation, readings[0].on_progress)
    else:
        read = prefill_many(finch.model, prompts, plans, finch.rotation, readings[0].on_progress)
    seconds = (time.perf_counter() - start) / len(readings)
    return [reading.finish(its, seconds) for reading, its in zip(readings, read, strict=True)]


def _write(
    finch: Finch, readings: Sequence[Reading], caches: list[CompressedCache], sampling: Sampling
) -> Iterator[Answer]:
    prompts = [reading.answer_prompt for reading in readings]
    cited = [citations(cache, kept_only=True) for cache in caches]
    reports = [report(cache, len(prompt)) for cache, prompt in zip(caches, prompts, strict=True)]
    writers = [finch.writer(sampling) for _ in readings]
    start = time.perf_counter()
    for number, prompt in enumerate(prompts):  # one by one, so that the room that reading needed is free again
        caches[number] = caches[number].fork(len(prompt) + sampling.max_new_tokens)
    texts = decode_many(finch.model, caches, prompts, writers, sampling.max_new_tokens, finch.step_graphs)
    seconds = (time.perf_counter() - start) / len(readings)
    for text, its, read, writer in zip(texts, cited, reports, writers, strict=True):
        new, reason = len(writer.token_ids), writer.stop_reason
        yield Answer(text, its, replace(read, decode_seconds=seconds, new_tokens=new, stop_reason=reason))


def _listed(questions: Iterable[str]) -> list[str]:
    if isinstance(questions, str):
        raise InputError("questions is a single text: pass a list of questions, or use ask")
    return list(questions)


def _lists(
    passages: Iterable[str | Passage] | Iterable[Iterable[str | Passage]], questions: int
) -> tuple[list[list[Passage]], bool]:
    """One checked list a question, and whether all of them are the same one."""
    if isinstance(passages, (str, Passage)) or not isinstance(passages, Iterable):
        as_passages(passages)  # raises
    items: list[Any] = list(passages)
    texts = [isinstance(item, (str, Passage)) for item in items]
    if all(texts):
        return [as_passages(items)] * questions, True
    if any(texts):
        wrong = texts.index(not texts[0])
        raise InputError(
            f"passages mixes texts and lists (at {wrong}): pass one list for all questions, or a list each"
        )
    if len(items) != questions:
        raise InputError(
            f"{questions} questions and {len(items)} lists of passages: pass one list for all, or a list each"
        )
    return [as_passages(item) for item in items], False
