from __future__ import annotations

from typing import Any

import pytest
import torch

from finch_rag.models.attention import use_finch_attention
from finch_rag.models.cache import CompressedCache
from finch_rag.models.forward import forward
from finch_rag.prefill.scoring import QuestionObserver, passage_sums, question_attention

from .small import ARCHITECTURES, small_model

TOKENS = torch.arange(3, 43) % 37 + 5
PAST, QUESTION, OWN = 24, 9, slice(2, 8)  # 24 tokens in the cache, then 7 of a chunk and 9 of the question


def observed(kind: str, heads: Any = None, own: slice = OWN, evictable: slice = slice(0, 31)) -> QuestionObserver:
    model = small_model(kind)
    use_finch_attention(model)
    cache = CompressedCache(model.config.num_hidden_layers, len(TOKENS))
    observer = QuestionObserver(question_tokens=QUESTION, own_tokens=own, evictable=evictable, heads=heads)
    with torch.inference_mode():
        forward(model, TOKENS[:PAST], cache)
        forward(model, TOKENS[PAST:], cache, observer)
    return observer


def eager_attention(kind: str) -> tuple[torch.Tensor, ...]:
    """Attention weights of every layer, each [heads, tokens, tokens]."""
    with torch.inference_mode():
        output = small_model(kind, "eager")(TOKENS[None], output_attentions=True)
    return tuple(layer[0] for layer in output.attentions)


def own_weights(layer: torch.Tensor) -> torch.Tensor:
    return layer[:, len(TOKENS) - QUESTION :][:, OWN]


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_scores_are_eager_attention_of_the_questions_own_weights(kind: str) -> None:
    expected = torch.stack([own_weights(layer)[..., :31].sum(dim=(0, 1)) for layer in eager_attention(kind)])
    observer = observed(kind)
    torch.testing.assert_close(observer.by_layer(), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(observer.total(), expected.sum(0), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_only_the_given_heads_are_summed(kind: str) -> None:
    expected = own_weights(eager_attention(kind)[1])[[0, 3]][..., :31].sum(dim=(0, 1))
    observer = observed(kind, heads={1: [0, 3]})
    assert set(observer.scores) == {1}
    torch.testing.assert_close(observer.by_layer(), expected[None], atol=1e-5, rtol=1e-4)


def test_only_the_evictable_tokens_are_scored() -> None:
    assert torch.equal(observed("llama", evictable=slice(5, 20)).by_layer(), observed("llama").by_layer()[:, 5:20])


def test_tokens_outside_the_question_do_not_count() -> None:
    parts = [observed("llama", own=slice(token, token + 1)).by_layer() for token in range(2, 8)]
    torch.testing.assert_close(torch.stack(parts).sum(0), observed("llama").by_layer())


def test_every_token_of_question_attention_sums_to_one_and_sees_no_future() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(1, 4, 12, 16), torch.randn(1, 2, 30, 16)
    weights = question_attention(query, key, 0.25, question_tokens=5, own_tokens=slice(1, 4), heads=[3, 0])
    assert weights.shape == (2, 3, 30)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3))
    for token in range(3):
        first_future = 30 - 5 + 1 + token + 1
        assert bool((weights[:, token, first_future:] == 0).all())
        assert bool((weights[:, token, :first_future] > 0).all())


def test_scores_are_float32_in_a_bfloat16_model() -> None:
    query, key = torch.randn(1, 4, 6, 16, dtype=torch.bfloat16), torch.randn(1, 2, 9, 16, dtype=torch.bfloat16)
    assert question_attention(query, key, 0.25, 3, slice(0, 3)).dtype == torch.float32


def test_passage_sums_add_the_tokens_of_each_passage() -> None:
    scores = torch.tensor([[1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 30.0, 40.0]])
    alike = passage_sums(scores, torch.tensor([[0, 0, 2, 2]]), 4)
    assert alike.tolist() == [[3, 0, 7, 0], [30, 0, 70, 0]]
    own = passage_sums(scores, torch.tensor([[0, 0, 2, 2], [0, 1, 1, 3]]), 4)
    assert own.tolist() == [[3, 0, 7, 0], [10, 50, 0, 40]]
