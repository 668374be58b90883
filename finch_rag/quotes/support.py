"""How well the passages support an answer: a number between 0 and 1, calibrated for each model.

Two things tell an answer that stands in the passages from one that does not. The model itself is asked, on the same
cache, whether the passages answer the question: what it says is the logarithm of "yes" over "no". And the answer's
tokens look sharply at one sentence where they copy from it. Both cost one short pass. What they mean differs from model
to model, so a logistic regression is fitted once on made-up examples, with the right passage and without it, and kept
beside the model's heads. Measured in docs/benchmarks.md.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from importlib import resources
from typing import TYPE_CHECKING, NamedTuple

import torch

from ..answer import Answer
from ..answering import Begun, Written
from ..errors import DeviceMemoryError, ModelError, WindowError, first_line
from ..heads.examples import HeadExample, make_examples
from ..jsonl import is_number, read_object
from ..models.cache import CompressedCache
from ..models.fingerprint import fingerprint
from ..models.finite import check_finite
from ..models.forward import memory_guard, on_device
from ..models.inspection import input_embedding
from ..models.parallel import agreed, writes_files
from ..paths import cache_folder, write_atomically
from ..prompts.passages import Passage
from ..reading import read_request
from ..resolving import resolve
from ..runtime import Runtime
from ..settings import Settings
from .finding import noted, took, with_quotes

if TYPE_CHECKING:
    from pathlib import Path

JUDGEMENT = "Do the passages above answer this question? Say yes or no."
EXAMPLES, PASSAGES = 24, 10
_LEAST_EXAMPLES = 8  # of each kind
_WORDS = ("yes", "Yes", " yes", " Yes"), ("no", "No", " no", " No")
_LEAST_SHARPNESS = 1e-3  # keeps its logarithm finite
_PENALTY = 0.05  # on squared weights: made-up examples are told apart more easily than real ones
_STEPS = 25
_FORMAT = 1

_log = logging.getLogger(__name__)


class Signs(NamedTuple):
    """What tells how well an answer is supported.

    Attributes:
        judgement: The logarithm of the model's "yes" over its "no".
        sharpness: Of the answer's tokens, see `finch_rag.quotes.choosing.sharpness`.
    """

    judgement: float
    sharpness: float

    def row(self) -> list[float]:
        """As the regression takes them."""
        return [1.0, self.judgement, math.log(self.sharpness + _LEAST_SHARPNESS)]


def finished(runtime: Runtime, written: Sequence[Written]) -> list[Answer]:
    """Answers with what they rest on, and how well they are supported, as far as that was asked for.

    Args:
        runtime: Has written them.
        written: The answers, written side by side or one alone.

    Returns:
        In their order.

    Raises:
        ModelError: If ``min_support`` was asked for and the model cannot be calibrated.
    """
    looked = with_quotes(runtime, written)
    return [
        _supported(runtime, each, answer, sharpness) if each.request.support else answer
        for each, (answer, sharpness) in zip(written, looked, strict=True)
    ]


def _supported(runtime: Runtime, written: Written, answer: Answer, sharpness: float | None) -> Answer:
    if sharpness is None:
        return answer
    # A cancellation does not end the calibration: the answer is there, and the next call needs it too.
    weights = calibrated(runtime, partial(written.request.on_progress, "support"))
    if isinstance(weights, ModelError):
        if written.request.min_support is not None:
            raise weights
        return noted(answer, f"no support: {weights}")
    start = time.perf_counter()
    try:
        signs = Signs(_judgement(runtime, written), sharpness)
    except (DeviceMemoryError, WindowError) as error:  # the answer is there
        _log.warning("no support: %s", error)
        return noted(answer, f"no support: {error}")
    support = 1 / (1 + math.exp(-min(50.0, max(-50.0, _product(weights, signs.row())))))
    answer = took(replace(answer, support=support), time.perf_counter() - start)
    least = written.request.min_support
    if least is None or support >= least:
        return answer
    cited = [replace(citation, quotes=()) for citation in answer.citations]
    told = replace(answer.report, stop_reason="unsupported")
    return replace(answer, text="", statements=(), citations=cited, report=told)


def _product(weights: Sequence[float], row: Sequence[float]) -> float:
    return sum(weight * value for weight, value in zip(weights, row, strict=True))


@torch.inference_mode()
def _judgement(runtime: Runtime, written: Written) -> float:
    """The logarithm of the model's "yes" over its "no" to `JUDGEMENT`, read behind the passages."""
    cache, request, model = written.cache, written.request, runtime.model
    prompt = runtime.prompts.encode([f"Question: {request.question}\n{JUDGEMENT}"])[0] + request.prompt.tail
    device, before = input_embedding(model).device, cache.prefix + cache.kept_tokens
    if before + len(prompt) > runtime.window:
        raise WindowError(
            f"the window of {runtime.window} tokens has no room for the {len(prompt)} that judge an answer behind "
            f"{before}: use a smaller budget"
        )
    with memory_guard(model, f"{len(prompt)} tokens on a cache of {before}"):
        if isinstance(cache, CompressedCache):
            cache.crop_to(before)
            cache = cache.fork(len(prompt))
            tokens = on_device(prompt, device)[None]
            output = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        else:  # not all models' own caches can be cropped: everything is read again
            document = [token for passage in request.prompt.passages for token in passage]
            kept = [document[place] for place in cache.kept[0].tolist()]
            tokens = on_device([*request.prompt.prefix, *kept, *prompt], device)[None]
            output = model(input_ids=tokens, use_cache=False, logits_to_keep=1)
        logits = output.logits[0, -1].float()
        check_finite(logits, "the model's logits are")
        yes, no = (logits[_first_tokens(runtime, words)].logsumexp(0) for words in _WORDS)
        return float(yes - no)


