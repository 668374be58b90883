"""LongLLMLingua (arXiv 2310.06839) on a model that is already loaded. Needs llmlingua, see `finch_rag.bench.peers`.

llmlingua 0.2.2 takes and hands back caches as lists of (keys, values), which transformers left behind: 4.57 fails with
"'list' object has no attribute 'get_seq_length'", 5.2 with "too many values to unpack". `ListCaches` is all that it
needs to run again.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from unicodedata import normalize

import torch
from llmlingua import PromptCompressor
from transformers import DynamicCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# What the authors' documentation gives for LongLLMLingua.
SETTINGS = {
    "condition_in_question": "after_condition",
    "reorder_context": "sort",
    "dynamic_context_compression_ratio": 0.3,
    "condition_compare": True,
    "context_budget": "+100",
    "rank_method": "longllmlingua",
}


@dataclass(frozen=True, slots=True)
class ListOutput:
    """What a forward pass hands back.

    Attributes:
        logits: Of shape [1, tokens, vocabulary], float32, as models gave them when llmlingua was written.
        past_key_values: A pair of keys and values for each layer.
    """

    logits: torch.Tensor
    past_key_values: list[tuple[torch.Tensor, torch.Tensor]]


@dataclass(slots=True)
class ListCaches:
    """A model whose caches are lists of keys and values.

    Attributes:
        model: The model.
        calls: Forward passes so far.
    """

    model: PreTrainedModel
    calls: int = field(default=0, init=False)

    def __call__(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        past_key_values: list[tuple[torch.Tensor, torch.Tensor]] | None,
        use_cache: bool,
    ) -> ListOutput:
        """A forward pass; the list that is passed stays as it is."""
        self.calls += 1
        cache = DynamicCache(past_key_values)
        output = self.model(
            input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=use_cache
        )
        layers: list[Any] = cache.layers
        return ListOutput(output.logits.float(), [(layer.keys, layer.values) for layer in layers])


class LoadedCompressor(PromptCompressor):
    """A compressor on a loaded model. Its parent's constructor would load another, and fetch OpenAI's vocabulary.

    Attributes:
        used: Places of the passages that the last call kept something of, best first.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model = ListCaches(model)
        # llmlingua asserts that decoding gives back the text, and some tokenizers take the space before a "?" away.
        self.tokenizer = copy.deepcopy(tokenizer)
        self.tokenizer.clean_up_tokenization_spaces = False
        self.oai_tokenizer = self.tokenizer  # counts tokens for a report that nobody reads
        self.device = model.device
        self.max_position_embeddings = model.config.max_position_embeddings
        self.use_llmlingua2 = False
        self.cache_bos_num = 10  # the parent's own
        self.prefix_bos_num = 100
        self.context_idxs: list[list[int]] = []
        self.used: list[int] = []

    def control_context_budget(self, context: list[str], *args: Any, **options: Any) -> Any:
        """The parent's choice of whole passages, remembered."""
        chosen = super().control_context_budget(context, *args, **options)
        self.used = list(chosen[2])
        return chosen

    def compress(self, texts: list[str], question: str, tokens: int) -> str:
        """The texts in about so many tokens.

        Args:
            texts: Passages.
            question: What they are read for.
            tokens: The target, which llmlingua may miss.
        """
        self.used = list(range(len(texts)))  # a single passage is not chosen
        # The same assertion fails where a tokenizer reads the normal form of a text, as Qwen's does.
        texts, question = [normalize("NFC", text) for text in texts], normalize("NFC", question)
        result = self.compress_prompt(texts, question=question, target_token=tokens, concate_question=False, **SETTINGS)
        return str(result["compressed_prompt"])
