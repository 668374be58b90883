from __future__ import annotations

import asyncio
import warnings
from typing import Any

import pytest
from li_support import (
    OTHER_QUESTION,
    QUESTION,
    FixedRetriever,
    calls,
    engine,
    finch_llm,
    listening,
    nodes,
    reports,
    shown,
    whole_text,
    wrapped,
)
from llama_index.core import MockEmbedding, PromptTemplate, VectorStoreIndex, __version__, get_response_synthesizer
from llama_index.core.base.llms.types import MessageRole
from llama_index.core.chat_engine import (
    CondensePlusContextChatEngine,
    ContextChatEngine,
    condense_plus_context,
    context,
)
from llama_index.core.chat_engine.utils import get_prefix_messages_with_context
from llama_index.core.instrumentation.events.llm import LLMChatEndEvent
from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import ChatPromptTemplate, chat_prompts
from llama_index.core.prompts.chat_prompts import CHAT_REFINE_PROMPT, CHAT_TEXT_QA_PROMPT, CHAT_TREE_SUMMARIZE_PROMPT
from llama_index.core.prompts.default_prompts import (
    DEFAULT_REFINE_PROMPT,
    DEFAULT_TEXT_QA_PROMPT,
    DEFAULT_TREE_SUMMARIZE_PROMPT,
)
from llama_index.core.query_engine import CitationQueryEngine, RetrieverQueryEngine
from llama_index.core.query_engine.citation_query_engine import CITATION_QA_TEMPLATE, CITATION_REFINE_TEMPLATE
from llama_index.core.response_synthesizers import ResponseMode
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.llms.finch import FinchLLM
from packaging.version import Version
from pydantic import BaseModel

from finch_rag import InputError, ModelError, WindowError
from finch_rag.prompts.builder import Prompt
from finch_rag.prompts.parsing import ParsedPrompt
from tests.small import texts

ONE_CALL = {
    "compact": "llama-index/text-qa",
    "simple_summarize": "llama-index/text-qa",
    "tree_summarize": "llama-index/tree-summarize",
}
MODES = [*ONE_CALL, "refine"]
HISTORY = [ChatMessage(role="user", content="hello"), ChatMessage(role="assistant", content="good morning")]
CHAT_OR_NOT = pytest.mark.parametrize("is_chat_model", [True, False])


def query_engine(llm: FinchLLM, mode: str = "compact", count: int = 12, **options: Any) -> RetrieverQueryEngine:
    return RetrieverQueryEngine.from_args(
        FixedRetriever(nodes(count)), llm=llm, response_mode=ResponseMode(mode), **options
    )


# Query engines


@CHAT_OR_NOT
@pytest.mark.parametrize("mode", ONE_CALL)
def test_a_query_is_one_call_with_all_nodes_apart(mode: str, is_chat_model: bool, requests: list[ParsedPrompt]) -> None:
    with listening() as events:
        response = query_engine(finch_llm(is_chat_model=is_chat_model), mode).query(QUESTION)
    assert calls(events) == 1
    (report,) = reports(events)
    assert (report["parse_mode"], report["passages"]) == (ONE_CALL[mode], 12)
    assert requests[0].question == QUESTION
    assert [passage.text for passage in requests[0].passages] == shown(nodes())
    assert str(response)
    assert [node.score for node in response.source_nodes] == [node.score for node in nodes()]


@CHAT_OR_NOT
def test_refine_is_one_call_a_node_and_hands_the_answer_on(is_chat_model: bool, requests: list[ParsedPrompt]) -> None:
    with listening() as events:
        query_engine(finch_llm(is_chat_model=is_chat_model), "refine", count=4).query(QUESTION)
    assert calls(events) == 4
    name = "llama-index/refine-chat" if is_chat_model else "llama-index/refine"
    assert [report["parse_mode"] for report in reports(events)] == ["llama-index/text-qa", *3 * [name]]
    assert [request.question for request in requests] == 4 * [QUESTION]
    assert [[passage.text for passage in request.passages] for request in requests] == [
        [text] for text in shown(nodes(4))
    ]
    answers = [
        event.response for event in events if type(event).__name__ in ("LLMChatEndEvent", "LLMCompletionEndEvent")
    ]
    for answer, request in zip(answers, requests[1:], strict=False):
        assert str(answer).removeprefix("assistant: ") in (request.instructions or "")


def test_instructions_of_the_llm_lose_no_earlier_answer(prompts: list[Prompt]) -> None:
    with listening() as events:
        query_engine(finch_llm(instructions="Be exact."), "refine", count=2).query(QUESTION)
    answer = next(event.response for event in events if isinstance(event, LLMChatEndEvent))
    assert answer is not None
    assert all("Be exact." in whole_text(prompt) for prompt in prompts)
    assert str(answer.message.content) in whole_text(prompts[1])