def _first_tokens(runtime: Runtime, words: Sequence[str]) -> list[int]:
    return sorted({tokens[0] for tokens in runtime.prompts.encode(words) if tokens})


def calibrated(runtime: Runtime, on_progress: Callable[[int, int], None]) -> tuple[float, ...] | ModelError:
    """The weights of a model's regression: stored, shipped, or fitted now and stored; or why there are none.

    Args:
        runtime: Of the model.
        on_progress: Called with the examples done and in all.
    """
    return runtime.support_weights.get(lambda: _known_or_fitted(runtime, on_progress), lambda: None)


def _known_or_fitted(runtime: Runtime, on_progress: Callable[[int, int], None]) -> tuple[float, ...] | ModelError:
    name = f"{fingerprint(runtime.model)}.json"
    own: Path = cache_folder("support") / name
    known = agreed(runtime.model, _known(name))
    if known is not None:
        return known
    _log.warning(
        "calibrating the support of answers by %s on %d examples; this happens once, the result is kept in %s",
        runtime.name,
        EXAMPLES,
        own,
    )
    try:
        weights = fitted(*signs_of_examples(runtime, on_progress))
    except ModelError as reason:  # kept, so that the next call does not try again
        return reason
    try:
        content = {"format": _FORMAT, "model": runtime.name, "weights": [round(weight, 5) for weight in weights]}
        if writes_files(runtime.model):
            write_atomically(own, json.dumps(content, indent=1) + "\n")
    except OSError as error:
        _log.warning("the calibration of %s cannot be stored (%s); it is made again next time", runtime.name, error)
    return weights


def _known(name: str) -> tuple[float, ...] | None:
    """Weights that the user has stored, or that are shipped with the package."""
    for file in (cache_folder("support") / name, resources.files(__package__) / "shipped" / name):
        try:
            stored = read_object(file)
            if stored["format"] == _FORMAT:
                weights = stored["weights"]
                if (
                    isinstance(weights, list)
                    and len(weights) == len(Signs(0, 0).row())
                    and all(map(is_number, weights))
                ):
                    return tuple(map(float, weights))
                _log.warning("%s holds no weights; it is made again", file)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError, KeyError, TypeError) as error:
            _log.warning("%s cannot be read (%s); it is made again", file, first_line(error))
    return None


