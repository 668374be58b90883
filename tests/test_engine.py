from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from finch_rag.engine import Finch
from finch_rag.errors import FinchError, InputError, ModelError, SettingsError, WindowError
from finch_rag.prefill.planning import Strategy
from finch_rag.prompts.chat_template import Message
from finch_rag.prompts.passages import Passage
from finch_rag.reading import read_request
from finch_rag.resolving import resolve

from .small import ARCHITECTURES, chat_tokenizer, model_of, small_config, small_finch, small_model, texts

QUESTION = "When was the lighthouse built?"


def sums_to_one(shares: list[float]) -> bool:
    return sum(shares) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("selection", ["passage", "token"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_architecture_answers_and_cites(kind: str, selection: Any) -> None:
    answer = small_finch(kind, selection=selection).ask(QUESTION, texts(10))
    assert answer.report.kept_tokens == 60
    assert answer.citations
    assert answer.report.selection == selection


def test_with_room_for_all_the_answer_is_that_of_plain_generation() -> None:
    finch, passages = small_finch(budget=200, max_new_tokens=12), texts(4)
    prompt = finch.prompts.build(QUESTION, [Passage(text) for text in passages], "Answer.", "")
    tokens = [*prompt.prefix, *(t for passage in prompt.passages for t in passage), *prompt.question, *prompt.tail]
    made = small_model().generate(torch.tensor([tokens]), max_new_tokens=12, do_sample=False)[0, len(tokens) :]
    assert finch.ask(QUESTION, passages).text == finch.prompts.decode(made.tolist()).strip()


def test_a_tokenizer_without_chat_template_will_do(untemplated: Any) -> None:
    finch = small_finch(tokenizer=untemplated)
    assert finch.ask(QUESTION, texts(5)).report.new_tokens > 0
    assert finch.ask(QUESTION, instructions="").report.new_tokens > 0


def test_bfloat16_works() -> None:
    finch = Finch(small_model().to(torch.bfloat16), chat_tokenizer(), heads="all", budget=60, chunk_size=64)
    assert finch.ask(QUESTION, texts(10), max_new_tokens=4, reread=False).report.kept_tokens == 60


def test_asking_twice_gives_the_same(finch: Finch) -> None:
    first, second = finch.ask(QUESTION, texts(8)), finch.ask(QUESTION, texts(8))
    assert (first.text, first.citations) == (second.text, second.citations)


def test_the_question_matters(finch: Finch) -> None:
    assert finch.rank(QUESTION, texts(8)) != finch.rank("who built the bridge?", texts(8))


def test_threads_get_what_they_would_get_alone(finch: Finch) -> None:
    questions = [f"{QUESTION} {n}" for n in range(8)]

    def ask(question: str) -> tuple[str, list[Any]]:
        answer = finch.ask(question, texts(8))
        return answer.text, answer.citations

    expected = [ask(question) for question in questions]
    assert len({text for text, _ in expected}) > 1
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(ask, questions)) == expected


def test_two_streams_taken_in_turn_do_not_meet(finch: Finch) -> None:
    questions = (QUESTION, "who built the bridge?")
    expected = [finch.ask(question, texts(8)).text for question in questions]
    streams = [finch.stream(question, texts(8)) for question in questions]
    found = ["", ""]
    for _ in range(20):
        for n, stream in enumerate(streams):
            found[n] += next(stream, "")
    assert found == expected


def test_progress_is_reported_to_engine_and_call() -> None:
    seen: list[tuple[str, int, int]] = []
    finch = small_finch(on_progress=lambda *progress: seen.append(progress))
    answer = finch.ask(QUESTION, texts(8))
    total = answer.report.context_tokens
    assert len(seen) == answer.report.chunks
    assert seen[-1] == ("prefill", total, total)
    own: list[tuple[str, int, int]] = []
    finch.ask(QUESTION, texts(8), on_progress=lambda *progress: own.append(progress))
    assert own == seen


def test_an_error_in_a_progress_callback_reaches_the_caller(finch: Finch) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finch.ask(QUESTION, texts(8), on_progress=stop)
    assert finch.ask(QUESTION, texts(8)).text


@pytest.mark.parametrize("selection", ["passage", "token"])
def test_rank_orders_all_passages_by_shares_that_sum_to_one(finch: Finch, selection: Any) -> None:
    ranked = finch.rank(QUESTION, [Passage(text, id=str(n)) for n, text in enumerate(texts(9))], selection=selection)
    shares = [citation.share for citation in ranked]
    assert sorted(citation.index for citation in ranked) == list(range(9))
    assert all(citation.passage_id == str(citation.index) for citation in ranked)
    assert shares == sorted(shares, reverse=True)
    assert sums_to_one(shares)


@pytest.mark.parametrize("selection", ["passage", "token"])
def test_the_answer_cites_the_ranked_passages_that_were_kept(finch: Finch, selection: Any) -> None:
    ranked = finch.rank(QUESTION, texts(9), selection=selection)
    cited = finch.ask(QUESTION, texts(9), selection=selection, quotes=False).citations
    assert cited == [citation for citation in ranked if citation.kept_tokens]


def test_reading_again_costs_one_more_pass_and_only_where_something_was_evicted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    finch = small_finch(heads="all", reread=True)
    passes: list[int] = []
    model: Any = finch.model
    model.base_model.layers[0].register_forward_pre_hook(lambda layer, args: passes.append(args[0].shape[1]))

    def count(method: Any, **options: Any) -> int:
        passes.clear()
        method(QUESTION, texts(10), chunk_size=100, **options)
        return len(passes)

    once = count(finch.compress, budget=60, reread=False)
    assert count(finch.compress, budget=60) == once + 1
    again = passes[-1]
    report = finch.ask(QUESTION, texts(10)).report
    assert report.prefix_tokens < again <= report.prefix_tokens + 60  # and what was kept
    assert count(finch.compress, budget=60, selection="token") == once
    assert count(finch.rank, budget=60) == once
    assert count(finch.compress, budget=360) == once
    # Before an answer, no pass of its own: what was kept is read together with the question.
    asked = count(finch.ask, budget=60, reread=False, max_new_tokens=1, quotes=False)
    assert count(finch.ask, budget=60, max_new_tokens=1, quotes=False) == asked == once + 1
    assert passes[-1] == again + report.question_tokens
    assert [finch.ask(QUESTION, texts(10), budget=60, reread=value).report.reread for value in (True, False)] == [
        True,
        False,
    ]


def test_a_question_too_long_to_rank_by_is_told_without_an_answers_length(finch: Finch) -> None:
    with pytest.raises(WindowError, match=r"\b512\b: shorten them$"):
        finch.rank("When? " * 300, texts(3))


def test_nothing_to_rank_gives_nothing(finch: Finch) -> None:
    assert finch.rank(QUESTION, []) == []


def test_without_passages_the_model_answers_alone(finch: Finch) -> None:
    answer = finch.ask(QUESTION)
    assert answer.report.selection == "none"
    assert answer.citations == []
    assert (answer.report.passages, answer.report.context_tokens, answer.report.kept_tokens) == (0, 0, 0)
    assert answer.report.heads == ()
    assert answer.report.new_tokens > 0
    assert finch.ask(QUESTION, []).text == answer.text


def test_options_of_a_call_stand_in_for_the_engines(finch: Finch) -> None:
    base = finch.ask(QUESTION, texts(8)).report
    changed = finch.ask(QUESTION, texts(8), budget=33, chunk_size=50, selection="token", max_new_tokens=3).report
    assert (changed.budget, changed.chunk_size, changed.selection, changed.kept_tokens) == (33, 50, "token", 33)
    assert changed.new_tokens <= 3
    assert changed.heads == ()
    assert finch.ask(QUESTION, texts(8), instructions="").report.prefix_tokens < base.prefix_tokens
    assert finch.ask(QUESTION, texts(8), system_prompt="Be brief.").report.prefix_tokens > base.prefix_tokens
    assert finch.ask(QUESTION, texts(8)).report.budget == base.budget


def test_a_long_passage_gets_a_default_budget_that_holds_it() -> None:
    model = small_model(max_position_embeddings=4096)
    finch = Finch(model, chat_tokenizer(), heads="all", instructions="Answer.", system_prompt="", max_new_tokens=4)
    long = " ".join(texts(24))
    answer = finch.ask(QUESTION, [*texts(20), long, *texts(20)], chunk_size=400)
    assert answer.report.budget == len(finch.prompts.build(QUESTION, [Passage(long)]).passages[0]) > 256
    assert all(citation.kept_tokens == citation.passage_tokens for citation in answer.citations)  # read again, whole
    assert finch.ask(QUESTION, [*texts(20), long], selection="token").report.budget == 256


def test_none_stands_for_a_default_in_a_call(finch: Finch) -> None:
    made = finch.ask(QUESTION, texts(8), budget=None, chunk_size=None).report
    assert made.budget > finch.budget  # type: ignore[operator]
    assert made.chunk_size > finch.chunk_size  # type: ignore[operator]


def test_auto_lets_finch_choose_the_chunk_size(finch: Finch) -> None:
    chosen = finch.ask(QUESTION, texts(9), chunk_size="auto").report
    assert chosen.chunk_size == finch.ask(QUESTION, texts(9), chunk_size=None).report.chunk_size
    assert chosen.chunk_size > 64  # the engine's
    assert small_finch(chunk_size="auto").ask(QUESTION, texts(9)).report.chunk_size == chosen.chunk_size


def test_settings_of_the_engine_are_used() -> None:
    brief = small_finch(instructions="Answer.", system_prompt="Be brief.")
    prefix = brief.prompts.decode(brief.prompts.build(QUESTION, [Passage("x")], "Answer.", "Be brief.").prefix)
    made = brief.ask(QUESTION, texts(3)).report
    assert made.prefix_tokens == len(brief.prompts.build(QUESTION, [Passage("x")], "Answer.", "Be brief.").prefix)
    assert "Be brief." in prefix


def test_sampling_options_reach_the_decoder(finch: Finch) -> None:
    def sampled(seed: int) -> str:
        return finch.ask(QUESTION, texts(3), temperature=1.5, top_k=200, top_p=0.99, seed=seed).text

    assert sampled(1) == sampled(1)
    assert len({sampled(seed) for seed in range(4)}) > 1
    greedy = finch.ask(QUESTION, texts(3)).text
    assert finch.ask(QUESTION, texts(3), temperature=2.0, top_k=1).text == greedy
    assert finch.ask(QUESTION, texts(3), stop=None).text == greedy


BAD_CALLS: list[tuple[Any, Any, dict[str, Any], str]] = [
    ("", ["a"], {}, "question is empty"),
    ("  ", ["a"], {}, "question is empty"),
    (None, ["a"], {}, "question"),
    (QUESTION, "one text", {}, "single text"),
    (QUESTION, ["a", None], {}, "passage 1 is NoneType"),
    (QUESTION, [3], {}, "passage 0 is int"),
    (QUESTION, None, {}, "passages"),
    (QUESTION, 42, {}, "passages"),
    (QUESTION, ["a"], {"budget": 0}, "budget is 0"),
    (QUESTION, ["a"], {"budget": -1}, "budget is -1"),
    (QUESTION, ["a"], {"budget": 5000}, r"5000.*512"),
    (QUESTION, ["a"], {"budget": "many"}, "budget"),
    (QUESTION, ["a"], {"budget": 1.5}, "budget"),
    (QUESTION, ["a"], {"chunk_size": 0}, "chunk_size is 0"),
    (QUESTION, ["a"], {"chunk_size": 5000}, r"5000.*512"),
    (QUESTION, ["a"], {"selection": "best"}, "'best'.*'passage'.*'token'"),
    (QUESTION, ["a"], {"max_new_tokens": 0}, "max_new_tokens is 0"),
    (QUESTION, ["a"], {"max_new_tokens": 600}, r"600.*512"),
    (QUESTION, ["a"], {"temperature": -1}, "temperature is -1"),
    (QUESTION, ["a"], {"top_p": 2.0}, "top_p is 2"),
    (QUESTION, ["a"], {"top_k": 0}, "top_k is 0"),
    (QUESTION, ["a"], {"stop": ""}, "stop"),
    (QUESTION, ["a"], {"stop": ["x", ""]}, "stop"),
    ("who built the bridge? " * 100, ["a"], {}, "512"),
]


@pytest.mark.parametrize(("question", "passages", "options", "reason"), BAD_CALLS)
def test_a_bad_call_is_an_input_error_of_one_line(
    finch: Finch, question: Any, passages: Any, options: Any, reason: str
) -> None:
    if options.get("stop") == "":  # an empty stop alone means none
        assert finch.ask(question, passages, **options).text == finch.ask(question, passages).text
        return
    with pytest.raises(InputError, match=reason) as caught:
        finch.ask(question, passages, **options)
    assert "\n" not in str(caught.value)
    assert not isinstance(caught.value, ValueError)


def test_a_misspelt_option_is_not_ignored(finch: Finch) -> None:
    with pytest.raises((TypeError, FinchError), match="budgett"):
        finch.ask(QUESTION, ["a"], budgett=10)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"budget": 0}, "budget is 0"),
        ({"chunk_size": -1}, "chunk_size is -1"),
        ({"chunk_size": "large"}, "chunk_size is 'large': pass a whole number of tokens, or \"auto\""),
        ({"selection": "best"}, "'best'"),
        ({"heads": "some"}, "'some'"),
        ({"heads": [(9, 9)]}, r"\(9, 9\)"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
    ],
)
def test_a_bad_setting_is_a_settings_error(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(SettingsError, match=reason) as caught:
        small_finch(**settings)
    assert isinstance(caught.value, ValueError)
    assert "\n" not in str(caught.value)


TEXT_QA = (  # LlamaIndex's
    "Context information is below.\n---------------------\n{context}\n---------------------\n"
    "Given the context information and not prior knowledge, answer the query.\nQuery: {question}\nAnswer: "
)
HISTORY: list[Any] = [Message(role="user", content="who built it?"), Message(role="assistant", content="Novak.")]


def long_texts(count: int) -> list[str]:
    """Passages that no paragraph rule joins."""
    return [f"{n}: " + " ".join(texts(40)[n::10]) for n in range(count)]


def test_a_known_prompt_is_answered_as_its_parts_are(finch: Finch) -> None:
    whole = finch.chat(TEXT_QA.format(context="\n\n".join(long_texts(4)), question=QUESTION))
    apart = finch.ask(QUESTION, long_texts(4))
    assert (whole.text, whole.citations) == (apart.text, apart.citations)
    assert (whole.report.passages, whole.report.parse_mode) == (4, "llama-index/text-qa")
    assert apart.report.parse_mode == "apart"
    assert whole.to_dict()["report"]["parse_mode"] == "llama-index/text-qa"


def test_a_streamed_chat_is_the_chat(finch: Finch) -> None:
    prompt = TEXT_QA.format(context="\n\n".join(long_texts(4)), question=QUESTION)
    stream = finch.stream_chat(prompt, max_new_tokens=5)
    assert "".join(stream) == stream.answer.text == finch.chat(prompt, max_new_tokens=5).text
    assert stream.answer.report.new_tokens == 5


def test_an_unknown_prompt_is_read_whole_while_it_fits_into_the_window(finch: Finch) -> None:
    prompt = f"{texts(1, longest=90, seed=3)[0]}\n\n{QUESTION}"
    whole = finch.chat(prompt)
    assert finch.count_tokens(prompt) > 64  # the engine's chunk size
    assert (whole.report.parse_mode, whole.report.passages) == ("whole", 0)
    assert finch.chat(prompt, instructions="").text == finch.ask(prompt, instructions="").text
    long = "\n\n".join([*texts(40, longest=40), QUESTION])
    with pytest.warns(UserWarning, match="is taken as the question"):
        report = finch.chat(long, max_new_tokens=1).report
    assert (report.parse_mode, report.notes) == (
        "kept ends",
        ("the passages came as one text: parted at blank lines",),
    )
    with pytest.raises(InputError, match="pass the passages apart"):
        finch.chat(long, strict=True)


def test_a_passage_without_text_is_counted_and_never_read(finch: Finch) -> None:
    passages = [" \n", *texts(8), ""]
    answer, plain = finch.ask(QUESTION, passages), finch.ask(QUESTION, texts(8))
    assert answer.text == plain.text
    assert [citation.index - 1 for citation in answer.citations] == [citation.index for citation in plain.citations]
    assert answer.report.notes == ("2 of 10 passages had no text: skipped",)
    many = finch.ask_many([QUESTION, "why?"], passages)
    assert [one.report.notes for one in many] == [answer.report.notes] * 2
    assert [citation.share for citation in finch.rank(QUESTION, passages)][-2:] == [0, 0]
    nothing = finch.ask(QUESTION, ["", " "])
    assert (nothing.citations, nothing.report.context_tokens) == ([], 0)


def test_passages_given_apart_win_over_those_in_a_prompt(finch: Finch) -> None:
    prompt = TEXT_QA.format(context="The bridge.", question=QUESTION)
    answer = finch.chat(prompt, [Passage("the coast", id="mine")])
    assert (answer.report.parse_mode, answer.report.passages) == ("apart", 1)
    assert [citation.passage_id for citation in answer.citations] == ["mine"]
    assert answer.text == finch.ask(prompt, ["the coast"]).text


def test_a_conversation_is_its_history_system_prompt_and_question(finch: Finch) -> None:
    messages = [Message(role="system", content="Be brief."), *HISTORY, Message(role="user", content=QUESTION)]
    found = finch.chat(messages, texts(8))
    expected = finch.ask(QUESTION, texts(8), history=HISTORY, system_prompt="Be brief.")
    assert (found.text, found.citations) == (expected.text, expected.citations)
    assert found.text != finch.ask(QUESTION, texts(8)).text
    own = finch.chat(messages, texts(8), system_prompt="", history=())
    assert (own.text, own.report.prefix_tokens) == (
        finch.ask(QUESTION, texts(8)).text,
        finch.ask(QUESTION, texts(8)).report.prefix_tokens,
    )


def test_history_is_read_before_the_passages_and_never_evicted(finch: Finch) -> None:
    without, with_history = (finch.ask(QUESTION, texts(12), history=turns).report for turns in ((), HISTORY))
    frame = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>\n"
    turns = finch.tokenizer(frame.format(*(turn["content"] for turn in HISTORY)))["input_ids"]
    assert with_history.prefix_tokens - without.prefix_tokens == len(turns)
    assert with_history.kept_tokens == without.kept_tokens == 60
    assert finch.compress(QUESTION, texts(12), history=HISTORY).prefix == with_history.prefix_tokens
    assert finch.rank(QUESTION, texts(12), history=HISTORY) != finch.rank(QUESTION, texts(12))


@pytest.mark.parametrize(("passages", "kept_whole"), [(1, True), (9, False)])
def test_a_paragraph_that_may_be_an_instruction_is_never_evicted(finch: Finch, passages: int, kept_whole: bool) -> None:
    context = "\n\n".join([*long_texts(passages), "Answer in French."])
    system = f"Use the following pieces of context to answer the user's question.\n----------------\n{context}"
    messages = [Message(role="system", content=system), Message(role="user", content=QUESTION)]
    report = finch.chat(messages, max_new_tokens=1).report
    assert report.parse_mode == "langchain/stuff-chat"
    assert (report.kept_tokens == report.context_tokens) == kept_whole
    assert report.passages == passages + kept_whole
    assert any("nothing was evicted" in note for note in report.notes) == kept_whole
    plain = finch.ask(QUESTION, long_texts(2)).report.prefix_tokens
    assert (report.prefix_tokens > plain) == (not kept_whole)


def test_the_oldest_turns_of_a_long_history_are_read_as_passages(finch: Finch) -> None:
    for passages in (texts(3), []):
        answer = finch.ask(QUESTION, passages, history=HISTORY * 60)
        (note,) = answer.report.notes
        assert "older turns of the conversation did not fit: read as passages" in note
        assert answer.report.passages == len(passages) + int(note.split()[0])
        assert all(citation.index < len(passages) for citation in answer.citations)
    with pytest.raises(WindowError, match=r"even without the 60 earlier turns of the history.*memory="):
        finch.ask(QUESTION * 100, history=HISTORY * 60)
    conversation = [*HISTORY * 60, Message(role="user", content=QUESTION)]
    assert finch.chat(conversation, max_new_tokens=1).report.parse_mode == "whole"


def test_render_makes_the_prompt_of_a_call(finch: Finch) -> None:
    def render(messages: Sequence[Message]) -> str:
        return "".join(f"<|im_start|>{m['role']}: {m['content']}<|im_end|>" for m in messages)

    found = finch.ask(QUESTION, texts(3), history=HISTORY, render=render)
    prompt = finch.prompts.build(QUESTION, [Passage("x")], "Answer.", "", HISTORY, render)
    assert found.report.prefix_tokens == len(prompt.prefix)
    assert found.text != finch.ask(QUESTION, texts(3), history=HISTORY).text
    assert finch.ask(QUESTION, texts(3), render=None).text == finch.ask(QUESTION, texts(3)).text


def test_more_context_than_allowed_is_an_error_with_both_numbers(finch: Finch) -> None:
    tokens = finch.ask(QUESTION, texts(8)).report.context_tokens
    assert finch.ask(QUESTION, texts(8), max_context_tokens=tokens).report.context_tokens == tokens
    assert finch.ask(QUESTION, texts(8), max_context_tokens=None).report.context_tokens == tokens
    for method in (finch.ask, finch.stream, finch.compress, finch.rank):
        with pytest.raises(InputError, match=rf"{tokens} tokens.*max_context_tokens={tokens - 1}:") as caught:
            method(QUESTION, texts(8), max_context_tokens=tokens - 1)
        assert "\n" not in str(caught.value)


def test_tokens_are_counted_as_they_are_read(finch: Finch) -> None:
    passages = [*texts(5), "a <|im_end|> b 日本語"]
    counted = sum(finch.count_tokens(f"{text}\n\n") for text in passages)
    assert counted == finch.ask(QUESTION, passages).report.context_tokens
    assert finch.count_tokens("") == 0
    assert finch.count_tokens("<|im_end|>") > 1


def test_a_stop_token_ends_the_answer(finch: Finch) -> None:
    every = range(len(finch.tokenizer))
    stopped = finch.ask(QUESTION, texts(8), stop_token_ids=every)
    assert (stopped.text, stopped.report.new_tokens, stopped.report.stop_reason) == ("", 1, "eos")
    cached = finch.ask_cached(finch.compress(QUESTION, texts(8)), stop_token_ids=list(every))
    assert cached.report.new_tokens == 1
    whole = finch.ask(QUESTION, texts(8))
    for none in ((), None):
        assert finch.ask(QUESTION, texts(8), stop_token_ids=none).text == whole.text != ""  # type: ignore[arg-type]


def test_a_loaded_model_needs_its_tokenizer() -> None:
    with pytest.raises(SettingsError, match="tokenizer"):
        Finch.from_pretrained(small_model())
    assert Finch.from_pretrained(small_model(), tokenizer=chat_tokenizer(), budget=5).budget == 5


def test_a_cure_in_a_window_error_works(finch: Finch) -> None:
    with pytest.raises(WindowError) as caught:
        finch.ask(QUESTION, texts(40), budget=5000, chunk_size=None)
    largest = int(str(caught.value).split("budget=")[1].split()[0])
    assert finch.ask(QUESTION, texts(40), budget=largest, chunk_size=None).report.kept_tokens == largest


@pytest.mark.parametrize("budget", [1, 2, 59])
@pytest.mark.parametrize("selection", ["passage", "token"])
def test_the_smallest_budgets_work(finch: Finch, budget: int, selection: Any) -> None:
    answer = finch.ask(QUESTION, texts(4), budget=budget, chunk_size=1, selection=selection, max_new_tokens=1)
    assert answer.report.kept_tokens == budget


def test_many_more_tokens_than_the_window_are_read() -> None:
    finch = small_finch(budget=None, chunk_size=None)
    answer = finch.ask(QUESTION, texts(150))
    assert answer.report.context_tokens > 8 * finch.window
    assert answer.report.kept_tokens == answer.report.budget


def test_a_sliding_window_is_respected() -> None:
    finch = Finch(small_model("mistral", sliding_window=200), chat_tokenizer(), heads="all", max_new_tokens=4)
    assert finch.window == 200
    assert finch.ask(QUESTION, texts(30)).report.context_tokens > 800


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 512}),  # attention sinks
        ("gemma2", {}),  # soft-capped attention
        ("deepseek_v3", {"n_routed_experts": 4, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1}),  # MLA
        ("qwen3_next", {}),  # linear attention
        ("minimax", {"num_local_experts": 4, "layer_types": ["linear_attention", "full_attention"]}),  # its own cache
        ("stablelm", {}),  # hands no keyword to its attention
        ("nemotron", {}),
    ],
)
def test_a_model_is_run_right_or_refused_when_the_engine_is_built(kind: str, changes: dict[str, Any]) -> None:
    try:
        model = model_of(small_config(kind, **changes), "eager")
        heads: dict[str, Any] = {"heads": "all", "alone_heads": [(1, 0)]}
        finch = Finch(model, chat_tokenizer(), budget=200, chunk_size=90, max_new_tokens=4, **heads)
    except ModelError as error:
        assert "\n" not in str(error)  # noqa: PT017
        return
    prompt = finch.prompts.build(QUESTION, [Passage(text) for text in texts(4)])
    tokens = [*prompt.prefix, *(t for passage in prompt.passages for t in passage), *prompt.question, *prompt.tail]
    with torch.inference_mode():
        expected = model_of(small_config(kind, **changes), "eager")(torch.tensor([tokens])).logits[0, -1]
        # Everything fits, so that nothing is chosen and all of it is read.
        request = resolve(finch.runtime, QUESTION, [Passage(text) for text in texts(4)], finch.settings)
        cache = read_request(finch.runtime, request)
        ending = torch.tensor([[*cache.take_unread(), *prompt.question, *prompt.tail]])
        found = finch.model(ending, past_key_values=cache.fork(ending.shape[1])).logits[0, -1]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.embedded
