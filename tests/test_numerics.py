"""NaN and infinity, in weights, caches and stores: an error of one line by every way of asking, and never an answer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import pytest
import torch

from finch_rag.decode.generation import Writer, choose_together
from finch_rag.decode.sampling import Sampling
from finch_rag.engine import Finch
from finch_rag.errors import NumericsError
from finch_rag.heads.alone import find_alone_heads
from finch_rag.heads.search import find_heads
from finch_rag.models.finite import nan_where_hidden, not_finite, zero_or_nan
from finch_rag.prefill.head_keys import KeyBlock, Look, attention_on
from finch_rag.prefill.scoring import question_attention
from finch_rag.prompts.passages import Passage

from .small import chat_tokenizer, small_model, texts

QUESTION, OTHER = "When was the lighthouse built?", "Who drew the maps?"
PASSAGES = [Passage(text, id=str(number)) for number, text in enumerate(texts(8))]
VALUES = (float("nan"), float("inf"), float("-inf"))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAST = 1  # layer that ranks
HEADS = [(0, 1), (LAST, 2)]
# Rows of a weight that the heads above use: the second of head 2, and of the keys that it shares.
_ROWS = {"q_proj": 2 * 16 + 1, "k_proj": 16 + 1, "v_proj": 16 + 1}
_BEHIND = ("v_proj", "o_proj", "mlp", "post_attention_layernorm")  # in a layer, what its attention does not need


def engine(dtype: torch.dtype) -> Finch:
    model = small_model(num_hidden_layers=3, max_position_embeddings=1024).to(dtype)
    return Finch(
        model,
        chat_tokenizer(),
        budget=60,
        chunk_size=64,
        heads=HEADS,
        alone_heads=HEADS,
        max_new_tokens=4,
        instructions="Answer.",
        system_prompt="",
        quotes=False,
    )


def searched(finch: Finch) -> object:
    with finch.open_store() as store:
        store.add(PASSAGES)
        return store.search(QUESTION)


def asked_of_store(finch: Finch) -> object:
    with finch.open_store() as store:
        return finch.ask(QUESTION, PASSAGES, store=store).text


def chatted(finch: Finch) -> object:
    return finch.chat([{"role": "user", "content": QUESTION}], PASSAGES).text


RANKS: Mapping[str, Callable[[Finch], object]] = {
    "rank": lambda finch: finch.rank(QUESTION, PASSAGES),
    "rank alone": lambda finch: finch.rank(QUESTION, PASSAGES, strategy="independent"),
    "search": searched,
}
ANSWERS: Mapping[str, Callable[[Finch], object]] = {
    "ask by the loop": lambda finch: finch.ask(QUESTION, PASSAGES, strategy="loop").text,
    "ask alone": lambda finch: finch.ask(QUESTION, PASSAGES, strategy="independent").text,
    "ask without passages": lambda finch: finch.ask(QUESTION).text,
    "stream": lambda finch: list(finch.stream(QUESTION, PASSAGES, temperature=1.0, seed=1)),
    "penalty": lambda finch: finch.ask(QUESTION, PASSAGES, repetition_penalty=1.2).text,
    "ask many by the loop": lambda finch: finch.ask_many([QUESTION, OTHER], PASSAGES, strategy="loop"),
    "ask many": lambda finch: finch.ask_many([QUESTION, OTHER], PASSAGES),
    "ask a store": asked_of_store,
    "ask a cache": lambda finch: finch.ask_cached(finch.compress(QUESTION, PASSAGES), OTHER).text,
    "chat": chatted,
    "quotes": lambda finch: finch.ask(QUESTION, PASSAGES, quotes=True).text,
}
FEW = ("rank", "rank alone", "search", "ask by the loop", "ask many", "ask a cache")


def is_unused(way: str, name: str) -> bool:
    """Whether a way of asking needs no number of a weight."""
    if way not in RANKS:
        return False
    if ".layers." not in name:
        return name in ("model.norm.weight", "lm_head.weight")
    layer, part = int(name.split(".")[2]), name.split(".", 3)[3]
    return layer > LAST or (layer == LAST and any(own in part for own in _BEHIND))


def place_in(name: str, weight: torch.Tensor) -> tuple[int, ...]:
    if "embed" in name:
        return chat_tokenizer()("Question: When was")["input_ids"][0], 3
    row = next((own for part, own in _ROWS.items() if part in name), 3)
    return (row, *[5] * (weight.dim() - 1))


WEIGHTS = [name for name, _ in small_model(num_hidden_layers=3).named_parameters()]


@cache
def poisoned_engine(dtype: torch.dtype) -> Finch:
    """Each test that uses it gives its weights back."""
    return engine(dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", WEIGHTS)
def test_one_number_that_is_not_finite_is_an_error_wherever_it_is_used(name: str, dtype: torch.dtype) -> None:
    finch = poisoned_engine(dtype)
    weight = finch.model.get_parameter(name)
    place = place_in(name, weight)
    ways = {**RANKS, **ANSWERS}
    chosen = ways if dtype == torch.float32 else {way: ways[way] for way in FEW}
    before = weight[place].item()
    answers = []
    for value in VALUES:
        for way, ask in chosen.items():
            if is_unused(way, name):
                continue
            weight.data[place] = value
            if "\n" in (told := error_of(ask, finch)) or not told:
                answers.append((way, value))
            weight.data[place] = before
    assert answers == []
    assert finch.rank(QUESTION, PASSAGES)[0].share > 0  # the engine goes on


def error_of(ask: Callable[[Finch], object], finch: Finch) -> str:
    """What a way of asking is refused with; empty where it is not."""
    try:
        ask(finch)
    except NumericsError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("way", RANKS)
def test_a_weight_that_is_not_used_changes_no_rank(way: str) -> None:
    finch = poisoned_engine(torch.float32)
    clean = RANKS[way](finch)
    for name in WEIGHTS:
        if is_unused(way, name):
            weight = finch.model.get_parameter(name)
            place = place_in(name, weight)
            before = weight[place].item()
            weight.data[place] = float("nan")
            assert RANKS[way](finch) == clean
            weight.data[place] = before


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("which", ["keys", "values"])
def test_a_cache_with_a_number_that_is_not_finite_gives_no_answer(which: str, value: float, dtype: torch.dtype) -> None:
    finch = poisoned_engine(dtype)
    cache = finch.compress(QUESTION, PASSAGES)
    clean = finch.ask_cached(cache, OTHER).text
    for layer in range(3):
        for token in (0, cache.length - 1):
            bad = copy.deepcopy(cache)
            getattr(bad.layers[layer], which)[0, 1, token, 3] = value
            with pytest.raises(NumericsError, match="logits are NaN or infinite at token 0") as caught:
                finch.ask_cached(bad, OTHER)
            assert "\n" not in str(caught.value)
    assert finch.ask_cached(cache, OTHER).text == clean


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
@pytest.mark.parametrize("value", VALUES)
def test_a_store_keeps_no_keys_that_are_not_finite(value: float, precision: Any) -> None:
    finch = poisoned_engine(torch.float32)
    weight = finch.model.get_parameter("model.layers.1.self_attn.k_proj.weight")
    place = place_in("k_proj", weight)
    before = weight[place].item()
    with finch.open_store(precision=precision) as store:
        weight.data[place] = value
        try:
            with pytest.raises(NumericsError, match="keys of these passages are NaN or infinite"):
                store.add(PASSAGES)
        finally:
            weight.data[place] = before
        assert len(store) == 0
        store.add(PASSAGES)
        assert len(store.search(QUESTION)) == len(PASSAGES)


@pytest.mark.parametrize("value", VALUES)
def test_keys_of_a_store_that_are_not_finite_rank_nothing(value: float) -> None:
    torch.manual_seed(0)
    look = Look(torch.randn(2, 4, 8), torch.ones(2, 1, dtype=torch.bool), torch.zeros(2, 4), 2, 0.3)
    keys = torch.randn(2, 6, 8)
    clean = attention_on(look, [KeyBlock(keys, None, [3, 3])])
    for softcap in (None, 20.0):
        capped = Look(look.queries, look.present, look.elsewhere, 2, 0.3, softcap)
        for group in range(2):
            bad = keys.clone()
            bad[group, 4, 1] = value
            assert not attention_on(capped, [KeyBlock(bad, None, [3, 3])]).isfinite().all()
    assert torch.equal(attention_on(look, [KeyBlock(keys, None, [3, 3])]), clean)


def test_a_product_of_minus_infinity_is_not_hidden_by_the_softmax() -> None:
    torch.manual_seed(0)
    query, key = torch.rand(1, 2, 6, 8) + 0.1, torch.rand(1, 1, 6, 8) + 0.1
    clean = question_attention(query, key, 1.0, 3, slice(0, 3))
    assert clean.isfinite().all()
    key[0, 0, 1, 2] = float("-inf")
    assert question_attention(query, key, 1.0, 3, slice(0, 3)).isnan().all()


def test_products_that_overflow_in_half_precision_are_an_error() -> None:
    finch = engine(torch.float16)
    with torch.no_grad():
        for layer in finch.model.model.layers:
            layer.self_attn.q_proj.weight *= 400
            layer.self_attn.k_proj.weight *= 400
    for ask in (RANKS["rank"], RANKS["rank alone"], RANKS["search"]):
        with pytest.raises(NumericsError):
            ask(finch)


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0), Sampling(repetition_penalty=1.5)])
def test_a_logit_that_is_not_finite_ends_an_answer(sampling: Sampling, value: float) -> None:
    logits = torch.randn(1, 40)
    fine = Writer(sampling, frozenset(), lambda ids: "x" * len(ids))
    fine.push(logits)
    assert len(fine.token_ids) == 1
    logits[0, 7] = value
    with pytest.raises(NumericsError, match="logits are NaN or infinite at token 0 of the answer"):
        Writer(sampling, frozenset(), lambda ids: "x").push(logits)
    own = Writer(sampling, frozenset(), lambda ids: "x")
    [choice] = choose_together([own], [logits])
    assert isinstance(choice, torch.Tensor)
    assert choice[1] == 1


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("find", [find_heads, find_alone_heads])
def test_no_heads_are_found_in_a_model_that_computes_none(find: Callable[..., object], value: float) -> None:
    model = small_model(max_position_embeddings=1024)
    model.model.layers[0].self_attn.k_proj.weight.data[3, 5] = value
    with pytest.raises(NumericsError, match="attention is NaN or infinite"):
        find(model, chat_tokenizer(), 2, 2)


def test_what_is_finite_is_told_for_every_dtype() -> None:
    for dtype in DTYPES:
        numbers = torch.tensor([[1.0, -2.0], [torch.finfo(dtype).max, torch.finfo(dtype).min]], dtype=dtype)
        assert not not_finite(numbers)
        assert not_finite(numbers, -1).tolist() == [False, False]
        assert zero_or_nan([numbers, numbers[:, :1]], torch.device("cpu")) == 0
        for value in VALUES:
            bad = numbers.clone()
            bad[1, 0] = value
            assert not_finite(bad)
            assert not_finite(bad, -1).tolist() == [False, True]
            assert zero_or_nan([numbers, bad], torch.device("cpu")).isnan()
            assert nan_where_hidden(bad.float()).isnan().all(-1).tolist() == [False, True]
        assert torch.equal(nan_where_hidden(numbers.float()), numbers.float())
    assert zero_or_nan([], torch.device("cpu")) == 0
