"""Checks a model that Finch has accepted: against the model itself, and on made-up questions with one right passage."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any

import torch

from ..decode.generation import Decoder
from ..engine import Finch
from ..heads.examples import HeadExample, make_examples
from ..models.cache import CompressedCache
from ..models.inspection import input_embedding, positions_of, text_config
from ..models.kept_cache import KeptCache
from ..prompts.passages import Passage
from ..prompts.peculiarities import doubled_beginning, peculiarities
from ..reading import read_request
from ..request import Request
from ..resolving import resolve
from .plain import plain_keys, plain_logits

_STEPS = 4  # tokens of an answer that are compared
_PASSAGES, _QUESTIONS = 20, 3  # of the needles: at the beginning, in the middle, at the end
_TEXT_TOKENS = 600  # that are compared with the model itself
# Of the largest logit; what is wrong is off by its size. Other dtypes than float32 round in each layer.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.02}
_USUAL_TOLERANCE = 0.08
_KEY_TOLERANCE = {torch.float32: 1e-4}
_USUAL_KEY_TOLERANCE = 0.02
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of a checkup.

    Attributes:
        name: What was looked at.
        detail: What was found.
        passed: Whether it is right; None where there is nothing to pass.
    """

    name: str
    detail: str
    passed: bool | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)


def check_model(finch: Finch) -> Iterator[Finding]:
    """Looks at an engine's model, and checks what Finch does with it; nobody else may use the model meanwhile.

    Args:
        finch: The engine.

    Yields:
        One finding after the other, as they are made; the retrieval heads are found in between, if need be.
    """
    yield from facts(finch)
    example = _example(finch)
    yield equal_to_plain(finch, example)
    yield right_after_eviction(finch, example)
    yield from needles_kept(finch, make_examples(_QUESTIONS, _PASSAGES, seed=1))


def facts(finch: Finch) -> list[Finding]:
    """What a model is, and how it is read.

    Args:
        finch: The engine.
    """
    model, config, runtime = finch.model, text_config(finch.model), finch.runtime
    device, size = input_embedding(model).device, model.get_memory_footprint()
    parameters = f"{model.num_parameters() / 1e6:,.0f} million parameters, {size / 1e9:.2f} GB"
    quantised = getattr(model.config, "quantization_config", None)
    stored = f", quantised by {_method(quantised)}" if quantised is not None else ""
    reading = f"each passage alone, by the model's own attention: {runtime.no_loop}"
    positions = positions_of(config)
    held = "" if finch.window == positions else f" of {positions:,}: Finch stays below what all layers see"
    return [
        Finding("model", f"{finch.name} ({config.model_type}): {parameters}, {_dtype(model)}{stored}, on {device}"),
        Finding("reading", reading if runtime.no_loop else "the loop, and each passage alone"),
        Finding("window", f"{finch.window:,} tokens{held}"),
        Finding("prompts", "; ".join(peculiarities(finch.tokenizer)), not doubled_beginning(finch.tokenizer)),
    ]


def equal_to_plain(finch: Finch, example: HeadExample) -> Finding:
    """Whether a text that fits whole is answered with the logits of the model without Finch.

    Args:
        finch: The engine.
        example: A question over the text.
    """
    request, cache, tokens = _read(finch, example, budget=None)
    off, same = _compared(finch, request, cache, tokens)
    return _as_the_model(finch, "equal", f"{len(tokens):,} tokens, nothing left out", off, same)


