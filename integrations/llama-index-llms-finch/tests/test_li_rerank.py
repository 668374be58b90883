from __future__ import annotations

import asyncio
from typing import Any

import pytest
from li_support import QUESTION, FixedRetriever, calls, counted_passes, engine, finch_llm, listening, nodes, shown
from llama_index.core import Settings
from llama_index.core.callbacks import CallbackManager, CBEventType, EventPayload, LlamaDebugHandler
from llama_index.core.llms import MockLLM
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.schema import NodeWithScore, QueryBundle
from llama_index.llms.finch import FinchRerank

from finch_rag import Citation, InputError, ModelError, Passage, SettingsError


def ranked(found: list[NodeWithScore], **limits: Any) -> list[NodeWithScore]:
    return FinchRerank(finch_llm(), **limits).postprocess_nodes(found, query_str=QUESTION)


def by_the_engine() -> list[Citation]:
    read = [
        Passage(f"page: {n}\n\n{node.node.get_content()}", title=node.node.metadata["file_name"])
        for n, node in enumerate(nodes())
    ]
    return engine().rank(QUESTION, read)


def test_nodes_come_by_falling_share_of_attention() -> None:
    found = ranked(nodes())
    scores = [node.score or 0.0 for node in found]
    assert scores == sorted(scores, reverse=True)
    assert sum(scores) == pytest.approx(1.0, abs=1e-4)
    assert len(set(scores)) == len(found) == 12
    assert [node.node_id for node in found] != [node.node_id for node in nodes()]


def test_order_and_scores_are_the_engines() -> None:
    expected = by_the_engine()
    assert [node.node_id for node in ranked(nodes())] == [f"n{citation.index}" for citation in expected]
    assert [node.score for node in ranked(nodes())] == [citation.share for citation in expected]


def test_the_llms_chunk_size_is_used_else_the_engines() -> None:
    with counted_passes(engine()) as passes:
        ranked(nodes())
        usual = len(passes)
        FinchRerank(finch_llm(chunk_size=50)).postprocess_nodes(nodes(), query_str=QUESTION)
    assert len(passes) - usual > usual + 3


def test_nodes_stay_what_they_are() -> None:
    given = nodes()
    scores = [node.score for node in given]
    for node in ranked(given):
        assert any(node.node is other.node for other in given)
    assert [node.score for node in given] == scores  # the retriever's list is not touched


@pytest.mark.parametrize("top_n", [1, 3, 12, 100])
def test_top_n_keeps_the_best(top_n: int) -> None:
    assert ranked(nodes(), top_n=top_n) == ranked(nodes())[:top_n]


def test_a_budget_keeps_the_best_whole_nodes_that_fit() -> None:
    best = ranked(nodes())
    sizes = [citation.passage_tokens for citation in by_the_engine()]
    assert ranked(nodes(), budget=sum(sizes[:3])) == best[:3]
    assert ranked(nodes(), budget=sum(sizes[:3]) - 1) == best[:2]
    assert ranked(nodes(), budget=1) == best[:1]  # never nothing
    assert ranked(nodes(), budget=sum(sizes[:3]), top_n=2) == best[:2]
    assert ranked(nodes(), budget=sum(sizes[:2]), top_n=5) == best[:2]


def test_nothing_to_rank_is_nothing() -> None:
    assert ranked([]) == []


def test_it_runs_in_a_loop() -> None:
    reranker = FinchRerank(finch_llm(), top_n=4)
    assert asyncio.run(reranker.apostprocess_nodes(nodes(), QueryBundle(QUESTION))) == ranked(nodes(), top_n=4)


def test_another_llm_answers_from_the_best_nodes() -> None:
    made = RetrieverQueryEngine.from_args(
        FixedRetriever(nodes()), llm=MockLLM(), node_postprocessors=[FinchRerank(finch_llm(), top_n=2)]
    )
    best = ranked(nodes(), top_n=2)
    with listening() as events:
        response = made.query(QUESTION)
    assert response.source_nodes == best
    assert calls(events) == 1  # the mock's
    assert all(text in str(response) for text in shown(best))  # the mock repeats its prompt
    assert not any(text in str(response) for text in shown(ranked(nodes())[2:]))
    assert asyncio.run(made.aquery(QUESTION)).source_nodes == best


@pytest.mark.parametrize(
    ("limits", "reason"),
    [({"top_n": 0}, "top_n is 0: the least is 1"), ({"budget": -5}, "budget is -5: the least is 1")],
)
def test_a_limit_below_one_is_refused(limits: dict[str, Any], reason: str) -> None:
    with pytest.raises(SettingsError, match=reason):
        FinchRerank(finch_llm(), **limits)


def test_another_llm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    other: Any = MockLLM()
    monkeypatch.setattr(Settings, "_llm", other)
    for llm in (other, None):
        with pytest.raises(SettingsError, match="not MockLLM"):
            FinchRerank(llm)
    monkeypatch.setattr(Settings, "_llm", finch_llm())
    assert len(FinchRerank(top_n=2).postprocess_nodes(nodes(), query_str=QUESTION)) == 2


@pytest.mark.parametrize(
    ("found", "query", "reason"),
    [
        (nodes(), None, "no query"),
        (nodes(), " ", "question is empty"),
    ],
)
def test_bad_input_is_one_clear_error(found: list[NodeWithScore], query: str | None, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        FinchRerank(finch_llm()).postprocess_nodes(found, query_str=query)


def test_limits_of_the_llm_hold() -> None:
    with pytest.raises(InputError, match="max_context_tokens=50"):
        FinchRerank(finch_llm(max_context_tokens=50)).postprocess_nodes(nodes(), query_str=QUESTION)
    with pytest.raises(ModelError, match="/no/such/folder"):
        FinchRerank(type(finch_llm())("/no/such/folder")).postprocess_nodes(nodes(), query_str=QUESTION)


def test_callbacks_and_instrumentation_see_the_ranking() -> None:
    handler = LlamaDebugHandler(print_trace_on_end=False)
    reranker = FinchRerank(finch_llm(), top_n=3, callback_manager=CallbackManager([handler]))
    with listening() as events:
        best = reranker.postprocess_nodes(nodes(), query_str=QUESTION)
    ((start, end),) = handler.get_event_pairs(CBEventType.RERANKING)
    assert start.payload
    assert (start.payload[EventPayload.TOP_K], start.payload[EventPayload.QUERY_STR]) == (3, QUESTION)
    assert end.payload == {EventPayload.NODES: best}
    assert [type(event).__name__ for event in events] == ["ReRankStartEvent", "ReRankEndEvent"]
    assert (events[0].top_n, events[0].model_name, events[1].nodes) == (3, "small", best)


def test_it_is_written_down_without_the_model() -> None:
    stored = FinchRerank(finch_llm(), top_n=3).to_dict()
    assert (stored["top_n"], stored["llm"]["model_name"], stored["class_name"]) == (3, "small", "FinchRerank")
