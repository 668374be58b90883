from __future__ import annotations

import asyncio
from typing import Any

import pytest
from li_support import (
    OTHER_QUESTION,
    QUESTION,
    FixedRetriever,
    calls,
    finch_llm,
    listening,
    nodes,
    reports,
    whole_text,
)
from llama_index.core import MockEmbedding, PromptTemplate, Settings, VectorStoreIndex
from llama_index.core.callbacks import CallbackManager, CBEventType, EventPayload, LlamaDebugHandler
from llama_index.core.llms import MockLLM
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.response_synthesizers import BaseSynthesizer
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle, TextNode
from llama_index.llms.finch import FinchLLM, FinchSynthesizer

from finch_rag import InputError, ModelError, SettingsError, WindowError
from finch_rag.prompts.builder import Prompt
from finch_rag.prompts.parsing import ParsedPrompt
from tests.small import texts


def engine_over(found: list[NodeWithScore], **settings: Any) -> RetrieverQueryEngine:
    return RetrieverQueryEngine(FixedRetriever(found), response_synthesizer=FinchSynthesizer(finch_llm(), **settings))


def cited(response: Any) -> dict[str, Any]:
    """Citations and report of a response."""
    found: dict[str, Any] = response.metadata["finch"]
    return found


def test_an_answer_cites_nodes_by_their_ids() -> None:
    with listening() as events:
        response = engine_over(nodes()).query(QUESTION)
    found = cited(response)
    assert calls(events) == 1
    assert reports(events) == [found["report"]]
    assert (found["report"]["parse_mode"], found["report"]["passages"]) == ("apart", 12)
    assert 0 < len(found["citations"]) < 12
    for citation in found["citations"]:
        assert citation["passage_id"] == f"n{citation['index']}"
        assert citation["title"] == f"notes-{citation['index']}.md"
    assert str(response)


def test_an_answers_sentences_come_with_the_nodes_sentences_that_they_rest_on() -> None:
    found = nodes()
    engine = RetrieverQueryEngine(
        FixedRetriever(found), response_synthesizer=FinchSynthesizer(finch_llm(budget=200, cutoff=0))
    )
    response = engine.query(QUESTION)
    statements = cited(response)["statements"]
    quotes = [quote for each in cited(response)["citations"] for quote in each["quotes"]]
    assert quotes
    for statement in statements:
        assert str(response)[statement["start"] : statement["end"]] == statement["text"]
        for source in statement["sources"]:
            text = found[source["index"]].node.get_content(metadata_mode=MetadataMode.LLM)
            assert all(quote["text"] in text for quote in source["quotes"])
    without = RetrieverQueryEngine(
        FixedRetriever(found), response_synthesizer=FinchSynthesizer(finch_llm(quotes=False))
    )
    assert cited(without.query(QUESTION))["statements"] == []


def test_source_nodes_are_the_retrieved_ones_with_their_scores_in_their_order() -> None:
    found = nodes()
    response = engine_over(found).query(QUESTION)
    assert response.source_nodes == found
    assert all(source.node is node.node for source, node in zip(response.source_nodes, found, strict=True))
    assert (response.metadata or {})["n3"] == found[3].node.metadata


def test_the_question_and_the_nodes_decide_the_answer() -> None:
    answered = str(engine_over(nodes()).query(QUESTION))
    assert str(engine_over(nodes()).query(OTHER_QUESTION)) != answered
    assert str(engine_over(nodes()[6:]).query(QUESTION)) != answered
    assert str(engine_over(nodes()).query(QueryBundle(QUESTION))) == answered


@pytest.mark.parametrize(
    ("metadata", "title"),
    [
        ({"title": "The bridge", "file_name": "b.md"}, "The bridge"),
        ({"file_name": "b.md", "source": "web"}, "b.md"),
        ({"source": "web", "title": ""}, "web"),
        ({"page": 3}, None),
    ],
)
def test_a_title_is_the_first_that_metadata_has_and_is_read_once(
    metadata: dict[str, Any], title: str | None, requests: list[ParsedPrompt]
) -> None:
    node = TextNode(text="It was built in 1874.", id_="n0", metadata={**metadata, "year": 1874})
    FinchSynthesizer(finch_llm()).synthesize(QUESTION, [NodeWithScore(node=node)])
    (passage,) = requests[0].passages
    read = f"{passage.title}\n{passage.text}"
    assert (passage.id, passage.title) == ("n0", title)
    assert title is None or read.count(title) == 1
    assert "year: 1874" in passage.text
    assert passage.text.endswith("It was built in 1874.")
    assert node.excluded_llm_metadata_keys == []


