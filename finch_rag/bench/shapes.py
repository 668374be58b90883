"""Models of a known shape with random weights, and prompts of a given length: what speed and memory need.

Random weights take the time that trained ones take, as every token runs through every weight. What they cannot tell is
what would be kept, so the retrieval heads are laid where they cost most.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from string import ascii_letters

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from ..engine import Finch
from ..errors import FinchError, InputError
from ..heads.alone import ALONE_HEADS
from ..heads.examples import make_examples
from ..heads.pairs import layers_to_search
from ..heads.search import HEADS
from ..models.loading import resolve_device, resolve_dtype
from ..models.own_attention import global_layers, runs_own_attention
from ..prompts.builder import Prompt
from ..prompts.passages import Passage

QUESTION = "Which of the people in these passages was the last director of a museum that stands in a mountain town?"
_QUESTION_TOKENS = 48
_PREFIX_TOKENS = 32
_TAIL_TOKENS = 4
_PASSAGE_TOKENS = (96, 160)  # from, to
_WINDOW = 2**21  # beyond any length that is measured, so that memory alone decides what a method can read


def _llama(*, hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocabulary: int) -> PretrainedConfig:
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        max_position_embeddings=_WINDOW,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        tie_word_embeddings=False,
    )


def _qwen_1_5b() -> PretrainedConfig:
    return Qwen2Config(
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        vocab_size=151_936,
        max_position_embeddings=_WINDOW,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=True,
    )


def _qwen_3_5_8b() -> PretrainedConfig:
    """Linear attention in three of four layers."""
    return AutoConfig.for_model(  # not in all releases of transformers 5
        "qwen3_5_text",
        hidden_size=4096,
        intermediate_size=12_288,
        num_hidden_layers=32,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=256,
        vocab_size=248_320,
        max_position_embeddings=_WINDOW,
        tie_word_embeddings=False,
    )


def _gpt_oss_20b() -> PretrainedConfig:
    """Experts, attention sinks, and a window of 128 tokens in every other layer."""
    return AutoConfig.for_model(
        "gpt_oss",
        hidden_size=2880,
        intermediate_size=2880,
        num_hidden_layers=24,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=64,
        num_local_experts=32,
        num_experts_per_tok=4,
        vocab_size=201_088,
        max_position_embeddings=_WINDOW,
        rope_parameters={"rope_type": "default", "rope_theta": 150_000.0},
        tie_word_embeddings=False,
    )


SHAPES: dict[str, Callable[[], PretrainedConfig]] = {
    "llama-8b": lambda: _llama(hidden=4096, inner=14_336, layers=32, heads=32, kv_heads=8, vocabulary=128_256),
    "llama-1b": lambda: _llama(hidden=2048, inner=8192, layers=16, heads=32, kv_heads=8, vocabulary=128_256),
    "qwen-1.5b": _qwen_1_5b,
    "qwen3.5-8b": _qwen_3_5_8b,
    "gpt-oss-20b": _gpt_oss_20b,
    "tiny": lambda: _llama(hidden=64, inner=128, layers=4, heads=4, kv_heads=2, vocabulary=512),
}


def random_model(shape: str, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """A model with random weights, made on its device.

    Args:
        shape: Of `SHAPES`.
        device: Where to put it.
        dtype: Of its weights.

    Raises:
        InputError: If there is no such shape, or the installed transformers does not know it.
    """
    if shape not in SHAPES:
        raise InputError(f"shape {shape!r} is unknown: use {', '.join(SHAPES)}")
    try:
        config = SHAPES[shape]()
    except ValueError as error:
        raise InputError(f"transformers {transformers.__version__} has no {shape!r}: install a newer one") from error
    with torch.random.fork_rng(), device:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    ready: PreTrainedModel = model.eval()
    return ready


def random_finch(shape: str, compile_layers: bool = False) -> Finch:
    """An engine on a model with random weights, on the first CUDA device or else the CPU.

    Args:
        shape: Of `SHAPES`.
        compile_layers: See `finch_rag.Finch`.

    Raises:
        InputError: If there is no such shape.
    """
    device = resolve_device("auto")
    model = random_model(shape, device, resolve_dtype("auto", device, None))
    finch = Finch(model, byte_tokenizer(), name=shape, compile_layers=compile_layers)
    finch.runtime.heads = worst_heads(model, HEADS)
    finch.runtime.alone_heads = worst_heads(model, ALONE_HEADS)
    return finch


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that takes each byte for a token, for models without one."""
    alphabet = sorted(ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({byte: number for number, byte in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def worst_heads(model: PreTrainedModel, count: int) -> list[tuple[int, int]]:
    """So many heads where scoring costs most and the reading ends last.

    Each is in a layer of its own where there are enough, the last of them in the last layer that heads are looked for
    in; a model that is read by its own attention has fewer layers that can have them.

    Args:
        model: The model.
        count: How many.
    """
    layers = range(layers_to_search(model.config))
    if not runs_own_attention(model):
        return [(layer, 0) for layer in layers[-count:]]
    looking = {layer: shape.heads for layer, shape in global_layers(model).items() if layer in layers}
    pairs = [(layer, head) for layer, heads in looking.items() for head in range(heads)]
    return sorted(pairs, key=lambda pair: (pair[1], -pair[0]))[:count]


def random_prompt(model: PreTrainedModel, tokens: int) -> Prompt:
    """A prompt of random tokens.

    Args:
        model: For its vocabulary.
        tokens: Of all passages together.
    """
    rng = random.Random(0)
    vocabulary = int(model.config.vocab_size)

    def some(count: int) -> list[int]:
        return [rng.randrange(vocabulary) for _ in range(count)]

    passages = [some(length) for length in _passage_lengths(rng, tokens)]
    question = some(_QUESTION_TOKENS)
    return Prompt(some(_PREFIX_TOKENS), passages, question, slice(0, len(question)), some(_TAIL_TOKENS))


def random_passages(tokens: int) -> list[Passage]:
    """Passages of random letters for `byte_tokenizer`, to which each is a token.

    Args:
        tokens: Of all passages together, with the two that end each.
    """
    rng = random.Random(0)
    return [
        Passage("".join(rng.choices(ascii_letters, k=max(1, length - 2)))) for length in _passage_lengths(rng, tokens)
    ]


def made_passages(finch: Finch, tokens: int) -> list[Passage]:
    """Passages of made-up text, for a model with a tokenizer.

    Args:
        finch: Counts their tokens.
        tokens: Of all passages together, at the least.
    """
    found: list[Passage] = []
    seed = 0
    while tokens > 0:
        texts = make_examples(1, 16, seed)[0].passages
        tokens -= sum(map(finch.count_tokens, texts))
        found += [Passage(text) for text in texts]
        seed += 1
    return found


def _passage_lengths(rng: random.Random, tokens: int) -> Iterator[int]:
    while tokens:
        length = min(tokens, rng.randint(*_PASSAGE_TOKENS))
        yield length
        tokens -= length


def text_prompt(finch: Finch, tokens: int) -> Prompt:
    """A prompt of made-up text, for a model with a tokenizer.

    Args:
        finch: Builds it.
        tokens: Of all passages together; the last one is cut.
    """
    texts = [text for seed in range(tokens // 900 + 1) for text in make_examples(1, 16, seed)[0].passages]
    prompt = finch.prompts.build(QUESTION, [Passage(text) for text in texts])
    passages: list[list[int]] = []
    left = tokens
    for passage in prompt.passages:
        if left:
            passages.append(passage[:left])
            left -= len(passages[-1])
    if left:
        raise FinchError(f"the benchmark made {tokens - left} tokens of text where {tokens} were asked for")
    return Prompt(prompt.prefix, passages, prompt.question, prompt.own_tokens, prompt.tail)