@CHAT_OR_NOT
@pytest.mark.parametrize("mode", MODES)
def test_a_query_engine_streams_and_runs_in_a_loop(mode: str, is_chat_model: bool) -> None:
    llm = finch_llm(is_chat_model=is_chat_model)
    whole = str(query_engine(llm, mode, count=3).query(QUESTION))
    streaming = query_engine(llm, mode, count=3, streaming=True)

    async def streamed() -> list[str]:
        response: Any = await streaming.aquery(QUESTION)
        return [delta async for delta in response.async_response_gen()]

    response: Any = streaming.query(QUESTION)
    assert str(asyncio.run(query_engine(llm, mode, count=3).aquery(QUESTION))) == whole != ""
    deltas = list(response.response_gen)
    assert "".join(deltas) == "".join(asyncio.run(streamed())) == whole
    assert len([delta for delta in deltas if delta]) > 1


@CHAT_OR_NOT
def test_an_index_answers_in_one_call(is_chat_model: bool) -> None:
    index = VectorStoreIndex([node.node for node in nodes(20)], embed_model=MockEmbedding(embed_dim=4))
    made = index.as_query_engine(llm=finch_llm(is_chat_model=is_chat_model), similarity_top_k=20)
    with listening() as events:
        made.query(QUESTION)
    assert calls(events) == 1
    assert reports(events)[0]["passages"] == 20


def numbered(found: list[str]) -> list[str]:
    """As the citation prompt shows them."""
    return [f"Source {place}:\n{text}" for place, text in enumerate(found, 1)]


@CHAT_OR_NOT
def test_a_citation_query_engine_keeps_its_sources_and_its_instructions(
    is_chat_model: bool, requests: list[ParsedPrompt], prompts: list[Prompt]
) -> None:
    plain = [text.replace(":", "") for text in texts(12)]
    bare = [NodeWithScore(node=TextNode(text=text), score=1.0) for text in plain]
    with listening() as events:
        response = CitationQueryEngine(FixedRetriever(bare), llm=finch_llm(is_chat_model=is_chat_model)).query(QUESTION)
    assert calls(events) == 1
    assert reports(events)[0]["parse_mode"] == "llama-index/citation"
    assert requests[0].question == QUESTION
    assert [passage.title for passage in requests[0].passages] == [None] * 12  # a number may be forged
    assert [passage.text for passage in requests[0].passages] == numbered(plain)
    assert len(response.source_nodes) == 12
    assert "cite the appropriate source(s)" in whole_text(prompts[0])


def test_a_citation_query_engines_sources_may_look_like_metadata(requests: list[ParsedPrompt]) -> None:
    bare = [NodeWithScore(node=TextNode(text=f"Note: the bridge has {n} arches."), score=1.0) for n in range(4)]
    CitationQueryEngine(FixedRetriever(bare), llm=finch_llm()).query(QUESTION)
    assert [passage.text for passage in requests[0].passages] == numbered([node.node.get_content() for node in bare])


def test_a_citation_query_engines_sources_keep_their_own_metadata(requests: list[ParsedPrompt]) -> None:
    CitationQueryEngine(FixedRetriever(nodes()), llm=finch_llm()).query(QUESTION)
    assert len(requests[0].passages) == 12
    for place, passage in enumerate(requests[0].passages):
        assert texts(12)[place] in passage.text
        assert f"notes-{place}.md" in passage.text


# Chat engines


def chat_engine(kind: Any, llm: FinchLLM, **options: Any) -> Any:
    return kind.from_defaults(FixedRetriever(nodes()), llm=llm, **options)


@CHAT_OR_NOT
@pytest.mark.parametrize(
    ("kind", "name", "condensing"),
    [
        (ContextChatEngine, "llama-index/context-chat", 0),
        (CondensePlusContextChatEngine, "llama-index/condense-plus-context", 1),
    ],
)
def test_a_chat_engine_reads_nodes_apart_and_remembers_the_conversation(
    kind: Any, name: str, condensing: int, is_chat_model: bool, requests: list[ParsedPrompt]
) -> None:
    made = chat_engine(kind, finch_llm(is_chat_model=is_chat_model), system_prompt="Be nice.")
    with listening() as events:
        first = made.chat(QUESTION)
    assert calls(events) == 1
    with listening() as events:
        made.chat("and when?")
    assert calls(events) == 1 + condensing
    report = reports(events)[-1]
    assert (report["parse_mode"], report["passages"]) == (name, 12)
    assert [len(request.passages) for request in (requests[0], requests[-1])] == [12, 12]
    assert requests[0].question == QUESTION
    assert not requests[0].history
    assert requests[-1].history == [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": first.response},
    ]
    assert requests[-1].system_prompt == "Be nice."
    assert condensing or requests[-1].question == "and when?"