def signs_of_examples(
    runtime: Runtime, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> tuple[list[Signs], list[Signs]]:
    """What the signs are on made-up examples: with the passage that answers, and without it.

    Args:
        runtime: Of the model.
        on_progress: See `calibrated`.
    """
    found: tuple[list[Signs], list[Signs]] = [], []
    for number, example in enumerate(_examples(runtime), 1):
        others = [text for place, text in enumerate(example.passages) if place != example.gold]
        for signs, texts in zip(found, (example.passages, others), strict=True):
            own = _signs(runtime, example.question, [Passage(text) for text in texts])
            if own is not None:
                signs.append(own)
        on_progress(number, EXAMPLES)
    return found


def _examples(runtime: Runtime) -> list[HeadExample]:
    """Examples with as many passages as fit into half of the window, at least two."""
    for passages in range(PASSAGES, 1, -2):
        made = make_examples(EXAMPLES, passages)
        longest = max(sum(map(len, runtime.prompts.encode(example.passages))) for example in made)
        if 2 * longest <= runtime.window:
            break
    return made


def _signs(runtime: Runtime, question: str, passages: Sequence[Passage]) -> Signs | None:
    """Those of an answer that is written now; None where it looks at no sentence."""
    settings = Settings().updated({"max_new_tokens": 16, "support": True, "quotes": False})
    request = resolve(runtime, question, list(passages), settings)
    begun = Begun.of(request, read_request(runtime, request))
    running = runtime.decoder(begun.cache, request)
    with closing(iter(running)) as deltas:
        written = begun.written("".join(deltas), running.writer, 0.0)
    sharpness = with_quotes(runtime, [written])[0].sharpness
    return None if sharpness is None else Signs(_judgement(runtime, written), sharpness)


def fitted(answered: Sequence[Signs], unanswered: Sequence[Signs]) -> tuple[float, ...]:
    """The weights of a logistic regression that tells answers with the right passage from answers without it.

    Args:
        answered: Signs of the former.
        unanswered: Signs of the latter.

    Returns:
        The constant, and the weights of judgement and of the logarithm of the sharpness.

    Raises:
        ModelError: If there are too few of them, or they are not finite.
    """
    if min(len(answered), len(unanswered)) < _LEAST_EXAMPLES:
        raise ModelError(
            f"only {len(answered)} and {len(unanswered)} of {EXAMPLES} examples could be judged, and support needs "
            f"{_LEAST_EXAMPLES} of each: leave out support and min_support with this model"
        )
    rows = torch.tensor([signs.row() for signs in (*answered, *unanswered)], dtype=torch.double)
    if not rows.isfinite().all():
        raise ModelError("the model's judgement is not finite: load it with dtype float32 or bfloat16")
    right = torch.tensor([1.0] * len(answered) + [0.0] * len(unanswered), dtype=torch.double)
    middle, width = rows[:, 1:].mean(0), rows[:, 1:].std(0).clamp(min=1e-6)
    scaled = torch.cat((rows[:, :1], (rows[:, 1:] - middle) / width), dim=1)
    penalty = torch.tensor([0.0] + [_PENALTY] * len(middle), dtype=torch.double)
    weights = torch.zeros(rows.shape[1], dtype=torch.double)
    for _ in range(_STEPS):  # Newton's
        chance = (scaled @ weights).sigmoid()
        slope = scaled.T @ (chance - right) / len(right) + penalty * weights
        bend = (scaled.T * (chance * (1 - chance))) @ scaled / len(right) + torch.diag(penalty + 1e-9)
        weights = weights - torch.linalg.solve(bend, slope)
    own = weights[1:] / width
    return (float(weights[0] - own @ middle), *own.tolist())