def right_after_eviction(finch: Finch, example: HeadExample) -> Finding:
    """Whether what is kept of a text is what the model without Finch makes of these tokens alone.

    Where keys are moved, those of the first layer must be the model's own at the new positions; they depend on nothing
    that was evicted. Where nothing is moved, the logits must be the model's behind what was kept.

    Args:
        finch: The engine.
        example: A question over the text.
    """
    lengths = map(len, finch.prompts.encode(example.passages))
    budget = max(1, sum(lengths) // 3)
    options: dict[str, Any] = {} if finch.runtime.no_loop else {"strategy": "loop", "reread": False}
    options |= {} if finch.runtime.no_loop else {"chunk_size": max(16, budget // 2)}
    request, cache, tokens = _read(finch, example, budget=budget, **options)
    what = f"{cache.kept_tokens:,} of {sum(request.passage_tokens):,} tokens kept"
    if not isinstance(cache, CompressedCache):
        return _as_the_model(finch, "evicted", what, *_compared(finch, request, cache, tokens))
    kept = tokens[: cache.prefix + cache.kept_tokens]
    expected = plain_keys(finch.model, kept)
    found = cache.layers[0].in_use()[0][0, :, : len(kept)].float().cpu()
    off = float((found - expected).abs().max() / expected.abs().max())
    passed = off <= _KEY_TOLERANCE.get(finch.model.dtype, _USUAL_KEY_TOLERANCE)
    return Finding("evicted", f"{what}; their moved keys are off by {off:.1e} of the largest", passed)


def needles_kept(finch: Finch, examples: Sequence[HeadExample]) -> list[Finding]:
    """Whether the passage that answers is kept of many that look alike, and how fast they are read.

    Args:
        finch: The engine.
        examples: Questions over passages, the one that answers at different places.
    """
    answers = [finch.ask(example.question, example.passages, max_new_tokens=16, prior="none") for example in examples]
    cited = [[citation.index for citation in answer.citations] for answer in answers]
    kept = sum(example.gold in indexes for example, indexes in zip(examples, cited, strict=True))
    first = sum(indexes[:1] == [example.gold] for example, indexes in zip(examples, cited, strict=True))
    report = answers[-1].report
    what = f"the right one of {len(examples[0].passages)} passages is kept for {kept} of {len(examples)} questions"
    sizes = f"{report.kept_tokens:,} of {report.context_tokens:,} tokens"
    read = report.context_tokens / max(report.prefill_seconds, 1e-9)
    written = report.new_tokens / max(report.decode_seconds, 1e-9)
    return [
        Finding("needles", f"{what}, the best of all for {first}; {sizes}", kept >= len(examples) - 1),
        Finding("speed", f"reads {read:,.0f} tokens/s, writes {written:,.1f} tokens/s"),
    ]


def _example(finch: Finch) -> HeadExample:
    """A question over passages, as many as the window has room for beside the rest of a prompt."""
    (example,) = make_examples(1, _PASSAGES)
    ends = list(accumulate(map(len, finch.prompts.encode(example.passages))))
    most = sum(end <= min(_TEXT_TOKENS, finch.window // 2) for end in ends)
    return HeadExample(example.question, example.passages[: max(2, most)], 0)


def _read(
    finch: Finch, example: HeadExample, budget: int | None, **options: Any
) -> tuple[Request, KeptCache, list[int]]:
    """A request, the cache that it was read into, and the tokens that the model answers behind.

    Without a budget everything is kept.
    """
    passages = [Passage(text) for text in example.passages]
    if budget is None:
        budget = sum(map(len, finch.prompts.build(example.question, passages).passages))
    settings = finch.settings.updated({"max_new_tokens": _STEPS, "store": None, "budget": budget, **options})
    request = resolve(finch.runtime, example.question, passages, settings)
    cache = read_request(finch.runtime, request)
    document = [token for passage in request.prompt.passages for token in passage]
    kept = [document[place] for place in cache.kept[0].tolist()]
    return request, cache, [*request.prompt.prefix, *kept, *request.answer_prompt]


def _compared(finch: Finch, request: Request, cache: KeptCache, tokens: Sequence[int]) -> tuple[float, int]:
    """How far logits are off, of the largest, behind a prompt and in the first steps; and how often the best agree."""
    writer = finch.runtime.writer(request.sampling)
    chunk_size = finch.runtime.prompt_chunk_size
    decoder = Decoder(
        finch.model,
        cache.fork(request.room),
        request.answer_prompt,
        writer,
        new_tokens=_STEPS,
        graphs=finch.runtime.graphs,
        chunk_size=chunk_size and min(chunk_size, max(1, len(tokens) // 2)),
    )
    found, passes = [], decoder.logits()
    for _ in range(_STEPS):
        found.append(next(passes)[0].cpu())
        writer.token_ids.append(int(found[-1].argmax()))
    passes.close()
    expected = plain_logits(finch.model, [*tokens, *writer.token_ids[:-1]], _STEPS)
    off = (torch.stack(found) - expected).abs().max() / expected.abs().max()
    return float(off), int((expected.argmax(-1) == torch.tensor(writer.token_ids)).sum())


def _as_the_model(finch: Finch, name: str, what: str, off: float, same: int) -> Finding:
    """The line of a comparison; an expert that is chosen otherwise for rounding is no mistake, its token would be."""
    close = off <= _TOLERANCE.get(finch.model.dtype, _USUAL_TOLERANCE)
    config = text_config(finch.model)
    mixture = any(getattr(config, setting, None) for setting in _EXPERTS)
    detail = f"{what}; logits are off by {off:.1e} of the largest, {same} of {_STEPS} tokens are the same"
    return Finding(name, detail, close or (mixture and same == _STEPS))


def _dtype(model: Any) -> str:
    return str(model.dtype).removeprefix("torch.")


def _method(quantised: Any) -> str:
    method = quantised.get("quant_method") if isinstance(quantised, dict) else getattr(quantised, "quant_method", None)
    return str(getattr(method, "value", method))