@CHAT_OR_NOT
@pytest.mark.parametrize("kind", [ContextChatEngine, CondensePlusContextChatEngine])
def test_a_chat_engine_streams_and_runs_in_a_loop(kind: Any, is_chat_model: bool) -> None:
    llm = finch_llm(is_chat_model=is_chat_model)
    whole = chat_engine(kind, llm).chat(QUESTION).response

    async def streamed() -> str:
        response = await chat_engine(kind, llm).astream_chat(QUESTION)
        return "".join([delta async for delta in response.async_response_gen()])

    assert whole
    assert "".join(chat_engine(kind, llm).stream_chat(QUESTION).response_gen) == whole
    assert asyncio.run(chat_engine(kind, llm).achat(QUESTION)).response == whole
    assert asyncio.run(streamed()) == whole


# The framework's own prompts

CONTEXT = "\n\n".join(shown(nodes()))
SOURCES = "\n\n".join(f"Source {n}:\n{text}\n" for n, text in enumerate(shown(nodes()), 1))
MESSAGES = [ChatMessage(content=text) for text in shown(nodes())]


def engine_prompt(template: str, own: str = "") -> ChatPromptTemplate:
    """What a chat engine makes of its template."""
    made = get_prefix_messages_with_context(PromptTemplate(template), own, [], HISTORY, MessageRole.SYSTEM)
    return ChatPromptTemplate.from_messages(made)


Case = tuple[Any, dict[str, Any], str]
FOR_BOTH: list[Case] = [
    (DEFAULT_TEXT_QA_PROMPT, {"context_str": CONTEXT}, "text-qa"),
    (DEFAULT_TREE_SUMMARIZE_PROMPT, {"context_str": CONTEXT}, "tree-summarize"),
    (DEFAULT_REFINE_PROMPT, {"context_msg": CONTEXT}, "refine"),
    (CITATION_QA_TEMPLATE, {"context_str": SOURCES}, "citation"),
    (CITATION_REFINE_TEMPLATE, {"context_msg": SOURCES}, "citation-refine"),
]
OF_MESSAGES = pytest.mark.skipif(
    Version(__version__) < Version("0.14.22"),
    reason=f"llama-index-core {__version__} has no prompts that show passages as messages, 0.14.22 has",
)
FOR_CHAT: list[Any] = [
    (CHAT_TEXT_QA_PROMPT, {"context_str": CONTEXT}, "text-qa"),
    (CHAT_TREE_SUMMARIZE_PROMPT, {"context_str": CONTEXT}, "tree-summarize"),
    (CHAT_REFINE_PROMPT, {"context_msg": CONTEXT}, "refine-chat"),
    pytest.param(
        getattr(chat_prompts, "CHAT_CONTENT_QA_PROMPT", None),
        {"context_messages": MESSAGES},
        "text-qa",
        marks=OF_MESSAGES,
    ),
    pytest.param(
        getattr(chat_prompts, "CHAT_CONTENT_TREE_SUMMARIZE_PROMPT", None),
        {"context_messages": MESSAGES},
        "tree-summarize",
        marks=OF_MESSAGES,
    ),
]
OF_CHAT_ENGINES: list[Case] = [
    (engine_prompt(context.DEFAULT_CONTEXT_TEMPLATE, "Be nice."), {"context_str": CONTEXT}, "context-chat"),
    (engine_prompt(context.DEFAULT_REFINE_TEMPLATE, "Be nice."), {"context_msg": CONTEXT}, "context-chat-refine"),
    (
        engine_prompt(condense_plus_context.DEFAULT_CONTEXT_PROMPT_TEMPLATE, "Be nice."),
        {"context_str": CONTEXT},
        "condense-plus-context",
    ),
    (
        engine_prompt(condense_plus_context.DEFAULT_CONTEXT_REFINE_PROMPT_TEMPLATE, "Be nice."),
        {"context_msg": CONTEXT},
        "condense-plus-context-refine",
    ),
]


