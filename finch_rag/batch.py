"""Several requests, executed together. What they share is read once; prefills and answers go in groups."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from .answer import Answer
from .answering import Begun
from .decode.running import decode_many
from .errors import InputError
from .models.forward import memory_guard
from .models.kept_cache import KeptCache
from .prefill.batched import prefill_batched
from .prefill.planning import PrefillPlan
from .prefill.shared import scan_shared, shares_scan
from .prefill.shortlists import prefill_shortlists
from .prompts.passages import Passage, as_passages
from .quotes.support import finished
from .reading import planned, rank, read_ranked, read_request, remember
from .request import Cancellation, Request
from .resolving import resolve, with_store
from .runtime import Runtime
from .settings import Settings

# Requests whose passages are prefilled, and whose answers are generated, together: their caches are in memory at once.
GROUP = 8


def requests_of(
    runtime: Runtime,
    questions: Iterable[str],
    passages: Iterable[str | Passage] | Iterable[Iterable[str | Passage]],
    settings: Settings,
    cancellation: Cancellation | None = None,
) -> tuple[list[Request], bool]:
    """One request a question, and whether all of them read the same list.

    Args:
        runtime: Resolves them.
        questions: The questions.
        passages: One list for all questions, or one list each.
        settings: Of all of them.
        cancellation: Of all of them.

    Raises:
        InputError: If questions, passages or settings cannot work.
    """
    if isinstance(questions, (str, bytes)) or not isinstance(questions, Iterable):
        kind = "a single text" if isinstance(questions, (str, bytes)) else type(questions).__name__
        raise InputError(f"questions is {kind}: pass a list of questions, or use ask")
    asked = list(questions)
    lists, shared = _lists(passages, len(asked))
    wanted = Cancellation() if cancellation is None else cancellation
    requests: list[Request] = []
    for question, own in zip(asked, lists, strict=True):
        like = requests[0] if shared and requests and own else None
        chosen, own_settings = with_store(runtime, question, own, settings)
        requests.append(resolve(runtime, question, chosen, own_settings, like=like, cancellation=wanted))
    return requests, shared


def answer_together(runtime: Runtime, requests: Sequence[Request], *, shared: bool) -> list[Answer]:
    """Executes requests together.

    Args:
        runtime: The model.
        requests: Any number, with one cancellation.
        shared: Whether all of them read the same list of passages. A long one is then scanned once for all.

    Raises:
        Cancelled: If their cancellation says so.
        NumericsError: If the model computes NaN.
        DeviceMemoryError: If the device runs out of memory.
    """
    if not requests:
        return []
    requests[0].cancellation.check()
    answers: dict[int, Answer] = {}
    with memory_guard(runtime.model, f"{len(requests)} questions"):
        for numbers, read in _readers(runtime, requests, shared):
            for start in range(0, len(numbers), GROUP):
                group = range(start, min(start + GROUP, len(numbers)))
                own = numbers[group.start : group.stop]
                answers |= zip(own, _generate(runtime, [requests[n] for n in own], read(group)), strict=True)
    return [answers[number] for number in range(len(requests))]


def read_together(runtime: Runtime, requests: Sequence[Request]) -> list[KeptCache]:
    """The caches of several requests, whose passages are read side by side.

    Args:
        runtime: The model.
        requests: At least one, with one cancellation; all of one store, or all of none.

    Raises:
        Cancelled: If their cancellation says so.
        NumericsError: If the model computes NaN.
        DeviceMemoryError: If the device runs out of memory.
    """
    caches: dict[int, KeptCache] = {}
    with memory_guard(runtime.model, f"the passages of {len(requests)} questions"):
        for numbers, read in _readers(runtime, requests, shared=False):
            caches |= zip(numbers, read(range(len(numbers))), strict=True)
    return [caches[number] for number in range(len(requests))]


Read = Callable[[range], list[KeptCache]]  # reads for a group of requests


def _readers(runtime: Runtime, requests: Sequence[Request], shared: bool) -> Iterator[tuple[list[int], Read]]:
    """The numbers of the requests that are read in the same way, and what reads a group of them."""
    plans = [planned(runtime, request) for request in requests]
    alone = [n for n, plan in enumerate(plans) if plan.strategy == "independent" and requests[n].passages]
    by_loop = [n for n in range(len(requests)) if n not in set(alone)]
    for numbers, reader in ((alone, _alone_reader), (by_loop, _loop_reader)):
        if numbers:
            yield numbers, reader(runtime, [requests[n] for n in numbers], [plans[n] for n in numbers], shared)


def _alone_reader(runtime: Runtime, requests: Sequence[Request], plans: Sequence[PrefillPlan], shared: bool) -> Read:
    """Each passage of all requests is read now, once."""
    rankings = rank(runtime, requests)

    def read(group: range) -> list[KeptCache]:
        own = slice(group.start, group.stop)
        return read_ranked(runtime, requests[own], plans[own], rankings[own])

    return read


def _loop_reader(runtime: Runtime, requests: Sequence[Request], plans: Sequence[PrefillPlan], shared: bool) -> Read:
    """A long list that all requests share is scanned now."""
    if runtime.no_loop or any(plan.rounds == 2 for plan in plans):
        return lambda group: [read_request(runtime, requests[number]) for number in group]
    lengths = requests[0].passage_tokens
    smallest = min(plan.budget for plan in plans), min(plan.chunk_size for plan in plans)
    plan = replace(plans[0], budget=smallest[0], chunk_size=smallest[1])  # fits each of them
    # A history that outgrows the window is cut differently for questions of different length.
    first = requests[0].prompt
    alike = all((r.prompt.prefix, r.prompt.passages) == (first.prefix, first.passages) for r in requests)
    if shared and alike and shares_scan(plan, lengths, len(requests)):
        return _shared_reader(runtime, requests, plan)
    ends = [0]
    for request in requests:
        ends.append(ends[-1] + sum(request.passage_tokens))

    def read(group: range) -> list[KeptCache]:
        members = [requests[number] for number in group]
        own_plans = [plans[number] for number in group]
        tell = members[0].on_step("prefill")
        start = time.perf_counter()
        prefilled = prefill_batched(
            runtime.model,
            [request.prompt for request in members],
            own_plans,
            runtime.rotation,
            lambda done, total: tell(ends[group.start] + done, ends[-1]),
        )
        seconds = (time.perf_counter() - start) / len(members)
        return [
            remember(runtime, request, own, found, seconds)
            for request, own, found in zip(members, own_plans, prefilled, strict=True)
        ]

    return read


def _shared_reader(runtime: Runtime, requests: Sequence[Request], plan: PrefillPlan) -> Read:
    prompts = [request.prompt for request in requests]
    start = time.perf_counter()
    scan = scan_shared(runtime.model, prompts, plan, requests[0].on_step("prefill"))
    scan_seconds = (time.perf_counter() - start) / len(requests)
    shortlist_plan = replace(plan, chunk_size=scan.steps.chunk_size)  # less where memory ran out

    def read(group: range) -> list[KeptCache]:
        start = time.perf_counter()
        prefilled = prefill_shortlists(
            runtime.model,
            [prompts[number] for number in group],
            list(scan.attention[group.start : group.stop]),
            [shortlist_plan] * len(group),
            runtime.rotation,
        )
        seconds = scan_seconds + (time.perf_counter() - start) / len(group)
        return [
            remember(runtime, requests[number], plan, found._replace(steps=scan.steps), seconds)
            for number, found in zip(group, prefilled, strict=True)
        ]

    return read


def _generate(runtime: Runtime, requests: Sequence[Request], caches: list[KeptCache]) -> list[Answer]:
    writers = [runtime.writer(request.sampling) for request in requests]
    start = time.perf_counter()
    # One by one, so that the room that reading needed is free again.
    begun = [Begun.of(request, caches.pop(0)) for request in requests]
    texts = decode_many(
        runtime.model,
        [each.cache for each in begun],
        [request.answer_prompt for request in requests],
        writers,
        new_tokens=[request.sampling.max_new_tokens for request in requests],
        graphs=runtime.graphs,
        check=requests[0].cancellation.check,
        chunk_size=runtime.prompt_chunk_size,
    )
    seconds = (time.perf_counter() - start) / len(requests)
    written = [each.written(text, writer, seconds) for each, text, writer in zip(begun, texts, writers, strict=True)]
    return finished(runtime, written)


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
