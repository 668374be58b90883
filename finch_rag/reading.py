"""From a request to the cache that it is answered from: by the loop, each passage alone, or from a store."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch

from .errors import InputError
from .models.cached_document import CachedDocument, ReadingFigures
from .models.finite import check_finite
from .models.forward import memory_guard
from .models.inspection import input_embedding
from .models.kept_cache import KeptCache
from .prefill.alone import NEUTRAL, Asked
from .prefill.independent import AloneQuestion, rank_independently
from .prefill.loop import prefill
from .prefill.planning import PrefillPlan
from .prefill.prior import weighted
from .prefill.scan import Prefilled, Steps
from .prefill.shortlists import prefill_best, prefill_shortlists, shortlist_tokens
from .prefill.sources import cutoff_behind_sources, has_one_source
from .request import Request
from .runtime import Runtime
from .store.store import PassageStore


@dataclass(frozen=True, slots=True)
class Ranking:
    """What ranks a request's passages before any of them is read for the answer.

    Attributes:
        attention: What the question pays to each, on the CPU, float32, shape [passages].
        steps: Of the reading that it took.
        seconds: That it took.
        figures: What else `ReadingFigures` has.
    """

    attention: torch.Tensor
    steps: Steps
    seconds: float
    figures: dict[str, Any] = field(default_factory=dict)


def planned(runtime: Runtime, request: Request) -> PrefillPlan:
    """How a request's passages are read, with the heads that rank them; finds them if need be.

    Args:
        runtime: Reads them.
        request: One that reads passages.
    """
    if request.plan is None:
        raise InputError("the request has no passages to read: it answers from a cache")
    if request.plan.selection == "token" or not request.passages:
        return request.plan
    if request.store is not None:
        return replace(request.plan, heads=request.store.heads_by_layer)
    if request.plan.strategy == "independent":
        return replace(request.plan, heads=runtime.alone_reader(request.on_progress, request.cancellation).heads)
    return replace(request.plan, heads=runtime.retrieval_heads(request.on_progress, request.cancellation))


def read_request(runtime: Runtime, request: Request, *, ahead: bool = False) -> KeptCache:
    """Reads the passages of a request into a cache that remembers them for citations and report.

    Args:
        runtime: Reads them.
        request: One that reads passages.
        ahead: Whether the caller's next pass takes along what the cache may then have as ``unread``.

    Raises:
        NumericsError: If the model computes NaN.
        DeviceMemoryError: If the device runs out of memory.
    """
    request.cancellation.check()
    with memory_guard(runtime.model, f"the {sum(request.passage_tokens)} tokens of the passages"):
        return _read(runtime, request, ahead=ahead)


def _read(runtime: Runtime, request: Request, *, ahead: bool) -> KeptCache:
    plan = planned(runtime, request)
    if plan.strategy == "independent" and request.passages:
        rankings = rank(runtime, [request])
        return read_ranked(runtime, [request], [plan], rankings, ahead=ahead)[0]
    start = time.perf_counter()
    if _scans_twice(request, plan):
        return _scanned_twice(runtime, request, plan, ahead=ahead)
    if runtime.no_loop:  # there is nothing to rank
        nothing = torch.zeros(len(request.passages))
        found = prefill_best(runtime.model, [request.prompt], [nothing], [plan], ahead=ahead)[0]
        return remember(runtime, request, plan, found, time.perf_counter() - start)
    prefilled = prefill(runtime.model, request.prompt, plan, runtime.rotation, request.on_step("prefill"), ahead=ahead)
    return remember(runtime, request, plan, prefilled, time.perf_counter() - start)


def _scans_twice(request: Request, plan: PrefillPlan) -> bool:
    """Whether the loop is to scan the best passages of its first scan once more."""
    most = request.shortlist_tokens or shortlist_tokens(plan.budget)
    return plan.rounds == 2 and not plan.ranks_only and sum(request.passage_tokens) > most


def _scanned_twice(runtime: Runtime, request: Request, plan: PrefillPlan, *, ahead: bool) -> KeptCache:
    """The cache of a request whose passages the loop ranks, and then the best of them once more."""
    start, prompt = time.perf_counter(), request.prompt
    first = replace(plan, ranks_only=True)
    ranked = prefill(runtime.model, prompt, first, runtime.rotation, request.on_step("prefill"))
    tokens = None if request.shortlist_tokens is None else [request.shortlist_tokens]
    [found] = prefill_shortlists(
        runtime.model, [prompt], [ranked.attention.cpu()], [plan], runtime.rotation, tokens, ahead=ahead
    )
    found = found._replace(steps=ranked.steps)
    return remember(runtime, request, plan, found, time.perf_counter() - start, rounds=2)


def rank(runtime: Runtime, requests: Sequence[Request]) -> list[Ranking]:
    """What ranks the passages of requests: each is read alone, once for all of them, or is known to their store.

    Args:
        runtime: Reads them.
        requests: All of one store, or all of none.

    Raises:
        DeviceMemoryError: If the device has no memory for a single passage.
    """
    store = requests[0].store
    if store is not None:
        # What one request adds to a store that is full takes the place of what another one has added.
        together = [requests] if store.max_bytes is None else [[request] for request in requests]
        return [ranking for some in together for ranking in _rank_by_store(store, some)]
    start = time.perf_counter()
    questions = [
        AloneQuestion(Asked(request.prompt.question, request.prompt.own_tokens), request.prompt.passages)
        for request in requests
    ]
    reader = runtime.alone_reader(requests[0].on_progress, requests[0].cancellation)
    neutral = Asked.by(runtime.prompts, NEUTRAL)
    attention, steps = rank_independently(reader, questions, neutral, requests[0].on_step("prefill"))
    seconds = (time.perf_counter() - start) / len(requests)
    return [
        Ranking(weighted(paid, request.ranks), steps, seconds)
        for paid, request in zip(attention, requests, strict=True)
    ]


def _rank_by_store(store: PassageStore, requests: Sequence[Request]) -> list[Ranking]:
    """The store reads the passages that it does not know. Those of a request that it has searched are ranked."""
    start = time.perf_counter()
    hashes, read = _added(store, [request for request in requests if not request.searched.attention])
    added = time.perf_counter()
    own = iter(hashes)
    hashes_of = [None if request.searched.attention else next(own) for request in requests]
    asked = [(r.question, keys) for r, keys in zip(requests, hashes_of, strict=True) if keys is not None]
    paid = iter(store.attention_to_many(asked))
    seconds = (added - start) / len(requests), (time.perf_counter() - added) / len(requests)
    rankings = []
    for request, keys in zip(requests, hashes_of, strict=True):
        known, lengths = request.searched, request.passage_tokens
        tokens_of = {} if keys is None else dict(zip(keys, lengths, strict=True))
        new = sum(tokens for key, tokens in tokens_of.items() if key in read)
        read -= tokens_of.keys()  # the first request that has a passage has had it read
        figures = {
            "known_tokens": (sum(lengths) if keys is None else sum(tokens_of.values())) - new,
            "stored_tokens": new,
            "store_seconds": seconds[0],
            "searched_tokens": known.tokens,
            "search_seconds": seconds[1] + known.seconds,
        }
        attention = torch.tensor(known.attention) if keys is None else next(paid)
        steps = Steps(0, 0 if request.plan is None else request.plan.chunk_size, 0)
        attention = weighted(attention, request.ranks)
        rankings.append(Ranking(attention, steps, sum(seconds) + known.seconds, figures))
    return rankings


def _added(store: PassageStore, requests: Sequence[Request]) -> tuple[list[list[str]], set[str]]:
    """Adds the passages of requests at once, so that none takes another's place.

    Returns:
        The hashes of each request's passages, and those of what was read for them.
    """
    if not requests:
        return [], set()
    lists: list[Request] = []  # one of the requests that follow each other with the same passages
    number_of: list[int] = []
    for request in requests:
        if not lists or request.passages != lists[-1].passages:
            lists.append(request)
        number_of.append(len(lists) - 1)
    added = store.add_encoded(
        [passage for request in lists for passage in request.passages],
        [tokens for request in lists for tokens in request.prompt.passages],
        requests[0].on_step("store"),
        unique_ids=False,
    )
    every = iter(added.hashes)
    hashes = [list(islice(every, len(request.passages))) for request in lists]
    return [hashes[number] for number in number_of], set(added.read)


def read_ranked(
    runtime: Runtime,
    requests: Sequence[Request],
    plans: Sequence[PrefillPlan],
    rankings: Sequence[Ranking],
    *,
    ahead: bool = False,
) -> list[KeptCache]:
    """Reads of each request what is ranked best: a shortlist by the loop, or the best at once.

    Args:
        runtime: Reads them.
        requests: With ranked passages.
        plans: Of each, see `planned`.
        rankings: Of each.
        ahead: See `read_request`.

    Raises:
        NumericsError: If the model computes NaN.
        DeviceMemoryError: If the device runs out of memory.
    """
    start = time.perf_counter()
    plans = [
        _for_sources(request, plan, ranking.attention)
        for request, plan, ranking in zip(requests, plans, rankings, strict=True)
    ]
    shortlists = [
        _shortlist(runtime, request, plan, ranking.attention)
        for request, plan, ranking in zip(requests, plans, rankings, strict=True)
    ]
    found: dict[int, Prefilled] = {}
    used = list(plans)
    at_once = [number for number, tokens in enumerate(shortlists) if tokens <= plans[number].budget]
    bests = prefill_best(
        runtime.model,
        [requests[number].prompt for number in at_once],
        [rankings[number].attention for number in at_once],
        [plans[number] for number in at_once],
        ahead=ahead,
    )
    found |= dict(zip(at_once, bests, strict=True))
    scanned = [number for number in range(len(requests)) if number not in found]
    for number in scanned:
        heads = runtime.retrieval_heads(requests[number].on_progress, requests[number].cancellation)
        used[number] = replace(plans[number], heads=heads)
    if scanned:
        by_loop = prefill_shortlists(
            runtime.model,
            [requests[number].prompt for number in scanned],
            [rankings[number].attention for number in scanned],
            [used[number] for number in scanned],
            runtime.rotation,
            [shortlists[number] for number in scanned],
            ahead=ahead,
        )
        found |= dict(zip(scanned, by_loop, strict=True))
    seconds = (time.perf_counter() - start) / len(requests)
    return [
        remember(
            runtime,
            request,
            used[number],
            found[number]._replace(steps=rankings[number].steps),
            rankings[number].seconds + seconds,
            rounds=2 if number in scanned else 1,
            **rankings[number].figures,
        )
        for number, request in enumerate(requests)
    ]


def _for_sources(request: Request, plan: PrefillPlan, attention: torch.Tensor) -> PrefillPlan:
    """The plan, changed where it is clear already what the question rests on: then there is no second round.

    One passage that stands out would only be found again. Several that do together are read at once, all that the
    budget holds: a second round would tell them apart, although the question needs each of them.
    """
    if not plan.finds_sources or plan.rounds == 2 or request.shortlist_tokens:
        return plan
    if has_one_source(attention):
        return replace(plan, rounds=1)
    cutoff = cutoff_behind_sources(attention)
    return plan if cutoff is None else replace(plan, cutoff=cutoff, rounds=1)


def _shortlist(runtime: Runtime, request: Request, plan: PrefillPlan, attention: torch.Tensor) -> int:
    """The most tokens of what the loop scans of passages that are ranked; 0 reads the best at once.

    On a CPU a second round would take a good part of the time, so there it must be asked for. Where the best passage is
    longer than the budget, the loop keeps what matters of it.
    """
    if plan.ranks_only or runtime.no_loop:
        return 0
    if request.shortlist_tokens is not None:
        return request.shortlist_tokens
    on_cpu = input_embedding(runtime.model).device.type == "cpu"
    too_long = request.passage_tokens[int(attention.argmax())] > plan.budget
    twice = (not on_cpu) if plan.rounds is None else plan.rounds == 2
    return shortlist_tokens(plan.budget) if too_long or twice else 0


def remember(
    runtime: Runtime, request: Request, plan: PrefillPlan, prefilled: Prefilled, seconds: float, **figures: Any
) -> KeptCache:
    """The cache of what was read, with the record of it.

    Args:
        runtime: Has read it.
        request: What was asked for.
        plan: How it was read.
        prefilled: What was read.
        seconds: That it took.
        figures: What else `ReadingFigures` has.

    Raises:
        NumericsError: If the model computed NaN.
    """
    cache, attention = prefilled.cache, prefilled.attention.cpu()
    check_finite(attention, "the model's attention is")
    total = float(attention.sum())
    alone = plan.strategy == "independent"
    cache.document = CachedDocument(
        passage_ids=tuple(passage.id for passage in request.passages),
        titles=tuple(passage.title for passage in request.passages),
        passage_tokens=tuple(request.passage_tokens),
        shares=tuple((attention / total if total else attention).tolist()),
        question=request.question,
        model=runtime.fingerprint,
        figures=ReadingFigures(
            model=runtime.name,
            strategy=plan.strategy if request.passages else "none",
            selection=plan.selection if request.passages else "none",
            reread=plan.reread,
            heads=tuple((layer, head) for layer, heads in (plan.heads or {}).items() for head in heads),
            budget=plan.budget,
            chunk_size=prefilled.steps.chunk_size,
            chunk_size_planned=prefilled.steps.chunk_size if alone else plan.chunk_size,
            chunks=prefilled.steps.chunks,
            scanned_layers=prefilled.steps.layers,
            prefill_seconds=seconds,
            **figures,
        ),
        older_turns=request.older_turns,
    )
    return cache