def predicted(prompt: Any, fields: dict[str, Any], **settings: Any) -> None:
    llm = finch_llm(max_new_tokens=1, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        llm.predict(prompt, query_str=QUESTION, existing_answer="Clara Novak", **fields)


def check(request: ParsedPrompt, name: str) -> None:
    assert request.parse_mode == f"llama-index/{name}"
    assert request.question == QUESTION
    expected = numbered(shown(nodes())) if "citation" in name else shown(nodes())
    assert [passage.text for passage in request.passages] == expected
    if "refine" in name:
        assert "Clara Novak" in (request.instructions or "") or name == "citation-refine"


@CHAT_OR_NOT
@pytest.mark.parametrize(("prompt", "fields", "name"), [*FOR_BOTH, *OF_CHAT_ENGINES])
def test_a_prompt_of_the_framework_is_taken_apart(
    prompt: Any, fields: dict[str, Any], name: str, is_chat_model: bool, requests: list[ParsedPrompt]
) -> None:
    predicted(prompt, fields, is_chat_model=is_chat_model)
    check(requests[0], name)


@pytest.mark.parametrize(("prompt", "fields", "name"), FOR_CHAT)
def test_a_prompt_for_chat_models_is_taken_apart(
    prompt: Any, fields: dict[str, Any], name: str, requests: list[ParsedPrompt]
) -> None:
    predicted(prompt, fields)
    check(requests[0], name)
    assert requests[0].system_prompt is None  # the framework's own says no more than Finch's


@CHAT_OR_NOT
@pytest.mark.parametrize(("prompt", "fields", "name"), FOR_BOTH)
def test_a_system_prompt_hides_no_known_prompt(
    prompt: Any, fields: dict[str, Any], name: str, is_chat_model: bool, requests: list[ParsedPrompt]
) -> None:
    predicted(prompt, fields, is_chat_model=is_chat_model, system_prompt="Be kind.")
    check(requests[0], name)
    assert requests[0].system_prompt == "Be kind."


@pytest.mark.parametrize("system_prompt", [None, "Be kind."])
@pytest.mark.parametrize(("prompt", "fields", "name"), FOR_BOTH)
def test_completion_to_prompt_hides_no_known_prompt(
    prompt: Any,
    fields: dict[str, Any],
    name: str,
    system_prompt: str | None,
    requests: list[ParsedPrompt],
    prompts: list[Prompt],
) -> None:
    predicted(prompt, fields, is_chat_model=False, completion_to_prompt=wrapped, system_prompt=system_prompt)
    check(requests[0], name)
    assert whole_text(prompts[0]).startswith("<|im_start|>user\nPlease: ")


@pytest.mark.parametrize(
    "is_chat_model",
    [
        True,
        False,
    ],
)
@pytest.mark.parametrize(("prompt", "fields", "name"), [OF_CHAT_ENGINES[0], OF_CHAT_ENGINES[2]])
def test_a_system_prompt_goes_together_with_a_chat_engine(
    prompt: Any, fields: dict[str, Any], name: str, is_chat_model: bool, requests: list[ParsedPrompt]
) -> None:
    predicted(prompt, fields, is_chat_model=is_chat_model, system_prompt="Be kind.")
    check(requests[0], name)
    assert requests[0].system_prompt == "Be kind.\n\nBe nice."


@pytest.mark.parametrize(
    "is_chat_model",
    [True, False],
)
@pytest.mark.parametrize(("prompt", "fields", "name"), [OF_CHAT_ENGINES[0], OF_CHAT_ENGINES[2]])
def test_completion_to_prompt_goes_together_with_a_chat_engine(
    prompt: Any, fields: dict[str, Any], name: str, is_chat_model: bool, requests: list[ParsedPrompt]
) -> None:
    predicted(prompt, fields, is_chat_model=is_chat_model, completion_to_prompt=wrapped)
    check(requests[0], name)


def test_ones_own_words_behind_the_frameworks_system_prompt_are_read(prompts: list[Prompt]) -> None:
    system, user = CHAT_TEXT_QA_PROMPT.message_templates
    own = ChatMessage(role="system", content=f"{system.content}\n3. Answer in French.")
    predicted(ChatPromptTemplate.from_messages([own, user]), {"context_str": CONTEXT})
    assert "Answer in French." in whole_text(prompts[0])


@CHAT_OR_NOT
def test_a_structured_answer_is_asked_for_with_its_schema(
    is_chat_model: bool, requests: list[ParsedPrompt], prompts: list[Prompt]
) -> None:
    class Engineer(BaseModel):
        surname: str

    made = query_engine(finch_llm(is_chat_model=is_chat_model), "tree_summarize", output_cls=Engineer)
    with pytest.raises(ValueError, match="json"):  # LlamaIndex's: eight tokens are too few for it
        made.query(QUESTION)
    assert requests[0].question == QUESTION
    assert len(requests[0].passages) == 12
    assert '"surname"' in whole_text(prompts[0])


# Prompts that nobody knows


@CHAT_OR_NOT
def test_a_short_prompt_of_ones_own_is_read_whole(is_chat_model: bool, requests: list[ParsedPrompt]) -> None:
    text = "Rewrite this.\n\nThe bridge is old.\n\nRewritten:"
    predicted(PromptTemplate(text), {}, is_chat_model=is_chat_model)
    assert (requests[0].parse_mode, requests[0].question, requests[0].passages) == ("whole", text, [])


@CHAT_OR_NOT
def test_a_long_text_with_ones_own_words_falls_back_with_one_warning(
    is_chat_model: bool, requests: list[ParsedPrompt]
) -> None:
    context = "\n\n".join(shown(nodes(150)))
    text = f"Notes:\n\n{context}\n\nNow tell me: {QUESTION}"
    with pytest.warns(UserWarning, match="no known template") as caught:
        finch_llm(is_chat_model=is_chat_model).predict(PromptTemplate("{text}"), text=text)
    assert len(caught) == 1
    assert requests[0].parse_mode == "kept ends"
    assert requests[0].question.endswith(f"Now tell me: {QUESTION}")
    kept = [requests[0].instructions or "", requests[0].question]
    read = "\n".join([*kept, *(passage.text for passage in requests[0].passages)])
    assert all(node.node.get_content() in read for node in nodes(150))


# How much is read


def test_prompt_helper_counts_with_the_models_tokenizer_and_packs_all_into_one_text() -> None:
    llm = finch_llm()
    found = shown(nodes(100))
    helper = llm.prompt_helper()
    assert helper._token_counter.get_string_tokens(CONTEXT) == engine().count_tokens(CONTEXT)
    assert (helper.context_window, helper.num_output) == (llm.metadata.context_window, 8)
    (packed,) = helper.repack(DEFAULT_TEXT_QA_PROMPT, found, llm=llm)
    assert packed == "\n\n".join(text.strip() for text in found)
    assert llm.prompt_helper(chunk_size_limit=100).chunk_size_limit == 100


def test_with_its_prompt_helper_a_query_keeps_to_max_context_tokens() -> None:
    llm = finch_llm(max_context_tokens=1000)
    synthesizer = get_response_synthesizer(llm=llm, prompt_helper=llm.prompt_helper())
    with listening() as events:
        RetrieverQueryEngine(FixedRetriever(nodes(40)), response_synthesizer=synthesizer).query(QUESTION)
    assert calls(events) > 1
    assert 400 < max(report["context_tokens"] for report in reports(events)) <= 1000


@pytest.mark.parametrize("mode", MODES)
def test_more_than_max_context_tokens_is_an_error_with_both_numbers(mode: str) -> None:
    # LlamaIndex's own tokenizer takes these words for one token each.
    long = [NodeWithScore(node=TextNode(text="everything government because " * 200), score=1.0)]
    made = RetrieverQueryEngine.from_args(
        FixedRetriever(long), llm=finch_llm(max_context_tokens=2000), response_mode=ResponseMode(mode)
    )
    with pytest.raises(InputError, match=r"have \d+ tokens, more than max_context_tokens=2000") as caught:
        made.query(QUESTION)
    assert int(str(caught.value).split("have ")[1].split()[0]) > 2000
    assert "\n" not in str(caught.value)


# Errors reach the user


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_an_unknown_model_is_seen_not_an_empty_response(mode: str, streaming: bool) -> None:
    made = query_engine(FinchLLM("/no/such/folder"), mode, streaming=streaming)

    async def run() -> None:
        response: Any = await made.aquery(QUESTION)
        if streaming:
            async for _ in response.async_response_gen():
                pass

    with pytest.raises(ModelError, match="/no/such/folder"):
        str(made.query(QUESTION))
    with pytest.raises(ModelError, match="/no/such/folder"):
        asyncio.run(run())


@pytest.mark.parametrize("mode", MODES)
def test_a_budget_that_does_not_fit_is_an_error_with_both_numbers(mode: str) -> None:
    with pytest.raises(WindowError, match=r"9000.*8192"):
        query_engine(finch_llm(budget=9000), mode).query(QUESTION)


@CHAT_OR_NOT
@pytest.mark.parametrize("mode", MODES)
def test_an_empty_query_is_an_error(mode: str, is_chat_model: bool) -> None:
    with pytest.raises(InputError, match="question is empty"):
        query_engine(finch_llm(is_chat_model=is_chat_model), mode).query("")


def test_the_answer_depends_on_the_query() -> None:
    made = query_engine(finch_llm())
    assert str(made.query(QUESTION)) != str(made.query(OTHER_QUESTION))
