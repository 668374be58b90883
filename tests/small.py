"""Small models, tokenizers and texts that the tests share. All offline, all the same at every run."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from finch_rag.engine import Finch
from finch_rag.prompts.builder import Prompt, PromptBuilder
from finch_rag.prompts.passages import Passage

from .families import WITHOUT

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
CONTROL = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCABULARY = 400
CONVERTS = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.6"),
    reason=f"transformers {transformers.__version__} cannot convert the embedded model, 5.6 can",
)

_TEXT = (
    "The harbour of Elmsworth was built in 1874 by the engineer Clara Novak, who had drawn maps of the coast. "
    "Answer the question in a few words, using the passages below. Question: who built the bridge? Answer: "
    "The museum opened in 1931 and holds a large collection of instruments; its director is Hugo Kessler. "
    "A system of canals carries water from the river to the town, where the steamer Heron was launched. "
    "user assistant When was the lighthouse lit for the first time? In the winter of 1902, after a long drought."
)


@cache
def chat_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a ChatML template."""
    return _tokenizer(CHATML)


@cache
def plain_tokenizer() -> PreTrainedTokenizerFast:
    """The same without a chat template."""
    return _tokenizer(None)


def tokenizer_with(template: str | None) -> PreTrainedTokenizerFast:
    """The same with another chat template."""
    return _tokenizer(template)


def _tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(CONTROL),
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
        min_frequency=1,
    )
    tokenizer.train_from_iterator([_TEXT], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = template
    return fast


def small_config(kind: str = "llama", **changes: Any) -> Any:
    """A decoder's configuration: 2 layers, 4 heads on 2 key/value heads, a window of 512."""
    sizes = {
        "vocab_size": len(chat_tokenizer()),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,  # large, so that attention is far from uniform
        "bos_token_id": None,
        "eos_token_id": chat_tokenizer().eos_token_id,
        "pad_token_id": chat_tokenizer().pad_token_id,
        "tie_word_embeddings": False,
    }
    known = {name: size for name, size in sizes.items() if name not in WITHOUT.get(kind, ())}
    return AutoConfig.for_model(kind, **{**known, **changes})


def small_model(kind: str = "llama", attention: str = "sdpa", seed: int = 0, **changes: Any) -> Any:
    """A decoder with random float32 weights; the same arguments give the same weights, whatever the attention."""
    return model_of(small_config(kind, **changes), attention, seed)


def model_of(config: Any, attention: str = "sdpa", seed: int = 0) -> Any:
    """A decoder of a given configuration with random float32 weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.dim() == 1:  # norms start as ones and biases as zeros, which would hide mistakes
                    weight.add_(0.1 * torch.randn(weight.shape))
                if "q_norm" in name or "k_norm" in name:
                    weight.mul_(2)
    return model.eval()


def texts(count: int, seed: int = 0, longest: int = 24) -> list[str]:
    """Passages of 4 to ``longest`` words, all different."""
    rng = random.Random(seed)
    words = _TEXT.replace(".", "").replace(",", "").split()
    return [f"{n}: " + " ".join(rng.choices(words, k=rng.randint(4, longest))) + "." for n in range(count)]


def small_prompt(
    passages: Sequence[str], question: str = "When was the lighthouse built?", tokenizer: Any = None
) -> Prompt:
    """A prompt over passages, with short instructions."""
    builder = PromptBuilder(tokenizer or chat_tokenizer())
    return builder.build(question, [Passage(text) for text in passages], instructions="Answer.", system_prompt="")


def small_finch(kind: str = "llama", tokenizer: Any = None, seed: int = 0, **settings: Any) -> Finch:
    """An engine on a small model, with settings under which every call evicts."""
    chosen = {
        "budget": 60,
        "chunk_size": 64,
        "heads": [(0, 1), (1, 2)],
        "reread": False,  # so that the whole budget is in use
        "max_new_tokens": 8,
        "instructions": "Answer.",  # short, to leave room in the small window
        "system_prompt": "",
        **settings,
    }
    return Finch(small_model(kind, seed=seed), tokenizer or chat_tokenizer(), name="small", **chosen)
