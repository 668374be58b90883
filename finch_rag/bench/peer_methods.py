"""The peers' ways of reading many passages, with the prompts and the decoding of Finch.

`finch_rag.bench.peers` runs them. Their packages are imported where they are used, since only its environment has them.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
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

    def read(self, token_ids: list[int], cache: DynamicCache | None = None) -> DynamicCache:
        """The cache of a text that is read at once, behind what a cache already holds."""
        cache = DynamicCache() if cache is None else cache
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


def expected_attention_press(plain: PlainModel, case: QualityCase, budget: int) -> Outcome:
    """Kvpress' ExpectedAttentionPress on the context; the question comes after, as in kvpress' pipeline."""
    from kvpress.presses.expected_attention_press import ExpectedAttentionPress

    return pressed(plain, ExpectedAttentionPress(), case, budget, [], rotates_keys=False, sees_question=False)


def kvzip_press(plain: PlainModel, case: QualityCase, budget: int) -> Outcome:
    """Kvpress' KVzipPress on the context; the question comes after.

    It evicts nothing: what would go is masked, in each layer and KV head other tokens, and the cache keeps its length.
    ``kv_tokens`` is the mean of what is not masked; memory and seconds are not those of so small a cache.
    """
    from kvpress.presses import kvzip_press as kvzip

    prompt = plain.build(case, case.passages)
    context, model = _before_question(prompt), plain.loaded.model
    read, prefix = len(context), len(prompt.prefix)
    # kvpress evicts what the template says before a message: KVzip keeps it, so all of the prefix is a sink here.
    press = kvzip.KVzipPress(compression_ratio=1 - min(prefix + budget, read) / read, n_sink=prefix)
    kvzip.AutoTokenizer = SimpleNamespace(from_pretrained=lambda _: plain.loaded.tokenizer)  # it loads one a question
    clock = Clock(model.device)
    try:
        with press(model):
            press.prefix_length = prefix  # entering measures the template with its own system prompt
            cache = plain.read(context)
        clock.mark()
        *behind, last = [*prompt.question, *prompt.tail]
        _read_behind_masks(plain, behind, cache)
        text = plain.answer(cache, [last], read + len(behind))
        clock.mark()
        alive = _unmasked(model, read)
    finally:
        for layer in model.model.layers:
            layer.self_attn.masked_key_indices = None  # kvpress does so when the next prompt is read, at the earliest
    read_seconds, answer_seconds = clock.laps()
    lengths = [len(tokens) for tokens in prompt.passages]
    kept_ids = passages_with(alive.any(dim=(0, 1)).tolist()[prefix:], lengths, case.passages)
    kept = round(float(alive.double().mean(dim=(0, 1)).sum()))
    return Outcome(text, kept_ids, kept - prefix, read_seconds, answer_seconds)


def _read_behind_masks(plain: PlainModel, token_ids: list[int], cache: DynamicCache) -> None:
    """Reads on behind masked keys: one by one if need be, since kvpress' search for a mask may fail on many queries."""
    read = cache.get_seq_length()
    try:
        plain.read(token_ids, cache)
    except ValueError:
        layers: Any = cache.layers
        for layer in layers:  # some have read the tokens, some have not
            layer.keys, layer.values = layer.keys[:, :, :read], layer.values[:, :, :read]
        for token in token_ids:
            plain.read([token], cache)


def _unmasked(model: Any, read: int) -> torch.Tensor:
    """What KVzipPress has left unmasked; bool of shape [layers, KV heads, read]."""
    config = model.config
    alive = torch.ones(config.num_hidden_layers, config.num_key_value_heads, read, dtype=torch.bool)
    for kept, layer in zip(alive, model.model.layers, strict=True):
        masked = getattr(layer.self_attn, "masked_key_indices", None)
        if masked is not None:
            _, heads, places = masked
            kept[heads.cpu(), places.cpu()] = False
    return alive


def pressed(
    plain: PlainModel,
    press: Any,
    case: QualityCase,
    budget: int,
    separator: list[int],
    rotates_keys: bool,
    sees_question: bool = True,
) -> Outcome:
    """The answer from what a press leaves of the context, and of the question where it sees it.

    Args:
        plain: The model.
        press: Of kvpress.
        case: What is asked.
        budget: Document tokens in the cache.
        separator: Stands between context and question.
        rotates_keys: Whether the press re-rotates what it keeps to contiguous positions.
        sees_question: Whether the question is read with the context, or behind what the press left of it.
    """
    prompt = plain.build(case, case.passages)
    documents = sum(map(len, prompt.passages))
    context, tail = _context(prompt, separator), prompt.tail
    if not sees_question:
        context, tail = _before_question(prompt), [*prompt.question, *prompt.tail]
    read = len(context) - len(separator)  # which is cut out
    kept = read - documents + budget  # the prefix competes, the question stays: see compression_ratio
    press.compression_ratio = compression_ratio(read, kept)
    clock = Clock(plain.loaded.model.device)
    seen = _watch(press, read, kept, plain.loaded.model.device)
    with press(plain.loaded.model):
        cache = plain.read(context)
    length = cache.get_seq_length()
    clock.mark()
    text = plain.answer(cache, tail, length if rotates_keys else read)
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


def _before_question(prompt: Prompt) -> list[int]:
    """Prefix and passages."""
    return [*prompt.prefix, *(t for tokens in prompt.passages for t in tokens)]


def _context(prompt: Prompt, separator: Sequence[int] = ()) -> list[int]:
    """Everything before the template's end."""
    return [*_before_question(prompt), *separator, *prompt.question]
