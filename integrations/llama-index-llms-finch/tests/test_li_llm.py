from __future__ import annotations

import copy
import gc
import json
import pickle
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from li_support import (
    OTHER_QUESTION,
    QUESTION,
    counted_passes,
    engine,
    finch_llm,
    listening,
    new_engine,
    passages,
    whole_text,
    wrapped,
)
from llama_index.core import PromptTemplate
from llama_index.core.callbacks import (
    CallbackManager,
    CBEventType,
    EventPayload,
    LlamaDebugHandler,
    TokenCountingHandler,
)
from llama_index.core.llms import ChatMessage
from llama_index.llms.finch import FinchLLM, PassagesMessage

from finch_rag import Finch, InputError, ModelError, SettingsError, WindowError
from finch_rag.models.cache import CompressedCache
from finch_rag.prompts.builder import Prompt
from finch_rag.prompts.parsing import ParsedPrompt
from tests.small import CONTROL, chat_tokenizer, plain_tokenizer, small_model

MESSAGE = PassagesMessage(QUESTION, passages())
LOADING: dict[str, Any] = {"device_map": "cpu", "max_new_tokens": 8, "model_kwargs": {"dtype": "float32"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A saved model that knows no retrieval heads: asked without passages only."""
    path = tmp_path_factory.mktemp("model")
    small_model(max_position_embeddings=8192).save_pretrained(path)
    chat_tokenizer().save_pretrained(path)
    return str(path)


def written_out(messages: Sequence[ChatMessage]) -> str:
    return "".join(f"## {message.role.value}: {message.content}\n" for message in messages) + "## assistant:"


# The constructor


def test_a_saved_model_answers_by_its_name_as_the_engine_does(folder: str) -> None:
    assert FinchLLM(folder, **LOADING).complete(QUESTION).text == finch_llm().complete(QUESTION).text
    assert FinchLLM(model=folder, **LOADING).model_name == FinchLLM(model_name=folder).model_name == folder


def test_a_loaded_model_is_taken_with_its_tokenizer() -> None:
    llm = FinchLLM(model=small_model(max_position_embeddings=8192), tokenizer=chat_tokenizer(), max_new_tokens=8)
    assert llm.complete(QUESTION).text == finch_llm().complete(QUESTION).text
    assert llm.model_name == llm.metadata.model_name == "LlamaForCausalLM"


def test_an_engine_is_taken_as_it_is() -> None:
    llm = FinchLLM(engine=engine())
    assert llm.engine is engine()
    assert llm.model_name == "small"


def test_a_given_engines_settings_hold_where_the_llm_has_none() -> None:
    own = new_engine(selection="token", max_new_tokens=5, instructions="Say little.")
    llm = FinchLLM(engine=own)
    assert llm.metadata.num_output == 5
    report = llm.chat([PassagesMessage(QUESTION, passages())]).raw["report"]
    expected = own.ask(QUESTION, passages()).report
    assert (report["selection"], report["budget"]) == ("token", 60) == (expected.selection, expected.budget)
    assert report["new_tokens"] == expected.new_tokens <= 5
    assert report["prefix_tokens"] == expected.prefix_tokens
    told = FinchLLM(engine=own, selection="passage", max_new_tokens=3)
    report = told.chat([PassagesMessage(QUESTION, passages())]).raw["report"]
    assert (report["selection"], report["new_tokens"]) == ("passage", 3)


def test_without_an_engine_answers_are_as_long_as_llamaindex_expects() -> None:
    llm = FinchLLM("/no/such/folder")
    assert (llm.metadata.num_output, llm.selection) == (256, "passage")


def test_nothing_is_loaded_before_the_first_call() -> None:
    llm = FinchLLM("/no/such/folder")
    assert llm.metadata.model_name == "/no/such/folder"
    assert llm.prompt_helper().context_window == llm.metadata.context_window
    assert llm.to_dict()["model_name"] == "/no/such/folder"
    with pytest.raises(ModelError, match="/no/such/folder"):
        llm.complete(QUESTION)


def test_instances_with_the_same_loading_options_share_one_engine(folder: str) -> None:
    first, second = (FinchLLM(folder, budget=budget, **LOADING) for budget in (10, 20))
    other = FinchLLM(folder, device_map="cpu", model_kwargs={"dtype": "bfloat16"})
    assert first.engine is second.engine
    assert first.engine is not other.engine
    assert str(other.engine.model.dtype) == "torch.bfloat16"


@pytest.mark.parametrize("device_map", ["auto", "cpu", None, {"": "cpu"}])
def test_a_device_map_is_a_device_or_transformers_own(folder: str, device_map: Any) -> None:
    assert FinchLLM(folder, device_map=device_map).engine.model.device.type in ("cpu", "cuda")


def test_an_unknown_device_is_a_model_error(folder: str) -> None:
    with pytest.raises(ModelError, match="toaster"):
        FinchLLM(folder, device_map="toaster").complete(QUESTION)


def test_a_tokenizer_can_have_another_name(folder: str, tmp_path: Path) -> None:
    plain_tokenizer().save_pretrained(tmp_path)
    assert FinchLLM(folder, **LOADING).engine.tokenizer.chat_template
    assert not FinchLLM(folder, tokenizer_name=str(tmp_path), **LOADING).engine.tokenizer.chat_template


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0: the least is 1"),
        ({"budget": 0}, "budget is 0: the least is 1"),
        ({"budget": "many"}, "budget is 'many'"),
        ({"chunk_size": -3}, "chunk_size is -3: the least is 1"),
        ({"selection": "best"}, "'best'.*'passage'.*'token'"),
        ({"max_context_tokens": 0}, "max_context_tokens is 0: the least is 1"),
        ({"stop": [""]}, "stop string is empty"),
        ({"generate_kwargs": {"num_beams": 4}}, "num_beams.*temperature"),
        ({"generate_kwargs": {"temperature": -1.0}}, r"temperature is -1\.0: the least is 0"),
        ({"generate_kwargs": {"top_p": 1.5}}, r"top_p is 1\.5: .* at most 1"),
        ({"generate_kwargs": {"max_new_tokens": 0}}, "max_new_tokens is 0"),
        ({"context_window": 0}, "context_window is int: .*greater than 0"),
        ({"context_window": "many"}, "context_window is str"),
        ({"is_chat_model": "perhaps"}, "is_chat_model is str"),
        ({"model_kwargs": 5}, "model_kwargs is int: pass a dictionary"),
        ({"tokenizer_kwargs": "x"}, "tokenizer_kwargs is str: pass a dictionary"),
        ({"generate_kwargs": [1]}, "generate_kwargs is list: pass a dictionary"),
        ({"device_map": 5}, "device_map"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0: it must be above 0"),
        ({"strict": "yes"}, "strict is 'yes'"),
        ({"query_wrapper_prompt": "no place"}, "query_wrapper_prompt has no {query_str}"),
        ({"query_wrapper_prompt": 5}, "query_wrapper_prompt is int"),
        ({"engine": "embedded"}, "engine is str"),
        ({"bugdet": 5}, "bugdet.*budget"),
        ({"tokenizer": object()}, "tokenizer"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_at_once(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(SettingsError, match=reason) as caught:
        FinchLLM("/no/such/folder", **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("settings", "reason"), [({}, "no model"), ({"model": object()}, "tokenizer")])
def test_without_a_model_that_can_run_there_is_no_llm(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(SettingsError, match=reason):
        FinchLLM(**settings)


def test_what_huggingface_llm_is_given_works_by_name(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []

    def load(name: str, **options: Any) -> Finch:
        seen.append(options)
        return engine()

    monkeypatch.setattr("llama_index.llms.finch.base.shared_engine", load)
    llm = FinchLLM(
        folder,
        context_window=2048,
        tokenizer_kwargs={"use_fast": True},
        trust_remote_code=True,
        repetition_penalty=0.001,  # what was said once is said for ever
        strict=True,
        query_wrapper_prompt="[{query_str}]",
        max_new_tokens=8,
    )
    assert llm.metadata.context_window == 2048
    penalised = llm.complete(QUESTION)
    assert (seen[0]["tokenizer_kwargs"], seen[0]["trust_remote_code"]) == ({"use_fast": True}, True)
    assert llm.complete(QUESTION, repetition_penalty=1).text != penalised.text
    with pytest.raises(InputError, match="no known template"):
        llm.complete("\n\n".join(f"{QUESTION} {number}." for number in range(2000)))


def test_metadata_is_what_finch_reads_not_the_models_window() -> None:
    llm = finch_llm(max_context_tokens=123_456, is_chat_model=False)
    assert (llm.metadata.context_window, llm.metadata.num_output) == (123_456, 8)
    assert not llm.metadata.is_chat_model
    assert finch_llm().metadata.is_chat_model
    assert finch_llm().metadata.context_window > engine().window
    assert finch_llm(generate_kwargs={"max_new_tokens": 5}).metadata.num_output == 5


# The four calls


def test_the_four_calls_give_the_same_text() -> None:
    llm = finch_llm()
    whole = llm.complete(QUESTION).text
    messages = [ChatMessage(content=QUESTION)]
    completed, chatted = list(llm.stream_complete(QUESTION)), list(llm.stream_chat(messages))
    assert whole
    assert llm.chat(messages).message.content == whole
    assert "".join(piece.delta or "" for piece in completed) == completed[-1].text == whole
    assert "".join(piece.delta or "" for piece in chatted) == chatted[-1].message.content == whole


def test_each_piece_has_the_text_so_far_and_the_last_has_report_and_citations() -> None:
    *earlier, last = finch_llm().stream_chat([MESSAGE])
    text = ""
    assert len(earlier) > 1
    for piece in earlier:
        text += piece.delta or ""
        assert piece.message.content == text
        assert not piece.additional_kwargs
    assert last.delta == ""
    assert last.raw["report"]["passages"] == 12
    assert last.additional_kwargs["citations"]
    assert last.message == finch_llm().chat([MESSAGE]).message


def test_a_completions_last_piece_has_report_and_citations() -> None:
    prompt = "Context information is below.\n---------------------\n{}\n---------------------\nGiven the context "
    prompt += "information and not prior knowledge, answer the query.\nQuery: {}\nAnswer: "
    prompt = prompt.format("\n\n".join(passage.text for passage in passages()), QUESTION)
    *earlier, last = finch_llm().stream_complete(prompt)
    whole = finch_llm().complete(prompt)
    assert not any(piece.additional_kwargs for piece in earlier)
    assert last.additional_kwargs["citations"] == whole.additional_kwargs["citations"] != []
    assert (last.delta, last.text) == ("", whole.text)


def test_pieces_arrive_as_they_are_made() -> None:
    llm = finch_llm()
    with counted_passes(llm.engine) as passes:
        made = [len(passes) for _ in llm.stream_chat([MESSAGE])]
    assert made[0] < made[1] < made[-1]


def test_a_stream_that_is_left_stops_and_frees_its_cache(caches: weakref.WeakSet[CompressedCache]) -> None:
    llm = finch_llm()
    with counted_passes(llm.engine) as passes:
        stream = llm.stream_chat([MESSAGE])
        next(stream)
        done = len(passes)
        stream.close()
        gc.collect()
        assert len(caches) == 0
        assert len(passes) == done


def test_the_engines_settings_are_used_where_the_llm_has_none(prompts: list[Prompt]) -> None:
    own = finch_llm(budget=30, chunk_size=100, selection="token", instructions="Be exact.")
    report = own.chat([MESSAGE]).raw["report"]
    assert (report["budget"], report["chunk_size"], report["selection"]) == (30, 100, "token")
    report = finch_llm().chat([MESSAGE]).raw["report"]
    assert (report["budget"], report["chunk_size"], report["selection"]) == (60, 512, "passage")
    assert ["Be exact." in whole_text(prompt) for prompt in prompts] == [True, False]


# Options of generation


def test_options_of_a_call_are_obeyed() -> None:
    llm = finch_llm(stop="no such text", generate_kwargs={"seed": 0})
    assert llm.complete(QUESTION, max_tokens=3).raw["report"]["new_tokens"] == 3
    assert llm.complete(QUESTION, max_new_tokens=2).raw["report"]["new_tokens"] == 2
    assert llm.complete(QUESTION, chunk_size="auto").raw["report"]["chunk_size"] > 64
    assert llm.chat([MESSAGE], budget=33, selection="token").raw["report"]["kept_tokens"] == 33
    hot: dict[str, Any] = {"temperature": 1.5, "top_k": 300, "top_p": 0.99}
    assert llm.complete(QUESTION, seed=1, **hot).text == llm.complete(QUESTION, seed=1, **hot).text
    assert len({llm.complete(QUESTION, seed=seed, **hot).text for seed in range(4)}) > 1
    text = llm.complete(QUESTION).text
    stopped = llm.complete(QUESTION, stop=[text[3:5]])
    assert stopped.text == text[:3].rstrip()
    assert stopped.raw["report"]["stop_reason"] == "stop"


def test_generate_kwargs_are_those_of_hugging_face() -> None:
    def asked(**options: Any) -> str:
        return str(finch_llm(generate_kwargs=options).complete(QUESTION).text)

    greedy = finch_llm().complete(QUESTION).text
    assert asked(do_sample=False, temperature=1.5) == greedy
    assert asked(do_sample=True, top_k=1) == greedy
    assert asked(do_sample=True, seed=1) == asked(do_sample=True, seed=1, temperature=1.0) != greedy
    assert asked(max_new_tokens=2) == finch_llm(max_new_tokens=2).complete(QUESTION).text != greedy


def test_stops_of_the_llm_end_an_answer() -> None:
    text = finch_llm().complete(QUESTION).text
    assert finch_llm(stop=text[3:5]).complete(QUESTION).text == text[:3].rstrip()
    ended = finch_llm(stopping_ids=range(len(chat_tokenizer()))).complete(QUESTION)
    assert (ended.text, ended.raw["report"]["new_tokens"]) == ("", 1)


@pytest.mark.parametrize("method", ["complete", "stream_complete", "chat", "stream_chat"])
def test_bad_input_is_an_error_at_once(method: str) -> None:
    call = getattr(finch_llm(), method)
    asked: Any = QUESTION if "complete" in method else [ChatMessage(content=QUESTION)]
    with pytest.raises(InputError, match="max_tokenz"):
        call(asked, max_tokenz=3)
    with pytest.raises(WindowError, match=r"9000.*8192"):
        call(asked, budget=9000)
    if "chat" in method:
        with pytest.raises(InputError, match="no message is the user's"):
            call([ChatMessage(role="assistant", content="Novak.")])
        with pytest.raises(InputError, match="question is empty"):
            call([PassagesMessage(" ", ["The bridge."])])


@pytest.mark.parametrize(
    "messages",
    [
        [ChatMessage("Say hello.", role="system")],
        [ChatMessage(QUESTION), ChatMessage("Novak.", role="assistant")],
        [ChatMessage(" ")],
        [ChatMessage(QUESTION), ChatMessage("42", role="tool", additional_kwargs={"tool_call_id": "t"})],
    ],
    ids=["only a system message", "the assistant's at the end", "empty", "a tool's"],
)
def test_a_conversation_may_have_any_shape(messages: list[ChatMessage]) -> None:
    response = finch_llm().chat(messages)
    assert response.message.content
    assert [cited["passage_id"] for cited in response.raw["citations"]] == (
        ["t"] if len(messages[-1].content or "") == 2 else []
    )


# Prompts


def test_a_system_prompt_is_read_once_whatever_the_call(requests: list[ParsedPrompt], prompts: list[Prompt]) -> None:
    llm = finch_llm(system_prompt="Be kind.")
    llm.complete(QUESTION)
    llm.chat([ChatMessage(content=QUESTION)])
    llm.predict(PromptTemplate(QUESTION))
    finch_llm(system_prompt="Be kind.", is_chat_model=False).predict(PromptTemplate(QUESTION))
    assert [request.question for request in requests] == 4 * [QUESTION]
    assert [request.system_prompt for request in requests] == 4 * ["Be kind."]
    assert all(whole_text(prompt).count("Be kind.") == 1 for prompt in prompts)


def test_completion_to_prompt_makes_the_prompt_of_a_completion(prompts: list[Prompt]) -> None:
    llm = finch_llm(completion_to_prompt=wrapped, is_chat_model=False)
    llm.complete(QUESTION)
    llm.predict(PromptTemplate("{question}"), question=QUESTION)  # has wrapped it already
    assert {whole_text(prompt) for prompt in prompts} == {wrapped(QUESTION)}
    assert chat_tokenizer().convert_tokens_to_ids(CONTROL[0]) in prompts[0].prefix


def test_messages_to_prompt_makes_the_prompt_of_a_conversation(prompts: list[Prompt]) -> None:
    messages = [
        ChatMessage(role="system", content="Be brief."),
        ChatMessage(role="user", content="who?"),
        ChatMessage(role="assistant", content="Novak."),
        ChatMessage(role="user", content=QUESTION),
    ]
    finch_llm(messages_to_prompt=written_out).chat(messages)
    assert whole_text(prompts[-1]) == written_out(messages)


def test_without_messages_to_prompt_the_chat_template_is_used(prompts: list[Prompt]) -> None:
    finch_llm().complete(QUESTION)
    assert whole_text(prompts[0]) == f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"


# What an answer carries


def test_raw_and_additional_kwargs_are_plain_values_with_report_and_citations() -> None:
    response = finch_llm().chat([MESSAGE])
    raw = json.loads(json.dumps(response.raw))
    assert raw["text"] == response.message.content
    assert raw["report"] == response.additional_kwargs["report"]
    assert raw["citations"] == response.additional_kwargs["citations"]
    assert {citation["passage_id"] for citation in raw["citations"]} <= {f"p{n}" for n in range(12)}


def test_tokens_are_counted_by_the_models_tokenizer() -> None:
    counter = TokenCountingHandler()
    llm = finch_llm(callback_manager=CallbackManager([counter]))
    report = llm.chat([MESSAGE]).raw["report"]
    list(llm.stream_complete(QUESTION))
    read = report["prefix_tokens"] + report["context_tokens"] + report["question_tokens"]
    counted = counter.llm_token_counts[0]
    assert (counted.prompt_token_count, counted.completion_token_count) == (read, report["new_tokens"])
    assert counter.llm_token_counts[1].completion_token_count == 8


@pytest.mark.parametrize("method", ["complete", "stream_complete", "chat", "stream_chat"])
def test_callbacks_get_start_and_end(method: str) -> None:
    handler = LlamaDebugHandler(print_trace_on_end=False)
    llm = finch_llm(callback_manager=CallbackManager([handler]))
    response = getattr(llm, method)(QUESTION if "complete" in method else [MESSAGE])
    if "stream" in method:
        *_, response = response
    ((start, end),) = handler.get_event_pairs(CBEventType.LLM)
    assert start.payload
    assert end.payload
    assert start.payload[EventPayload.SERIALIZED]["model_name"] == "small"
    assert end.payload[EventPayload.RESPONSE if "chat" in method else EventPayload.COMPLETION] == response


@pytest.mark.parametrize("method", ["complete", "stream_complete", "chat", "stream_chat"])
def test_an_error_ends_its_event_with_the_exception(method: str) -> None:
    handler = LlamaDebugHandler(print_trace_on_end=False)
    llm = finch_llm(callback_manager=CallbackManager([handler]))
    with pytest.raises(InputError) as caught:
        list(getattr(llm, method)(QUESTION if "complete" in method else [MESSAGE], nonsense=1))
    ((_, end),) = handler.get_event_pairs(CBEventType.LLM)
    assert end.payload == {EventPayload.EXCEPTION: caught.value}


def test_instrumentation_sees_start_progress_and_end() -> None:
    with listening() as events:
        pieces = list(finch_llm().stream_chat([MESSAGE]))
    names = [type(event).__name__ for event in events]
    assert names == ["LLMChatStartEvent", *len(pieces) * ["LLMChatInProgressEvent"], "LLMChatEndEvent"]
    with listening() as events:
        finch_llm().complete(QUESTION)
    assert [type(event).__name__ for event in events] == ["LLMCompletionStartEvent", "LLMCompletionEndEvent"]


# Copies


def test_a_dictionary_has_all_settings_and_no_model() -> None:
    settings: dict[str, Any] = {
        "max_new_tokens": 9,
        "budget": 50,
        "chunk_size": 64,
        "selection": "token",
        "max_context_tokens": 1000,
        "instructions": "Answer.",
        "context_window": 4096,
        "strict": True,
        "repetition_penalty": 1.1,
        "tokenizer_kwargs": {"use_fast": True},
        "trust_remote_code": True,
        "generate_kwargs": {"temperature": 0.5, "seed": 1},
        "model_kwargs": {"revision": "main"},
        "system_prompt": "Be kind.",
        "stop": ["x"],
        "stopping_ids": [3],
        "is_chat_model": False,
        "citation_blocks": False,
        "tokenizer_name": "other",
        "device_map": "cpu",
    }
    llm = FinchLLM("/no/such/folder", **settings)
    stored = llm.to_dict()
    assert stored["class_name"] == FinchLLM.class_name()
    for again in (FinchLLM.from_dict(stored), FinchLLM.from_json(llm.to_json()), pickle.loads(pickle.dumps(llm))):
        assert again.to_dict() == stored
        assert {name: getattr(again, name) for name in settings} == settings


def test_a_pickle_is_small_and_leaves_the_original_its_engine(folder: str, caplog: pytest.LogCaptureFixture) -> None:
    llm = FinchLLM(folder, **LOADING)
    text, loaded = llm.complete(QUESTION).text, llm.engine
    stored = pickle.dumps(llm)
    assert len(stored) < 5_000
    assert not caplog.records  # LlamaIndex warns of what it cannot store
    assert llm.engine is loaded
    again: FinchLLM = pickle.loads(stored)
    assert again.complete(QUESTION).text == text
    assert again.engine is loaded  # found by its name, not stored


def test_what_was_given_loaded_is_not_pickled_nor_made_of_nothing() -> None:
    for llm in (finch_llm(), FinchLLM(model=engine().model, tokenizer=engine().tokenizer)):
        with pytest.raises(
            SettingsError, match=r"with engine= or a loaded model cannot be pickled.*model_name="
        ) as caught:
            pickle.dumps(llm)
        assert "\n" not in str(caught.value)
    with pytest.raises(SettingsError, match="there is no model: pass model_name"):
        FinchLLM.from_dict({**finch_llm().to_dict(), "model_name": ""})


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, FinchLLM.model_copy])
def test_a_copy_shares_the_engine_and_has_its_own_settings(copied: Any) -> None:
    llm = finch_llm()
    again = copied(llm)
    again.max_new_tokens = 3
    assert again.engine is llm.engine
    assert llm.max_new_tokens == 8
    assert again.complete(QUESTION).raw["report"]["new_tokens"] == 3


def test_the_question_matters() -> None:
    assert finch_llm().complete(OTHER_QUESTION).text != finch_llm().complete(QUESTION).text
