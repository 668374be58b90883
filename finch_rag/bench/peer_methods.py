"""The peers' ways of reading many passages, with the prompts and the decoding of Finch.

`finch_rag.bench.peers` runs them. Their packages are imported where they are used, since only its environment has them.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import DynamicCache

from ..decode.generation import end_tokens
from ..errors import InputError
from ..models.inspection import window_of
from ..models.loading import LoadedModel
from ..prompts.builder import Prompt, PromptBuilder
from ..prompts.passages import Passage
from .cases import QualityCase
from .clock import Clock
from .methods import DoesNotFitError, Outcome


@dataclass(frozen=True)
class PlainModel:
    """The plain model, which reads a prompt at once.

    Attributes:
        loaded: Model and tokenizer.
        max_new_tokens: The most tokens of an answer.
        separator: The token of `add_separator`; None where no method needs it.
    """

    loaded: LoadedModel
    max_new_tokens: int
    separator: int | None = None

    @cached_property
    def prompts(self) -> PromptBuilder:
        """Builds the prompts that Finch reads."""
        return PromptBuilder(self.loaded.tokenizer)

    @cached_property
    def compressor(self) -> Any:
        """LongLLMLingua's compressor on the same model."""
        from .longllmlingua import LoadedCompressor

        return LoadedCompressor(self.loaded.model, self.loaded.tokenizer)

    def build(self, case: QualityCase, passages: Sequence[Passage]) -> Prompt:
        """The prompt of a case, if the window holds it."""
        prompt = self.prompts.build(case.question.question, passages, case.instructions)
        tokens = len(_context(prompt)) + len(prompt.tail) + self.max_new_tokens
        if tokens > (window := window_of(self.loaded.model.config)):
            raise DoesNotFitError(f"{tokens} tokens of prompt and answer, and the window has {window}")
        return prompt

    def read(self, token_ids: list[int]) -> DynamicCache:
        """The cache of a text that is read at once."""
        cache = DynamicCache()
        self.loaded.model.model(input_ids=self._tensor(token_ids), past_key_values=cache, use_cache=True)
        return cache

    def answer(self, cache: DynamicCache, tail: list[int], position: int) -> str:
        """The likeliest answer.

        Args:
            cache: Of everything before ``tail``.
            tail: What stands before the answer.
            position: Of the first token of ``tail``: the cache's length, or more if something was evicted from it and
                the rest stayed where it was.
        """
        generated: list[int] = []
        step = tail
        while len(generated) < self.max_new_tokens:
            logits = self.loaded.model(
                input_ids=self._tensor(step),
                position_ids=torch.arange(position, position + len(step), device=self.loaded.model.device)[None],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits
            token = int(logits[0, -1].float().argmax())
            if token in self._eos:
                break
            generated.append(token)
            position += len(step)
            step = [token]
        return self.prompts.decode(generated).strip()

    @cached_property
    def _eos(self) -> frozenset[int]:
        return end_tokens(self.loaded.model, self.loaded.tokenizer)

    def _tensor(self, token_ids: list[int]) -> torch.Tensor:
        return torch.tensor([token_ids], device=self.loaded.model.device)


def add_separator(loaded: LoadedModel) -> int:
    """Gives a model the token that tells FinchPress where the question begins; it is cut out before the first layer.

    Args:
        loaded: The model, whose embedding gets a row; its tokenizer goes on without the token, so that no text has it.
    """
    from kvpress.presses.finch_press import FinchPress

    press = FinchPress()
    press.update_model_and_tokenizer(loaded.model, copy.deepcopy(loaded.tokenizer))
    return int(press.delimiter_token_id)


def finch_press(plain: PlainModel, case: QualityCase, budget: int) -> Outcome:
    """Kvpress' FinchPress as its evaluation runs it: context, separator, question; the template's end comes after."""
    if plain.separator is None:
        raise InputError("FinchPress needs a separator: pass the token of add_separator to PlainModel")
    from kvpress.presses.finch_press import FinchPress

    press = FinchPress()
    press.delimiter_token_id = plain.separator
    return pressed(plain, press, case, budget, [plain.separator], rotates_keys=True)


def snapkv_press(plain: PlainModel, case: QualityCase, budget: int) -> Outcome:
    """Kvpress' SnapKVPress on context and question: the window is the question, where kvpress has 64 tokens."""
    from kvpress.presses.snapkv_press import SnapKVPress

    press = SnapKVPress(window_size=len(plain.build(case, case.passages).question))
    return pressed(plain, press, case, budget, [], rotates_keys=False)


def pressed(
    plain: PlainModel, press: Any, case: QualityCase, budget: int, separator: list[int], rotates_keys: bool
) -> Outcome:
    """The answer from what a press leaves of context and question.

    Args:
        plain: The model.
        press: Of kvpress.
        case: What is asked.
        budget: Document tokens in the cache.
        separator: Stands between context and question.
        rotates_keys: Whether the press re-rotates what it keeps to contiguous positions.
    """
    prompt = plain.build(case, case.passages)
    documents = sum(map(len, prompt.passages))
    read = len(_context(prompt))
    kept = read - documents + budget  # the prefix competes, the question stays: see compression_ratio
    press.compression_ratio = compression_ratio(read, kept)
    clock = Clock(plain.loaded.model.device)
    seen = _watch(press, read, kept, plain.loaded.model.device)
    with press(plain.loaded.model):
        cache = plain.read(_context(prompt, separator))
    length = cache.get_seq_length()
    clock.mark()
    text = plain.answer(cache, prompt.tail, length if rotates_keys else read)
    clock.mark()
    read_seconds, answer_seconds = clock.laps()
    alive = seen.tolist() if kept < read else [True] * read
    lengths = [len(tokens) for tokens in prompt.passages]
    kept_ids = passages_with(alive[len(prompt.prefix) :], lengths, case.passages)
    return Outcome(text, kept_ids, length - read + documents, read_seconds, answer_seconds)


def compression_ratio(tokens: int, kept: int) -> float:
    """The ratio at which kvpress keeps so many of so many tokens; it rounds down what a ratio leaves.

    kvpress lets all tokens before the window compete, the prefix too. At the ratio that has room for prefix, question
    and budget the cache is as large as Finch's; where tokens of the prefix go, tokens of passages take their place.

    Args:
        tokens: Read.
        kept: Of them.
    """
    return 0.0 if kept >= tokens else 1 - (kept + 0.5) / tokens


def passages_with(alive: Sequence[bool], lengths: Sequence[int], passages: Sequence[Passage]) -> list[str | None]:
    """Ids of the passages of which a token is alive.

    Args:
        alive: From the first passage's first token on.
        lengths: Tokens of each passage.
        passages: The passages.
    """
    found, start = [], 0
    for passage, length in zip(passages, lengths, strict=True):
        if any(alive[start : start + length]):
            found.append(passage.id)
        start += length
    return found


def _watch(press: Any, read: int, kept: int, device: torch.device) -> torch.Tensor:
    """Marks what a press keeps, in any layer and head; bool of shape [read], filled while the press runs."""
    seen = torch.zeros(read, dtype=torch.bool, device=device)
    score = press.score

    def watched(*args: Any) -> torch.Tensor:
        scores: torch.Tensor = score(*args)  # [1, KV heads, read]
        seen[scores.topk(kept, dim=-1).indices.flatten()] = True
        return scores

    press.score = watched
    return seen


def longllmlingua(plain: PlainModel, case: QualityCase, budget: int) -> Outcome:
    """LongLLMLingua with the same model, then the plain model on what it left."""
    texts = [passage.titled_text for passage in case.passages]
    clock, before = Clock(plain.loaded.model.device), plain.compressor.model.calls
    text = plain.compressor.compress(texts, case.question.question.strip(), budget)
    prompt = plain.build(case, [Passage(text)])
    cache = plain.read(_context(prompt))
    clock.mark()
    answer = plain.answer(cache, prompt.tail, cache.get_seq_length())
    clock.mark()
    read_seconds, answer_seconds = clock.laps()
    kept_ids = [case.passages[place].id for place in plain.compressor.used]
    calls = plain.compressor.model.calls - before + 1
    return Outcome(answer, kept_ids, len(prompt.passages[0]), read_seconds, answer_seconds, calls)


def _context(prompt: Prompt, separator: Sequence[int] = ()) -> list[int]:
    """Everything before the template's end."""
    return [*prompt.prefix, *(t for tokens in prompt.passages for t in tokens), *separator, *prompt.question]
