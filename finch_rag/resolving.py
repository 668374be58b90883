"""From a call's question, passages and settings to a `Request`: everything is checked, nothing is read yet."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from .errors import InputError, WindowError
from .fitting import build_fitting, fixed_tokens, own_settings
from .models.cache import CompressedCache
from .prefill.planning import (
    FixedTokens,
    PrefillPlan,
    ReadingSettings,
    check_fixed,
    default_budget,
    fit,
)
from .prefill.shortlists import shortlist_tokens
from .prompts.builder import Prompt
from .prompts.parsing import APART, ParsedPrompt
from .prompts.passages import Passage, ranks_of
from .request import Cancellation, Request, Searched
from .runtime import Runtime
from .settings import Settings


def with_store(
    runtime: Runtime, question: str, passages: list[Passage], settings: Settings
) -> tuple[list[Passage], Settings]:
    """The passages of a call; where it has none, the best ones of its store.

    Args:
        runtime: The model.
        question: The question.
        passages: Checked passages.
        settings: Of the call.

    Raises:
        InputError: If the store is asked and has no passages.
    """
    store = None if passages else runtime.stores.at(settings.store, settings.on_progress)
    if store is None:
        return passages, settings
    started = time.perf_counter()
    budget = settings.reading.budget or default_budget(runtime.window)
    most = max(settings.shortlist_tokens or 0, shortlist_tokens(budget))
    found = store.shortlist(question, most)
    if not found.passages:
        raise InputError("the store has no passages: add some, or pass them")
    searched = Searched(found.attention, found.searched_tokens, time.perf_counter() - started)
    return list(found.passages), replace(settings, searched=searched)


def resolve(
    runtime: Runtime,
    question: str,
    passages: Sequence[Passage],
    settings: Settings,
    *,
    ranks_only: bool = False,
    like: Request | None = None,
    parse_mode: str = APART,
    cancellation: Cancellation | None = None,
) -> Request:
    """Resolves a call; nothing is read yet.

    Args:
        runtime: Will execute it.
        question: The question.
        passages: Checked passages.
        settings: Of the call.
        ranks_only: Whether the passages are only ranked, and nothing is answered.
        like: A request with the same passages, whose token ids are taken.
        parse_mode: How passages and question were told apart.
        cancellation: Asked at each step.

    Raises:
        InputError: If question or settings cannot work with this model.
    """
    encoded = None if like is None else like.prompt.passages[: len(passages)]
    fitted = build_fitting(runtime, question, passages, settings, encoded)
    notes = fitted.notes
    if blank := sum(not passage.text.strip() for passage in passages):
        notes = (*notes, f"{blank} of {len(passages)} passages had no text: skipped")
    return resolve_prompt(
        runtime,
        fitted.prompt,
        replace(settings, notes=(*settings.notes, *notes)),
        question=question,
        passages=fitted.passages,
        older_turns=fitted.turns,
        ranks_only=ranks_only,
        parse_mode=parse_mode,
        cancellation=cancellation,
    )


def resolve_parsed(runtime: Runtime, parsed: ParsedPrompt, settings: Settings) -> Request:
    """Resolves a call whose passages and question were found in messages.

    Args:
        runtime: Will execute it.
        parsed: What was found.
        settings: Of the call.

    Raises:
        InputError: See `resolve`.
        WindowError: See `resolve_prompt`.
    """
    reading = settings.reading
    if parsed.keeps_all:
        reading = replace(reading, budget=sum(map(len, runtime.prompts.build("?", parsed.passages).passages)))
    elif parsed.in_own_words and parsed.passages:  # a task over a text, not a question to one passage of it
        reading = replace(reading, whole_text=True)
    notes = (*settings.notes, *parsed.notes)
    settings = replace(settings, reading=reading, prompt=own_settings(settings, parsed), notes=notes)
    return resolve(runtime, parsed.question, parsed.passages, settings, parse_mode=parsed.parse_mode)


def resolve_prompt(
    runtime: Runtime,
    prompt: Prompt,
    settings: Settings,
    *,
    question: str = "",
    passages: Sequence[Passage] | None = None,
    older_turns: int = 0,
    ranks_only: bool = False,
    parse_mode: str = APART,
    cancellation: Cancellation | None = None,
) -> Request:
    """Resolves a call whose prompt is built.

    Args:
        runtime: Will execute it.
        prompt: Token ids.
        settings: Of the call.
        question: For the record.
        passages: Those of the prompt; nameless ones when None.
        older_turns: How many of them, the last, are older turns of the conversation.
        ranks_only: See `resolve`.
        parse_mode: See `resolve`.
        cancellation: See `resolve`.

    Raises:
        WindowError: If something does not fit into the window.
        InputError: If the passages have more tokens than the settings allow.
    """
    runtime.check_process()
    reading, sampling = settings.reading, settings.sampling
    if ranks_only:
        sampling = replace(sampling, max_new_tokens=0)
    lengths = [len(passage) for passage in prompt.passages]
    _check_length(sum(lengths[: len(lengths) - older_turns]), reading.max_context_tokens)
    runtime.constraint(sampling)  # raises if an answer cannot be held to it
    asks_store = settings.store is not None and any(lengths) and not older_turns
    if any(lengths):
        _check_strategy(reading, asks_store)
        _check_rounds(settings)
        _check_no_loop(runtime, settings)
    whole = reading.selection == "passage"
    fixed = fixed_tokens(prompt, replace(settings, sampling=sampling))
    if not any(lengths):  # nothing is compressed, so that nothing has to stay free
        check_fixed(fixed, runtime.window, passages=0)
        fixed = FixedTokens(0, 0, 0, 0)
    wanted = reading.budget
    if wanted is None and reading.whole_text:
        room = runtime.window - fixed.total
        wanted = max(1, room - min(runtime.usual_chunk_size, room // 4))
    budget, chunk_size = fit(
        fixed,
        window=runtime.window,
        budget=wanted,
        chunk_size=reading.chunk_tokens,
        usual_chunk_size=runtime.usual_chunk_size,
        longest_passage=max(lengths, default=0) if whole else 0,
        document=sum(lengths),
    )
    reread = reading.reread and whole
    plan = PrefillPlan(
        budget=budget,
        chunk_size=chunk_size,
        selection=reading.selection,
        reread=reread,
        ranks_only=ranks_only,
        cutoff=reading.cutoff_part,
        finds_sources=reading.cutoff is None and not reading.whole_text,
        rounds=reading.rounds,
        in_order=reading.whole_text,
    )
    store = runtime.stores.at(settings.store, settings.on_progress) if asks_store else None
    # What a search of the whole store has found was ranked by that search alone; older turns of a conversation, and
    # the parts of a text that matters as a whole, nobody has ranked.
    ranked = passages is not None and reading.prior == "auto" and not reading.whole_text
    ranked = ranked and not older_turns and not settings.searched.attention
    if asks_store or (any(lengths) and _reads_alone(runtime, reading, plan, prompt, older_turns)):
        plan = replace(plan, strategy="independent")
    if runtime.no_loop and sum(lengths) <= plan.budget:  # everything fits: as the loop, which then leaves nothing out
        plan = replace(plan, cutoff=0.0, finds_sources=False, in_order=True)
    return Request(
        question=question,
        passages=tuple(Passage("") for _ in lengths) if passages is None else tuple(passages),
        prompt=prompt,
        plan=plan,
        sampling=sampling,
        on_progress=settings.on_progress,
        cancellation=Cancellation() if cancellation is None else cancellation,
        parse_mode=parse_mode,
        notes=settings.notes,
        older_turns=older_turns,
        store=store,
        shortlist_tokens=settings.shortlist_tokens,
        searched=settings.searched,
        ranks=tuple(ranks_of(passages)) if ranked and passages is not None else None,
        quotes=settings.quotes,
        support=settings.support or settings.min_support is not None,
        min_support=settings.min_support,
    )


def resolve_cached(runtime: Runtime, cache: CompressedCache, question: str | None, settings: Settings) -> Request:
    """Resolves a question to a cache.

    Args:
        runtime: Will execute it.
        cache: That a runtime's `read` made, with this model.
        question: The one that the cache was compressed under when None.
        settings: Of the call.

    Raises:
        InputError: If the cache is another model's.
        WindowError: If question and answer do not fit behind the cache.
    """
    runtime.check_process()
    sampling = settings.sampling
    if cache.document.model != runtime.fingerprint:
        raise InputError(f"the cache was filled by another model than {runtime.name}: compress the passages again")
    if cache.whole != (runtime.shared is None):
        has, needed = ("all heads", "some") if cache.whole else ("some heads", "all")
        raise InputError(
            f"the cache has {has}, and this process needs {needed}, as it has of the model: compress the passages again"
        )
    keys = cache.layers[0].keys
    if keys is not None and keys.dtype != runtime.model.dtype:
        raise InputError(
            f"the cache holds {keys.dtype} and {runtime.name} is loaded in {runtime.model.dtype}: load the model with "
            "that dtype, or compress the passages again"
        )
    shapes, own = cache.shapes, runtime.rotation.shapes
    if shapes and shapes != own:
        raise InputError(
            f"the cache has {_in_words(shapes)}, and {runtime.name} needs {_in_words(own)}: compress the passages again"
        )
    asked = cache.document.question if question is None else question
    prompt = runtime.prompts.build(asked, [])
    fixed = FixedTokens(
        prefix=cache.length, question=len(prompt.question), tail=len(prompt.tail), new=sampling.max_new_tokens
    )
    if fixed.total > runtime.window:
        raise WindowError(
            f"the cache has {cache.length} tokens, the question {fixed.question + fixed.tail} and the answer up to "
            f"{fixed.new}, more than the window of {runtime.window}: shorten the question or lower max_new_tokens"
        )
    runtime.constraint(sampling)  # raises if an answer cannot be held to it
    return Request(
        question=asked,
        passages=(),
        prompt=prompt,
        plan=None,
        sampling=sampling,
        on_progress=Settings().on_progress,
        quotes=settings.quotes,
        support=settings.support or settings.min_support is not None,
        min_support=settings.min_support,
    )


def _in_words(shapes: Sequence[tuple[int, int, int]]) -> str:
    kinds = " or ".join(f"{heads} heads of {keys} and {values}" for heads, keys, values in dict.fromkeys(shapes))
    return f"{len(shapes)} layers of {kinds}"


def _check_strategy(reading: ReadingSettings, asks_store: bool) -> None:
    """Raises an InputError where passages are to be read alone, and then as only the loop can."""
    if not asks_store and reading.strategy != "independent":
        return
    reader = "a store" if asks_store else 'strategy="independent"'
    cure = "store=None for this call" if asks_store else 'strategy="loop"'
    if asks_store and reading.strategy == "loop":
        raise InputError(f'a store reads each passage alone: use strategy="auto", or {cure}')
    if reading.selection != "passage":
        raise InputError(f'{reader} ranks whole passages: use selection="passage", or {cure}')
    if not asks_store and not reading.reread:
        raise InputError(f"{reader} reads the best passages again, and nothing else: use reread=True, or {cure}")


def _check_rounds(settings: Settings) -> None:
    """Raises an InputError where the rounds and the tokens of the second one say different things."""
    rounds, tokens = settings.reading.rounds, settings.shortlist_tokens
    if rounds is not None and tokens is not None and (rounds == 2) != (tokens > 0):
        scans = f"scans {tokens} tokens in a second round" if tokens else "leaves the second round out"
        raise InputError(f"rounds is {rounds}, and shortlist_tokens={tokens} {scans}: leave one of them None")


def _check_no_loop(runtime: Runtime, settings: Settings) -> None:
    """Raises an InputError where a call needs the loop, and the model cannot run it."""
    reading = settings.reading
    needs = {
        'strategy="loop"': reading.strategy == "loop",
        'selection="token"': reading.selection == "token",
        "reread=False": not reading.reread,
        "shortlist_tokens": bool(settings.shortlist_tokens),
        "rounds=2": reading.rounds == 2,
    }
    if runtime.no_loop and (asked := [name for name, asks in needs.items() if asks]):
        raise InputError(
            f"{asked[0]} needs the loop, and {runtime.name} cannot run it ({runtime.no_loop}): leave it out"
        )


def _reads_alone(
    runtime: Runtime, reading: ReadingSettings, plan: PrefillPlan, prompt: Prompt, older_turns: int
) -> bool:
    """Whether passages that no store knows are read alone; `finch_rag.Finch` says when "auto" does so."""
    lengths = [len(passage) for passage in prompt.passages]
    prefix = len(runtime.alone_prefix)
    room = runtime.window - prefix - max(prefix, len(prompt.question))
    if reading.strategy == "independent" or runtime.no_loop:
        if (longest := max(lengths)) > room:
            raise WindowError(
                f"passage {lengths.index(longest)} has {longest} tokens, and beside the question the model's window of "
                f"{runtime.window} has room for {room} when it is read alone: split it"
                + ("" if runtime.no_loop else ', or use strategy="loop"')
            )
        return True
    usual = runtime.heads == "auto" or runtime.alone_heads != "auto"
    if reading.strategy == "loop" or not usual or reading.selection != "passage" or not reading.reread:
        return False
    if plan.ranks_only or reading.whole_text or older_turns:
        return False
    whole = sum(length <= plan.budget for length in lengths)
    return max(lengths) <= room and sum(lengths) > plan.budget and 2 * whole > len(lengths)


def _check_length(context_tokens: int, max_context_tokens: int | None) -> None:
    if max_context_tokens is not None and context_tokens > max_context_tokens:
        raise InputError(
            f"the passages have {context_tokens} tokens, more than max_context_tokens={max_context_tokens}: pass fewer "
            "passages, or raise max_context_tokens"
        )