@pytest.mark.parametrize(("asked", "strategy", "passes"), [("auto", "independent", 1), ("loop", "loop", 2)])
def test_the_embedded_model_finds_a_needle(embedded: Finch, asked: Strategy, strategy: str, passes: int) -> None:
    passages = [
        f"The {name} Museum in {town} was opened in {year} by the painter {person}."
        for name, town, year, person in zip(
            "Amber Coral Falcon Garnet Heron Ivory Jade Lantern Onyx Pearl".split(),
            "Elmsworth Linwood Redcliff Millbrook Oakhurst Riverton Saltmarsh Valewood Pinecrest Kingsport".split(),
            range(1851, 1951, 10),
            "Novak Kessler Brandt Petrov Okafor Sandoval Lockhart Fontaine Grimaldi Eklund".split(),
            strict=True,
        )
    ]
    answer = embedded.ask("Who opened the Heron Museum?", passages, budget=96, chunk_size=128, strategy=asked)
    assert answer.citations[0].index == 4
    assert answer.report.strategy == strategy
    assert answer.report.chunks >= passes
    assert answer.report.compression_factor > 1.5
    assert answer.text


@pytest.mark.parametrize(
    ("heads", "selection", "deepest"), [([(0, 1)], "passage", 0), ([(0, 1)], "token", 1), ("all", "passage", 1)]
)
def test_ranking_runs_no_layer_above_the_last_head(heads: Any, selection: Any, deepest: int) -> None:
    finch = small_finch(heads=heads)
    expected = [(c.index, c.kept_tokens) for c in finch.rank(QUESTION, texts(9), selection=selection)]
    assert any(kept for _, kept in expected)
    reached: list[int] = []
    layers: Any = finch.model.base_model.layers
    for number, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda _, args, number=number: reached.append(number))
    chunks = finch.ask(QUESTION, texts(9), selection=selection).report.chunks
    for passages in (texts(9), texts(2)):  # with and without eviction
        reached.clear()
        finch.rank(QUESTION, passages, selection=selection)
        assert max(reached) == deepest
    reached.clear()
    finch.rank(QUESTION, texts(9), selection=selection)
    assert reached.count(0) == chunks  # and no re-prefill