def test_nodes_are_read_as_they_show_themselves_to_llms(requests: list[ParsedPrompt]) -> None:
    node = TextNode(
        text="It was built in 1874.",
        metadata={"page": 3, "secret": "x"},
        excluded_llm_metadata_keys=["secret"],
        text_template="{metadata_str} | {content}",
    )
    FinchSynthesizer(finch_llm()).synthesize(QUESTION, [NodeWithScore(node=node)])
    assert requests[0].passages[0].text == node.get_content(MetadataMode.LLM) == "page: 3 | It was built in 1874."


def test_a_streamed_response_has_its_metadata_at_its_end() -> None:
    whole = engine_over(nodes()).query(QUESTION)
    response: Any = engine_over(nodes(), streaming=True).query(QUESTION)
    deltas = response.response_gen
    text = next(deltas)
    assert "finch" not in response.metadata
    rest = list(deltas)
    assert rest
    assert text + "".join(rest) == str(whole)
    assert cited(response)["citations"] == cited(whole)["citations"]
    assert response.source_nodes == whole.source_nodes


def test_it_runs_in_a_loop_streamed_too() -> None:
    whole = engine_over(nodes()).query(QUESTION)

    async def streamed() -> tuple[str, Any]:
        response: Any = await engine_over(nodes(), streaming=True).aquery(QUESTION)
        assert "finch" not in response.metadata
        return "".join([delta async for delta in response.async_response_gen()]), response.metadata

    answered = asyncio.run(engine_over(nodes()).aquery(QUESTION))
    text, metadata = asyncio.run(streamed())
    assert str(answered) == text == str(whole)
    expected = cited(whole)["citations"]
    assert cited(answered)["citations"] == metadata["finch"]["citations"] == expected


def test_additional_source_nodes_are_added_and_not_read() -> None:
    found = nodes()
    synthesizer = FinchSynthesizer(finch_llm())
    response = synthesizer.synthesize(QUESTION, found[:4], additional_source_nodes=found[4:6])
    later = asyncio.run(synthesizer.asynthesize(QUESTION, found[:4], additional_source_nodes=found[4:6]))
    for made in (response, later):
        assert made.source_nodes == found[:6]
        assert cited(made)["report"]["passages"] == 4


def test_options_of_a_call_are_handed_on() -> None:
    response = FinchSynthesizer(finch_llm()).synthesize(QUESTION, nodes(), budget=30, max_tokens=2)
    report = cited(response)["report"]
    assert (report["budget"], report["new_tokens"]) == (30, 2)


def test_an_index_takes_it_as_its_response_synthesizer() -> None:
    index = VectorStoreIndex([node.node for node in nodes()], embed_model=MockEmbedding(embed_dim=4))
    llm = finch_llm()
    made = index.as_query_engine(llm=llm, response_synthesizer=FinchSynthesizer(llm=llm), similarity_top_k=5)
    response = made.query(QUESTION)
    assert cited(response)["report"]["passages"] == len(response.source_nodes) == 5


def test_texts_without_ids_are_answered_too() -> None:
    synthesizer = FinchSynthesizer(finch_llm())
    whole = synthesizer.get_response(QUESTION, texts(6))

    async def run() -> list[Any]:
        deltas: Any = await FinchSynthesizer(finch_llm(), streaming=True).aget_response(QUESTION, texts(6))
        return [await synthesizer.aget_response(QUESTION, texts(6)), "".join([delta async for delta in deltas])]

    streamed: Any = FinchSynthesizer(finch_llm(), streaming=True).get_response(QUESTION, texts(6))
    assert whole
    assert "".join(streamed) == whole
    assert asyncio.run(run()) == [whole, whole]


def test_settings_llm_is_used_where_none_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Settings, "_llm", finch_llm())
    response = FinchSynthesizer().synthesize(QUESTION, nodes())
    assert cited(response)["report"]["passages"] == 12


@pytest.mark.parametrize("given", [True, False])
def test_another_llm_is_refused(given: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    other: Any = MockLLM()
    monkeypatch.setattr(Settings, "_llm", other)
    with pytest.raises(SettingsError, match=r"not MockLLM: pass llm=FinchLLM"):
        FinchSynthesizer(llm=other if given else None)


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize(
    ("found", "question", "reason"),
    [
        (nodes(), " ", "question is empty"),
    ],
)
def test_bad_input_is_one_clear_error_of_the_query_engine(
    found: list[NodeWithScore], question: str, reason: str, streaming: bool
) -> None:
    made = engine_over(found, streaming=streaming)

    async def run() -> None:
        response: Any = await made.aquery(question)
        if streaming:
            async for _ in response.async_response_gen():
                pass

    with pytest.raises(InputError, match=reason) as caught:
        made.query(question)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=reason):
        asyncio.run(run())


