"""Retrieval heads: the few attention heads whose attention finds the passage that answers a question.

In a language model most heads look at syntax, at neighbours or at the first token. A handful in the middle and late
layers look at what the question asks for, and those alone rank passages far better than all heads together. They are a
property of the model, found once by what they do on examples (see `finch_rag.head_examples`) and then remembered under
a fingerprint of the model in the user's cache. The embedded model's are part of the package.

Heads are looked for in the lower two thirds of the layers: they rank as well as those of all layers (see
docs/benchmarks.md), and a first reading that only chooses passages ends at the last of them.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from .attention import SeenEnough, input_embedding, use_finch_attention
from .cache import CompressedCache
from .errors import FinchError, InputError, ModelError, WindowError
from .forward import forward
from .head_examples import HeadExample, make_examples
from .paths import cache_folder, write_atomically
from .planning import RetrievalHeads, window_of
from .prompt import Passage, PromptBuilder
from .scoring import passage_sums, question_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Heads = Literal["auto", "all"] | Sequence[tuple[int, int]]

HEADS = 8
EXAMPLES = 24
PASSAGES = 10
_FORMAT = 1

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class HeadScore:
    """How well one head finds the passage that answers.

    Attributes:
        layer: Its layer.
        head: Its number in the layer.
        score: Attention of the question's tokens on the right passage minus their mean on a passage, averaged over
            question tokens and examples; between -1 and 1.
    """

    layer: int
    head: int
    score: float


def find_heads(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    n: int = HEADS,
    examples: int | Sequence[HeadExample] = EXAMPLES,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[HeadScore]:
    """The ``n`` heads that look most at the passage that holds the answer.

    Args:
        model: A model with rotary positions. It is switched to Finch's attention, which computes the same as SDPA.
        tokenizer: Its tokenizer.
        n: Heads to return, at least 1, of those in the lower two thirds of the layers.
        examples: Examples to average over: one's own, or how many to make.
        on_progress: Called with the examples done and in all.

    Returns:
        Heads by falling score.

    Raises:
        InputError: If ``n`` is not between 1 and the number of heads in those layers, or there is no example.
        WindowError: If the model's window has no room for one of one's own examples.
        ModelError: If it has none for an example that is made.
    """
    layers, per_layer = layers_to_search(model.config), model.config.num_attention_heads
    if not 1 <= n <= layers * per_layer:
        raise InputError(
            f"n is {n}: the model has {layers * per_layer} heads in the lower two thirds of its layers, ask for 1 to "
            f"{layers * per_layer}"
        )
    use_finch_attention(model)
    builder = PromptBuilder(tokenizer)
    window = window_of(model.config)
    if isinstance(examples, int):
        examples = _examples_that_fit(builder, examples, window)
    else:
        _check_fit(builder, examples, window)
    scores = torch.zeros(layers, per_layer)
    for number, example in enumerate(examples, 1):
        attention = _attention_by_passage(model, builder, example)  # [layers, heads, passages]
        scores += (attention[..., example.gold] - attention.mean(dim=-1)) / len(examples)
        on_progress(number, len(examples))
    best = scores.flatten().topk(n)
    return [
        HeadScore(index // per_layer, index % per_layer, value)
        for index, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def resolve_heads(
    heads: Heads,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> RetrievalHeads | None:
    """The heads to rank passages with.

    Args:
        heads: "auto" looks them up and finds them at the first use of a model, "all" sums all heads, pairs of
            (layer, head) are taken as given.
        model: The model.
        tokenizer: Its tokenizer.
        name: What to call the model in messages.
        on_progress: Called while heads are found.

    Returns:
        Heads by layer, or None for all.
    """
    if heads == "all":
        return None
    if isinstance(heads, str):
        pairs = load_heads(model)
        if pairs is None:
            _log.warning(
                "finding the retrieval heads of %s on %d examples; this happens once, the result is kept in %s",
                name,
                EXAMPLES,
                _user_file(fingerprint(model)),
            )
            to_search = layers_to_search(model.config) * model.config.num_attention_heads
            found = find_heads(model, tokenizer, min(HEADS, to_search), on_progress=on_progress)
            try:
                save_heads(model, name, found)
            except OSError as error:
                _log.warning("the heads of %s cannot be stored (%s); they will be found again next time", name, error)
            pairs = [(score.layer, score.head) for score in found]
        return heads_by_layer(pairs)
    return heads_by_layer(heads)


def check_heads(heads: Any, config: Any, error: type[FinchError] = InputError) -> None:
    """Raises ``error`` if ``heads`` is not "auto", "all" or pairs of (layer, head) that the model has.

    Args:
        heads: What a user passed.
        config: The model's configuration.
        error: What to raise.
    """
    if heads in ("auto", "all"):
        return
    if isinstance(heads, str) or not isinstance(heads, Iterable):
        raise error(f'heads is {heads!r}: use "auto", "all" or a list of (layer, head) pairs')
    pairs = list(heads)
    if not pairs:
        raise error('heads is empty: name at least one (layer, head) pair, or use "all"')
    layers, per_layer = config.num_hidden_layers, config.num_attention_heads
    for pair in pairs:
        whole = isinstance(pair, Sequence) and len(pair) == 2 and all(isinstance(number, int) for number in pair)
        if not whole or not (0 <= pair[0] < layers and 0 <= pair[1] < per_layer):
            raise error(f"head {pair!r} does not exist: the model has layers 0 to {layers - 1} of {per_layer} heads")


def layers_to_search(config: Any) -> int:
    """Layers that heads are looked for in, from the lowest: two thirds of all, rounded up.

    Args:
        config: The model's configuration.
    """
    return -(-2 * int(config.num_hidden_layers) // 3)


def heads_by_layer(pairs: Iterable[tuple[int, int]]) -> dict[int, list[int]]:
    """(layer, head) pairs as heads by layer, each once."""
    by_layer: dict[int, list[int]] = {}
    for layer, head in sorted({(int(layer), int(head)) for layer, head in pairs}):
        by_layer.setdefault(layer, []).append(head)
    return by_layer


def fingerprint(model: PreTrainedModel) -> str:
    """Identifies a model's weights, whatever dtype and device they are loaded in.

    Hashes the architecture's sizes, all vectors, the first row of each matrix and the first rows of the input
    embedding, in bfloat16.
    """
    config = model.config
    digest = hashlib.sha256()
    sizes = ("model_type", "num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size")
    digest.update(json.dumps([getattr(config, size, None) for size in sizes]).encode())
    embedding = input_embedding(model)
    first, parts = embedding, []
    for parameter, weight in _weights(model):
        if parameter is embedding:
            first = weight[:256]
        if weight.is_floating_point() and weight.numel():
            parts.append(weight if weight.dim() == 1 else weight.flatten(0, -2)[0])  # a matrix's first row
    for part in (first[:256], *parts):
        digest.update(part.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _weights(model: PreTrainedModel) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
    """Each parameter, once, with its value; accelerate keeps those that it offloads elsewhere until a module runs."""
    seen: set[int] = set()
    for module in model.modules():
        own = {n: p for n, p in module.named_parameters(recurse=False) if id(p) not in seen}
        seen.update(map(id, own.values()))
        if any(parameter.is_meta for parameter in own.values()):
            from accelerate.utils import align_module_device

            with align_module_device(module, torch.device("cpu")):
                values = {name: getattr(module, name).detach() for name in own}
        else:
            values = {name: parameter.detach() for name, parameter in own.items()}
        for name, parameter in own.items():
            value = values[name]
            plain = type(value) in (torch.Tensor, torch.nn.Parameter)
            yield parameter, value if plain else value.dequantize()  # torchao's classes know few operations


def load_heads(model: PreTrainedModel) -> list[tuple[int, int]] | None:
    """The heads stored for a model by the user or shipped with the package, None if there are none."""
    name = f"{fingerprint(model)}.json"
    for file in (cache_folder("heads") / name, resources.files("finch_rag") / "shipped_heads" / name):
        try:
            stored = json.loads(file.read_text(encoding="utf-8"))
            if stored["format"] == _FORMAT:
                pairs = [(int(layer), int(head)) for layer, head, _ in stored["heads"]]
                check_heads(pairs, model.config)
                return pairs
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError, KeyError, TypeError, InputError) as error:
            _log.warning("%s cannot be read (%s); its heads are found again", file, error)
    return None


def save_heads(model: PreTrainedModel, name: str, heads: Sequence[HeadScore]) -> Path:
    """Stores a model's heads in the user's cache.

    Args:
        model: The model.
        name: Written into the file for people who read it.
        heads: By falling score.

    Returns:
        The file.
    """
    file = _user_file(fingerprint(model))
    content = {"format": _FORMAT, "model": name, "heads": [[h.layer, h.head, round(h.score, 5)] for h in heads]}
    write_atomically(file, json.dumps(content, indent=1) + "\n")
    return file


def _user_file(model_fingerprint: str) -> Path:
    return cache_folder("heads") / f"{model_fingerprint}.json"


def _examples_that_fit(builder: PromptBuilder, count: int, window: int) -> list[HeadExample]:
    """Examples with as many passages as the window takes, at most ``PASSAGES``."""
    for passages in range(PASSAGES, 1, -2):
        made = make_examples(count, passages)
        if all(_tokens(builder, example) <= window for example in made):
            return made
    raise ModelError(
        f"the model's window of {window} tokens has no room for two example passages, so its retrieval heads cannot "
        'be found; use heads="all" or name them'
    )


def _check_fit(builder: PromptBuilder, examples: Sequence[HeadExample], window: int) -> None:
    if not examples:
        raise InputError("there are no examples: pass at least one")
    for number, example in enumerate(examples, 1):
        if (tokens := _tokens(builder, example)) > window:
            raise WindowError(
                f"example {number} ({example.question!r}) has {tokens} tokens, and the model's window is {window}: "
                "give it fewer or shorter passages"
            )


def _tokens(builder: PromptBuilder, example: HeadExample) -> int:
    prompt = builder.build(example.question, [Passage(text) for text in example.passages])
    return len(prompt.prefix) + sum(map(len, prompt.passages)) + len(prompt.question)


@torch.inference_mode()
def _attention_by_passage(model: PreTrainedModel, builder: PromptBuilder, example: HeadExample) -> torch.Tensor:
    """Mean attention of the question's tokens on each passage, shape [layers to search, heads, passages]."""
    layers = layers_to_search(model.config)
    prompt = builder.build(example.question, [Passage(text) for text in example.passages])
    lengths = torch.tensor([len(passage) for passage in prompt.passages])
    passage_of = torch.repeat_interleave(torch.arange(len(lengths)), lengths)[None]
    document = slice(len(prompt.prefix), len(prompt.prefix) + len(passage_of[0]))
    by_layer: dict[int, torch.Tensor] = {}

    def observe(layer: int, query: torch.Tensor, key: torch.Tensor, scaling: float) -> None:
        weights = question_attention(query, key, scaling, len(prompt.question), prompt.question_rows)
        by_layer[layer] = passage_sums(weights.mean(dim=1)[:, document], passage_of, len(lengths)).cpu()
        if layer == layers - 1:
            raise SeenEnough

    tokens = [*prompt.prefix, *(token for passage in prompt.passages for token in passage), *prompt.question]
    forward(model, torch.tensor(tokens), CompressedCache(layers, len(tokens)), observe)
    return torch.stack([by_layer[layer] for layer in sorted(by_layer)])
