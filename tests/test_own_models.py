"""Models whose keys Finch cannot move: their own attention and cache, each passage read alone."""

from __future__ import annotations

from threading import Barrier, Thread
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import CONFIG_MAPPING

from finch_rag import Finch, InputError, ModelError, Passage
from finch_rag.decode.generation import Decoder
from finch_rag.models.forward import forward_own
from finch_rag.models.own_attention import global_layers, use_own_attention
from finch_rag.models.own_cache import OwnCache
from finch_rag.prefill import alone
from finch_rag.prefill.alone import NEUTRAL, AloneReader, Asked
from finch_rag.prefill.head_keys import KeyBlock, attention_on
from finch_rag.prefill.own_reader import OwnReader, reader_of
from finch_rag.reading import read_request
from finch_rag.resolving import resolve

from .families import variant_of
from .small import chat_tokenizer, model_of, small_model, texts

QUESTION = "who built the bridge?"
WINDOW = 1024

_MOE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "head_dim": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
}
# Each with a layer of attention over everything first, so that its attention can be compared with the model's own.
FAMILIES: dict[str, dict[str, Any]] = {
    "gemma2": {  # soft caps
        "layer_types": ["full_attention", "sliding_attention"],
        "sliding_window": 16,
        "attn_logit_softcapping": 1.5,
    },
    "gemma3_text": {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 16},  # two rotary bases
    "gpt_oss": {  # sinks
        "layer_types": ["full_attention", "sliding_attention"],
        "sliding_window": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "qwen3_next": {
        **_MOE,
        "layer_types": ["full_attention", "linear_attention"],
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "shared_expert_intermediate_size": 32,
    },
    "gpt2": {},  # learned positions
    "deepseek_v3": {**_LATENT, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "deepseek_v32": {  # an indexer, which chooses all here
        **_LATENT,
        "n_group": 1,
        "topk_group": 1,
        "mlp_layer_types": ["dense", "sparse"],
        "layer_types": ["indexed_attention"] * 2,
        "index_topk": WINDOW,
        "index_head_dim": 16,
        "index_n_heads": 2,
    },
    "stablelm": {},  # hands no keyword to its attention
    # Attention that is written out: heads beside the batch, or in it; keys shared by heads; scaled queries or products
    "gptj": {"rotary_dim": 8},
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 16},
    "falcon": {"new_decoder_architecture": False, "multi_query": True, "ffn_hidden_size": 96},
    "xglm": {"d_model": 64, "ffn_dim": 96, "num_layers": 2, "attention_heads": 4, "init_std": 0.2},
}
WRITTEN_OUT = ("gptj", "gpt_neo", "falcon", "xglm")
# The first transformers that runs a family on the cache of all others; before it, the family is refused.
SINCE = {"qwen3_next": Version("5.5"), "falcon_h1": Version("5.5"), "openai-gpt": Version("5.5")}


def family(kind: str) -> Any:
    require(kind)
    model = small_model(kind, attention="eager", max_position_embeddings=WINDOW, **FAMILIES[kind])
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            with torch.no_grad():
                parameter.copy_(torch.linspace(2, 30, len(parameter)))  # some pay a good part to nothing
    return model


def require(kind: str) -> None:
    """Skips a test where the installed transformers cannot run a family as Finch needs it."""
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    if kind in SINCE and Version(transformers.__version__) < SINCE[kind]:
        pytest.skip(f"transformers {transformers.__version__} runs {kind} on a cache of its own, until {SINCE[kind]}")


def new_finch(kind: str, **changes: Any) -> Finch:
    settings = {"alone_heads": [(0, 1), (0, 2)], "budget": 80, "max_new_tokens": 6, **changes}
    return Finch(family(kind), chat_tokenizer(), name=kind, **settings)


@pytest.fixture(params=list(FAMILIES))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_the_model_computes_what_it_did(kind: str) -> None:
    plain, watched = family(kind), family(kind)
    layers = use_own_attention(watched)
    assert 0 in layers
    tokens = torch.arange(5, 60)[None]
    with torch.inference_mode():
        torch.testing.assert_close(watched(tokens).logits, plain(tokens).logits, atol=1e-4, rtol=1e-4)


def test_a_question_pays_to_a_passage_what_the_model_says(kind: str) -> None:
    """In the first layer, where a question that does not see the passage has the same queries as one that does."""
    finch = new_finch(kind)
    assert finch.runtime.no_loop
    reader = reader_of(finch.model, finch.runtime.alone_prefix, {0: [1, 3]})
    assert isinstance(reader, OwnReader)
    passage = finch.prompts.encode(texts(1))[0]
    questions = [Asked.by(finch.prompts, question) for question in (QUESTION, NEUTRAL)]
    found = attention_on(
        reader.look(questions[0], questions[1], len(passage)),
        [KeyBlock(reader.encode([passage]), None, [len(passage)])],
    )
    plain, means = family(kind), []
    for asked in questions:
        tokens = torch.tensor([[*reader.prefix, *passage, *asked.tokens]])
        with torch.inference_mode():
            attentions = plain(tokens, output_attentions=True).attentions
        weights = next(each for each in attentions if each is not None)[0]  # [heads, queries, keys]
        own = weights[:, -len(asked.tokens) :][:, asked.own]
        means.append(own[..., len(reader.prefix) : len(reader.prefix) + len(passage)].sum(-1).mean(-1)[[1, 3]])
    count = len(range(*questions[0].own.indices(len(questions[0].tokens))))
    expected = count * ((means[0] - means[1]).relu() + 1e-3 * means[0]).sum()
    torch.testing.assert_close(found[0], expected, atol=1e-5, rtol=1e-3)


def test_the_answer_is_the_plain_models_on_what_was_kept(kind: str) -> None:
    finch = new_finch(kind)
    request = resolve(finch.runtime, QUESTION, [Passage(text) for text in texts(20)], finch.settings)
    cache = read_request(finch.runtime, request)
    assert isinstance(cache, OwnCache)
    assert 0 < cache.kept_tokens <= 80
    document = [token for passage in request.prompt.passages for token in passage]
    tokens = [*request.prompt.prefix, *(document[place] for place in cache.kept[0].tolist()), *request.answer_prompt]
    writer = finch.runtime.writer(request.sampling)
    "".join(Decoder(finch.model, cache, request.answer_prompt, writer, new_tokens=6))
    plain, expected = family(kind), list(tokens)
    with torch.inference_mode():
        for _ in writer.token_ids:
            expected.append(int(plain(torch.tensor([expected])).logits[0, -1].argmax()))
    assert writer.token_ids == expected[len(tokens) :]
    answer = finch.ask(QUESTION, texts(20))
    assert answer.text == finch.ask_many([QUESTION, "when?"], texts(20))[0].text
    assert "".join(finch.stream(QUESTION, texts(20))) == answer.text
    assert answer.report.strategy == "independent"
    assert answer.report.kv_bytes_kept > 0


def test_padding_and_passes_make_no_difference(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    finch = new_finch(kind)
    reader = finch.runtime.alone_reader()
    passages = finch.prompts.encode(texts(8))
    together = reader.encode(passages)
    apart = torch.cat([reader.encode([passage]) for passage in passages], 1)
    torch.testing.assert_close(together, apart, atol=1e-4, rtol=1e-3)
    usual = finch.ask(QUESTION, texts(20))
    monkeypatch.setattr(alone, "_TOKENS_PER_PASS", {"cpu": 60})
    assert finch.ask(QUESTION, texts(20)).text == usual.text


def test_a_store_ranks_alike(kind: str) -> None:
    finch = new_finch(kind)
    with finch.open_store() as store:
        known, new = finch.rank(QUESTION, texts(20), store=store), finch.rank(QUESTION, texts(20))
        shares = {cited.index: cited.share for cited in new}
        for cited in known:  # its keys are rounded
            assert cited.share == pytest.approx(shares[cited.index], abs=0.03)
        report = finch.ask(QUESTION, store=store).report
        assert report.searched_tokens == sum(cited.passage_tokens for cited in known)
        assert 0 < report.kept_tokens <= 80


def test_where_everything_fits_nothing_is_left_out(kind: str) -> None:
    finch = new_finch(kind, budget=400)
    report = finch.ask(QUESTION, texts(6)).report
    assert report.kept_tokens == report.context_tokens > 0
    assert finch.ask("hello?").report.strategy == "none"
    assert finch.ask_many(["hello?", QUESTION], [[], texts(6)])[1].report.kept_tokens == report.kept_tokens


def test_what_needs_the_loop_says_so(kind: str) -> None:
    finch = new_finch(kind)
    for options in ({"strategy": "loop"}, {"selection": "token"}, {"reread": False}, {"shortlist_tokens": 100}):
        wanted: dict[str, Any] = options
        with pytest.raises(InputError, match=rf"^{next(iter(wanted))}.* needs the loop, and {kind} cannot run it"):
            finch.ask(QUESTION, texts(20), **wanted)
    with pytest.raises(InputError, match="keeps passages in a cache of its own"):
        finch.compress(QUESTION, texts(20))
    assert len(finch.rank(QUESTION, texts(9))) == 9
    with pytest.raises(InputError, match="cannot be read by the loop"):
        _ = finch.runtime.rotation


@pytest.mark.slow
def test_heads_are_found_in_layers_that_see_everything(kind: str) -> None:
    finch = new_finch(kind, alone_heads="auto")
    layers = set(global_layers(finch.model))
    assert set(finch.runtime.alone_reader().heads) <= layers
    assert isinstance(finch.runtime.alone_reader(), AloneReader)


def test_an_engine_for_the_loop_stays_below_the_sliding_window() -> None:
    changes: dict[str, Any] = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 2048}
    settings: dict[str, Any] = {"heads": [(1, 0)], "alone_heads": [(1, 0)], "budget": 80, "max_new_tokens": 4}

    def engine(**more: Any) -> Finch:
        return Finch(
            small_model("cohere2", max_position_embeddings=4096, **changes), chat_tokenizer(), **settings, **more
        )

    whole, held = engine(), engine(strategy="loop")
    assert (whole.window, held.window) == (4096, 2048)
    assert whole.runtime.no_loop.startswith("layers of cohere2 see 2048 of 4096 tokens only; one made with")
    assert held.ask(QUESTION, texts(20)).report.strategy == "loop"
    assert held.ask(QUESTION, texts(20), strategy="independent").report.strategy == "independent"
    assert whole.ask(QUESTION, texts(20)).report.strategy == "independent"


def test_heads_of_layers_that_see_a_part_are_refused() -> None:
    finch = new_finch("gemma2", alone_heads=[(1, 0)])
    with pytest.raises(InputError, match=r"layer 1 of Gemma2ForCausalLM has no attention over everything.*layers 0$"):
        finch.ask(QUESTION, texts(20))


@pytest.mark.parametrize("kind", ["mamba", "bloom", "bert"])
def test_a_model_that_cannot_be_read_alone_is_refused(kind: str) -> None:
    reasons = r"has no layer whose softmax attention|no window|does not compute the same in several steps"
    with pytest.raises(ModelError, match=reasons):
        Finch(small_model(kind, attention="eager"), chat_tokenizer())


@pytest.mark.parametrize(
    ("variant", "reason"),
    [
        ("falcon, alibi", "has no layer whose softmax attention"),
        ("mpt", "has no layer whose softmax attention"),
        ("openai-gpt", "does not compute the same in several steps"),
        ("minimax_m3_vl_text, sparse", "chooses blocks of tokens"),
    ],
)
def test_attention_that_is_more_than_products_is_refused(variant: str, reason: str) -> None:
    require(variant.split(",")[0])
    model = model_of(variant_of(variant), "eager")
    before = model.config._attn_implementation
    with pytest.raises(ModelError, match=reason):
        Finch(model, chat_tokenizer())
    if reason.startswith("has no layer"):
        assert model.config._attn_implementation == before


@pytest.mark.parametrize(("kind", "masked_by"), [("deepseek_v32", "finch_own_sdpa"), ("hy_v4", "finch_own_eager")])
def test_what_an_indexer_leaves_out_is_left_out(kind: str, masked_by: str) -> None:
    require(kind)
    plain, watched = (model_of(variant_of(f"{kind}, sparse"), "eager") for _ in range(2))
    use_own_attention(watched)
    assert watched.config._attn_implementation == masked_by  # by a mask of true and false, or one that is added
    tokens = torch.arange(5, 60)[None]
    with torch.inference_mode():
        expected = plain(tokens).logits
        torch.testing.assert_close(watched(tokens).logits, expected, atol=1e-4, rtol=1e-4)
        for name, module in plain.named_modules():
            if name.endswith("indexer"):
                module.index_topk = 60  # rather than 16
        assert not torch.allclose(plain(tokens).logits, expected, atol=1e-2)


def seen(model: Any, token_ids: torch.Tensor, barrier: Barrier | None = None) -> dict[int, torch.Tensor]:
    """Keys by layer of a pass; with a barrier, it waits in every layer for the other threads."""
    found: dict[int, torch.Tensor] = {}

    def observe(layer: int, query: torch.Tensor, key: torch.Tensor, *of_scores: Any, **more_of_scores: Any) -> None:
        if barrier is not None:
            barrier.wait(30)
        assert layer not in found
        found[layer] = key.clone()

    forward_own(model, token_ids, observe)
    return found


@pytest.mark.parametrize("kind", ["gpt2", "stablelm", "gptj"])
def test_threads_see_their_own_passes_only(kind: str) -> None:
    model = family(kind)
    use_own_attention(model)
    passes = [torch.arange(5, 25)[None], torch.arange(40, 60)[None]]
    expected = [seen(model, tokens) for tokens in passes]
    found: dict[int, dict[int, torch.Tensor]] = {}
    barrier = Barrier(2)

    def read(number: int) -> None:
        found[number] = seen(model, passes[number], barrier)

    threads = [Thread(target=read, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(2):
        assert set(found[number]) == set(expected[number]) == {0, 1}
        for layer, key in expected[number].items():
            torch.testing.assert_close(found[number][layer], key)
    assert not torch.equal(expected[0][0], expected[1][0])


@pytest.mark.parametrize("kind", ["stablelm", "gptj"])
def test_nobody_looks_on_after_an_observer_failed(kind: str) -> None:
    model, calls = family(kind), []
    use_own_attention(model)

    def fail(layer: int, *states: Any, **extras: Any) -> None:
        calls.append(layer)
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        forward_own(model, torch.arange(5, 25)[None], fail)
    with torch.inference_mode():
        model(torch.arange(5, 25)[None])
    assert calls == [0]


def test_layers_that_share_a_module_are_counted() -> None:
    model = model_of(variant_of("zamba"), "eager")
    assert list(use_own_attention(model)) == [0, 1]
    keys = seen(model, torch.arange(5, 25)[None])
    assert keys[0].shape == keys[1].shape
    assert not torch.allclose(keys[0], keys[1], atol=1e-2)


def test_layers_that_are_written_to_see_a_part_are_not_looked_at() -> None:
    assert list(use_own_attention(family("gpt_neo"))) == [0]


@pytest.mark.parametrize("kind", WRITTEN_OUT)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_are_recognized_in_half_precision(kind: str, dtype: torch.dtype) -> None:
    assert 0 in use_own_attention(family(kind).to(dtype))


def test_a_model_gets_a_cache_of_the_class_in_its_file() -> None:
    finch = Finch(model_of(variant_of("minimax"), "eager"), chat_tokenizer(), budget=200, alone_heads=[(1, 0)])
    request = resolve(finch.runtime, QUESTION, [Passage(text) for text in texts(4)], finch.settings)
    cache = read_request(finch.runtime, request)
    assert isinstance(cache, OwnCache)
    assert "MiniMaxCache" in [kind.__name__ for kind in type(cache).__mro__]
    steps = Decoder(
        finch.model, cache.fork(9), request.answer_prompt, finch.runtime.writer(request.sampling), new_tokens=3
    )
    "".join(steps)
    assert cache.length == 0
    answer = finch.ask(QUESTION, texts(4), max_new_tokens=3)
    assert answer.report.kept_tokens == answer.report.context_tokens