def test_a_ranking_is_the_order_of_a_full_reading() -> None:
    finch = small_finch(heads=[(0, 1)])
    shares = {citation.index: citation.share for citation in finch.rank(QUESTION, texts(12))}
    read = finch.compress(QUESTION, texts(12), reread=False)
    assert [shares[n] for n in range(12)] == pytest.approx(list(read.document.shares), abs=1e-6)


def test_a_callers_list_of_heads_is_copied() -> None:
    pairs = [(0, 1)]
    finch = small_finch(heads=pairs)
    pairs.append((1, 2))
    assert finch.heads == [(0, 1)]
    assert finch.retrieval_heads() == {0: [1]}


@pytest.mark.parametrize("strategy", ["loop", "independent"])
def test_the_cutoff_says_how_many_passages_are_answered_from(strategy: Any) -> None:
    finch = small_finch(reread=True, budget=200, cutoff=1)
    one = finch.ask(QUESTION, texts(40), strategy=strategy)
    several = finch.ask(QUESTION, texts(40), strategy=strategy, cutoff=0)
    assert len([cited for cited in one.citations if cited.kept_tokens]) == 1
    assert len([cited for cited in several.citations if cited.kept_tokens]) > 3
    assert several.report.kept_tokens <= 200
    assert finch.cutoff == 1