def test_errors_of_model_and_window_reach_the_user() -> None:
    def made(llm: FinchLLM) -> RetrieverQueryEngine:
        return RetrieverQueryEngine(FixedRetriever(nodes()), response_synthesizer=FinchSynthesizer(llm))

    with pytest.raises(ModelError, match="/no/such/folder"):
        made(FinchLLM("/no/such/folder")).query(QUESTION)
    with pytest.raises(WindowError, match=r"9000.*8192"):
        made(finch_llm(budget=9000)).query(QUESTION)
    with pytest.raises(InputError, match=r"have \d+ tokens, more than max_context_tokens=50"):
        made(finch_llm(max_context_tokens=50)).query(QUESTION)


@pytest.mark.parametrize("streaming", [True, False])
def test_callbacks_and_instrumentation_see_the_synthesis(streaming: bool) -> None:
    handler = LlamaDebugHandler(print_trace_on_end=False)
    made = FinchSynthesizer(finch_llm(), streaming=streaming, callback_manager=CallbackManager([handler]))
    for run in (made.synthesize, lambda *asked: asyncio.run(made.asynthesize(*asked))):
        handler.flush_event_logs()
        with listening() as events:
            response: Any = run(QUESTION, nodes())
        ((start, end),) = handler.get_event_pairs(CBEventType.SYNTHESIZE)
        assert start.payload == {EventPayload.QUERY_STR: QUESTION}
        assert end.payload == {EventPayload.RESPONSE: response}
        names = [type(event).__name__ for event in events]
        assert (names[0], names[-1]) == ("SynthesizeStartEvent", "SynthesizeEndEvent")
        assert events[-1].response is response
        assert "LLMChatStartEvent" in names


def test_it_is_a_synthesizer_whose_prompt_may_be_ones_own(requests: list[ParsedPrompt], prompts: list[Prompt]) -> None:
    made = FinchSynthesizer(finch_llm())
    assert isinstance(made, BaseSynthesizer)
    found = nodes()
    default = made.synthesize(QUESTION, found)
    assert list(made.get_prompts()) == ["text_qa_template"]
    own = PromptTemplate("Reply in French.\n\n{context_str}\n\nFrage: {query_str}")
    assert str(
        FinchSynthesizer(finch_llm(), text_qa_template=made.get_prompts()["text_qa_template"]).synthesize(
            QUESTION, found
        )
    ) == str(default)
    made.update_prompts({"text_qa_template": own})
    made.update_prompts({"refine_template": PromptTemplate("never asked")})
    assert made.get_prompts()["text_qa_template"] == own
    response = made.synthesize(QUESTION, found)
    assert (requests[-1].question, len(requests[-1].passages)) == (QUESTION, 12)
    assert "Reply in French.\n\nnotes-0.md" in whole_text(prompts[-1])
    assert all(citation["passage_id"].startswith("n") for citation in cited(response)["citations"])
    engine = RetrieverQueryEngine(FixedRetriever(found), response_synthesizer=FinchSynthesizer(finch_llm()))
    engine.update_prompts({"response_synthesizer:text_qa_template": own})
    assert str(engine.query(QUESTION)) == str(response)


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        (PromptTemplate("{query_str}"), "no {context_str}"),
        (
            PromptTemplate("{context_str} {query_str}", function_mappings={"context_str": lambda **fields: "text"}),
            "context_str with a function",
        ),
    ],
)
def test_a_prompt_without_place_for_nodes_is_refused(prompt: PromptTemplate, reason: str) -> None:
    made = FinchSynthesizer(finch_llm())
    with pytest.raises(SettingsError, match=reason):
        made.update_prompts({"text_qa_template": prompt})
    with pytest.raises(SettingsError, match=reason):
        FinchSynthesizer(finch_llm(), text_qa_template=prompt)


async def test_no_nodes_give_an_empty_response_as_llama_index_does() -> None:
    for streaming in (False, True):
        made = engine_over([], streaming=streaming)
        with listening() as events:
            assert str(made.query(QUESTION)) == "Empty Response"
            response: Any = await made.aquery(QUESTION)
            text = "".join([piece async for piece in response.async_response_gen()]) if streaming else str(response)
            assert text == "Empty Response"
        assert calls(events) == 0
        assert sum(type(event).__name__ == "SynthesizeEndEvent" for event in events) == 2
