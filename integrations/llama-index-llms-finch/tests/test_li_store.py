"""A store behind LlamaIndex: nodes are read once for all questions, and a retriever searches them."""

from __future__ import annotations

import asyncio
import copy
import pickle
import threading
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from li_fixtures import Says
from li_support import (
    OTHER_QUESTION,
    QUESTION,
    FixedRetriever,
    calls,
    counted_passes,
    finch_llm,
    listening,
    new_engine,
    nodes,
    on_each_pass,
    reports,
    shown,
)
from llama_index.core import MockEmbedding, PromptTemplate, Settings, VectorStoreIndex
from llama_index.core.callbacks import CallbackManager, CBEventType, EventPayload, LlamaDebugHandler
from llama_index.core.chat_engine import CondensePlusContextChatEngine, ContextChatEngine
from llama_index.core.llms import MockLLM
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.retrievers import QueryFusionRetriever, RouterRetriever
from llama_index.core.retrievers.fusion_retriever import FUSION_MODES
from llama_index.core.schema import (
    Document,
    IndexNode,
    MetadataMode,
    NodeRelationship,
    NodeWithScore,
    RelatedNodeInfo,
    TextNode,
)
from llama_index.core.selectors import LLMSingleSelector
from llama_index.core.tools import RetrieverTool
from llama_index.llms.finch import FinchLLM, FinchRerank, FinchRetriever, FinchSynthesizer, PassagesMessage
from llama_index.llms.finch.nodes import passage_of

from finch_rag import Finch, InputError, Passage, PassageStore, SettingsError, StoreError
from finch_rag.prompts.parsing import ParsedPrompt
from tests.small import texts

HEADS = {0: (1,), 1: (2,)}
THIRD_QUESTION = "which river feeds the mill?"


@pytest.fixture(autouse=True)
def heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of random weights have no heads that find passages."""
    monkeypatch.setattr("finch_rag.runtime.resolve_alone_heads", lambda *_: HEADS)


@pytest.fixture
def finch() -> Finch:
    """An engine that no other test has, with no store open."""
    return new_engine()


@pytest.fixture
def llm(finch: Finch) -> FinchLLM:
    return finch_llm(engine=finch, store=True)


@pytest.fixture
def many_paragraphs() -> list[NodeWithScore]:
    """Nodes of several paragraphs, which a prompt shows as more passages than they are."""
    return [
        NodeWithScore(
            node=TextNode(text=f"{text}\n\nfile_name: forged.md\n\n{text[::-1]}", id_=f"m{n}", metadata=metadata)
        )
        for n, text in enumerate(texts(6))
        for metadata in [{"file_name": f"notes-{n}.md"} if n % 2 else {}]
    ]


def base_nodes(count: int = 12) -> list[Any]:
    return [item.node for item in nodes(count)]


def read(report: dict[str, Any]) -> tuple[int, int]:
    """Tokens that a call read now, and those that it knew."""
    return report["stored_tokens"], report["known_tokens"]


def store_of(llm: FinchLLM) -> PassageStore:
    opened = llm.open_store()
    assert opened is not None
    return opened


# The second question reads nothing


def index_over(found: list[NodeWithScore]) -> VectorStoreIndex:
    return VectorStoreIndex([item.node for item in found], embed_model=MockEmbedding(4))


def test_the_default_query_engine_reads_nothing_for_the_second_question(llm: FinchLLM) -> None:
    engine = index_over(nodes()).as_query_engine(llm=llm, similarity_top_k=12)
    with listening() as events:
        engine.query(QUESTION)
        engine.query(OTHER_QUESTION)
    first, second = reports(events)
    assert first["stored_tokens"] == first["context_tokens"] > 0
    assert read(second) == (0, first["context_tokens"])
    assert second["parse_mode"] == "llama-index/text-qa"


@pytest.mark.parametrize("streaming", [False, True])
def test_a_synthesizer_reads_nothing_for_the_second_question(finch: Finch, streaming: bool) -> None:
    synthesizer = FinchSynthesizer(finch_llm(engine=finch), store=True, streaming=streaming)
    engine = RetrieverQueryEngine(FixedRetriever(nodes()), response_synthesizer=synthesizer)
    found = []
    for question in (QUESTION, OTHER_QUESTION):
        response: Any = engine.query(question)
        assert str(response) or streaming
        found.append(response.metadata["finch"]["report"])
    assert found[0]["stored_tokens"] == found[0]["context_tokens"] > 0
    assert read(found[1]) == (0, found[0]["context_tokens"])


def test_chat_engines_read_nothing_for_the_second_question(llm: FinchLLM) -> None:
    for made in (
        ContextChatEngine.from_defaults(retriever=FixedRetriever(nodes()), llm=llm),
        CondensePlusContextChatEngine.from_defaults(retriever=FixedRetriever(nodes()), llm=llm, skip_condense=True),
    ):
        store_of(llm).clear()
        with listening() as events:
            made.chat(QUESTION)
            made.chat(OTHER_QUESTION)
        first, second = reports(events)
        assert first["stored_tokens"] == first["context_tokens"] > 0
        assert read(second) == (0, first["context_tokens"])


def test_a_reranker_reads_each_node_once(finch: Finch) -> None:
    reranker = FinchRerank(finch_llm(engine=finch), store=True)
    with counted_passes(finch) as passes:
        first = reranker.postprocess_nodes(nodes(), query_str=QUESTION)
        before = len(passes)
        second = reranker.postprocess_nodes(nodes(), query_str=OTHER_QUESTION)
        assert len(passes) - before == 1  # of the question
    assert before > 1
    assert sum(item.score or 0 for item in first) == pytest.approx(1, abs=1e-4)
    assert [item.node_id for item in first] != [item.node_id for item in second]
    assert {item.node_id for item in first} == {item.node_id for item in nodes()}


def test_what_a_reranker_read_the_answer_does_not_read_again(llm: FinchLLM) -> None:
    for synthesizer in (None, FinchSynthesizer(llm)):
        store_of(llm).clear()
        engine = RetrieverQueryEngine.from_args(
            FixedRetriever(nodes()),
            llm=llm,
            node_postprocessors=[FinchRerank(llm, top_n=5)],
            response_synthesizer=synthesizer,
        )
        with listening() as events:
            engine.query(QUESTION)
        (report,) = reports(events)
        assert report["passages"] == 5
        assert read(report) == (0, report["context_tokens"])


def test_texts_without_ids_do_not_push_each_other_out(llm: FinchLLM) -> None:
    llm.chat([PassagesMessage(QUESTION, texts(6))])
    llm.chat([PassagesMessage(QUESTION, texts(9)[6:])])
    again = llm.chat([PassagesMessage(OTHER_QUESTION, texts(6))]).additional_kwargs["report"]
    assert again["stored_tokens"] == 0
    assert len(store_of(llm)) == 9


def test_a_synthesizers_texts_are_named_once(llm: FinchLLM) -> None:
    synthesizer = FinchSynthesizer(llm)
    for question in (QUESTION, OTHER_QUESTION):
        synthesizer.get_response(question, texts(5))
    assert len(store_of(llm)) == 5


def test_async_calls_have_a_store_too(llm: FinchLLM) -> None:
    engine = RetrieverQueryEngine.from_args(FinchRetriever.from_nodes(base_nodes(), llm=llm), llm=llm)
    with listening() as events:
        asyncio.run(engine.aquery(QUESTION))
    (report,) = reports(events)
    assert read(report) == (0, report["context_tokens"])
    assert report["context_tokens"] > 0


# Where the store is


def test_a_call_an_llm_and_an_engine_may_have_the_store(finch: Finch, tmp_path: Path) -> None:
    message = PassagesMessage(QUESTION, nodes())

    def report(llm: FinchLLM, **options: Any) -> dict[str, Any]:
        found: dict[str, Any] = llm.chat([message], **options).additional_kwargs["report"]
        return found

    plain = finch_llm(engine=finch)
    assert read(report(plain)) == (0, 0)
    tokens = report(plain)["context_tokens"]
    assert read(report(plain, store=True)) == (tokens, 0)
    assert read(report(finch_llm(engine=finch, store=True))) == (0, tokens)
    assert read(report(finch_llm(engine=finch, store=True), store=False)) == (0, 0)
    with finch.open_store(tmp_path / "a") as opened:
        assert read(report(finch_llm(engine=finch, store=opened))) == (tokens, 0)
    for place in (tmp_path / "a", str(tmp_path / "a")):  # the folder that was closed is opened again
        assert read(report(finch_llm(engine=finch, store=place))) == (0, tokens)
    owner = new_engine(store=tmp_path / "b")
    assert read(report(finch_llm(engine=owner))) == (tokens, 0)
    assert read(report(finch_llm(engine=owner))) == (0, tokens)
    assert read(report(finch_llm(engine=owner, store=False))) == (0, 0)
    owner.runtime.stores.at(tmp_path / "b").close()  # type: ignore[union-attr]


def test_components_share_the_llms_store_or_have_their_own(finch: Finch, tmp_path: Path) -> None:
    llm = finch_llm(engine=finch, store=True)
    own = FinchRetriever(llm=llm).store
    assert own is store_of(llm) is FinchRetriever(store=True, llm=llm).store
    other = FinchRetriever(store=tmp_path / "s", llm=llm).store
    assert other is not own
    assert llm.store is True
    owner = finch_llm(engine=new_engine(store=tmp_path / "own"))
    for same in (llm.with_store(True), llm.with_store(None), FinchRerank(llm).llm):
        assert same is llm
    assert owner.with_store(str(tmp_path / "own")) is owner
    assert FinchRerank(llm, store=str(tmp_path / "s")).llm.open_store() is other
    assert FinchRerank(llm, store=False).llm.open_store() is None
    other.close()


def test_shortlist_tokens_reach_the_engine(finch: Finch) -> None:
    given = nodes(40)
    FinchRetriever.from_nodes([item.node for item in given], llm=finch_llm(engine=finch, store=True))
    passes = {}
    for tokens in (0, 4000):
        llm = finch_llm(engine=finch, store=True, shortlist_tokens=tokens)
        with counted_passes(finch) as counted:
            llm.chat([PassagesMessage(QUESTION, given)], max_tokens=1)
        passes[tokens] = len(counted)
    assert passes[0] < passes[4000]


def test_the_strategy_reaches_the_engine(finch: Finch) -> None:
    for strategy in ("independent", "loop"):
        llm = finch_llm(engine=finch, strategy=strategy)
        answer = llm.chat([PassagesMessage(QUESTION, nodes(40))], max_tokens=1)
        assert answer.raw["report"]["strategy"] == llm.strategy == strategy
        other = llm.chat([PassagesMessage(QUESTION, nodes(40))], max_tokens=1, strategy="loop")
        assert other.raw["report"]["strategy"] == "loop"
    with pytest.raises(SettingsError, match="strategy is 'both'"):
        finch_llm(engine=finch, strategy="both")


def test_the_cutoff_reaches_the_engine(finch: Finch) -> None:
    def kept(llm: FinchLLM, **options: Any) -> int:
        return int(
            llm.chat([PassagesMessage(QUESTION, nodes(40))], max_tokens=1, **options).raw["report"]["kept_tokens"]
        )

    llm = finch_llm(engine=finch, budget=200, cutoff=1)
    assert 0 < kept(llm) < kept(llm, cutoff=0) <= 200
    with pytest.raises(SettingsError, match="cutoff is 2"):
        finch_llm(engine=finch, cutoff=2)


def test_what_ranks_and_judges_reaches_the_engine(finch: Finch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finch_rag.quotes.support.calibrated", lambda runtime, told: (0.0, 1.0, 1.0))
    message = PassagesMessage(QUESTION, nodes(40))
    llm = finch_llm(engine=finch, rounds=1, prior="none", support=True, budget=100)
    assert (llm.rounds, llm.prior, llm.support) == (1, "none", True)
    answer = llm.chat([message], max_tokens=4, strategy="independent")
    assert answer.raw["report"]["rounds"] == 1
    assert 0 < answer.raw["support"] < 1
    withheld = llm.chat([message], max_tokens=4, strategy="independent", min_support=1)
    assert withheld.message.content == ""
    assert withheld.raw["report"]["stop_reason"] == "unsupported"
    for wrong in ({"rounds": 3}, {"prior": "scores"}, {"min_support": 2}):
        with pytest.raises(SettingsError, match=next(iter(wrong))):
            finch_llm(engine=finch, **wrong)


def test_scores_of_nodes_are_those_of_passages() -> None:
    node = TextNode(id_="a", text="some text")
    assert passage_of(NodeWithScore(node=node, score=0.5)).score == 0.5
    assert passage_of(NodeWithScore(node=node, score=None)).score is None
    assert passage_of(NodeWithScore(node=node, score=float("nan"))).score is None
    assert passage_of(NodeWithScore(node=TextNode(id_="b", text=" "), score=0.5)).score == 0.5


# Writing down


def test_a_folder_and_memory_survive_and_an_open_store_does_not(finch: Finch, tmp_path: Path) -> None:
    for place in (str(tmp_path / "s"), True, False, None):
        llm = FinchLLM("/no/such/folder", store=place, shortlist_tokens=7)
        for again in (
            FinchLLM.from_dict(llm.to_dict()),
            FinchLLM.from_json(llm.to_json()),
            pickle.loads(pickle.dumps(llm)),
            copy.deepcopy(llm),
        ):
            assert (again.store, again.shortlist_tokens) == (place, 7)
    assert FinchLLM("/no/such/folder", store=tmp_path / "s").to_dict()["store"] == str(tmp_path / "s")
    with finch.open_store() as opened:
        llm = FinchLLM("/no/such/folder", store=opened)
        assert llm.to_dict()["store"] is None
        for copied in (copy.copy(llm), copy.deepcopy(llm), llm.model_copy()):
            assert copied.open_store() is opened
        with pytest.raises(SettingsError, match="open store cannot be pickled: pass the store's folder") as caught:
            pickle.dumps(llm)
        assert "\n" not in str(caught.value)


def test_an_llm_that_has_opened_its_store_can_be_copied(llm: FinchLLM) -> None:
    llm.chat([PassagesMessage(QUESTION, nodes())])
    for again in (copy.copy(llm), copy.deepcopy(llm), llm.model_copy()):
        assert again.open_store() is llm.open_store()


def test_a_reranker_is_written_down_with_its_store() -> None:
    stored = FinchRerank(FinchLLM("/no/such/folder"), store="kept").to_dict()
    assert stored["llm"]["store"] == "kept"
    assert FinchRerank(**{**stored, "llm": stored["llm"]}).llm.store == "kept"


# The retriever


@pytest.fixture
def retriever(llm: FinchLLM) -> FinchRetriever:
    return FinchRetriever.from_nodes(base_nodes(), llm=llm, similarity_top_k=4)


def test_nodes_come_by_the_share_of_attention_as_the_store_ranks_them(retriever: FinchRetriever) -> None:
    found = retriever.retrieve(QUESTION)
    expected = retriever.store.retrieve(QUESTION, 4)
    assert [(item.node_id, item.score) for item in found] == [(each.passage.id, each.share) for each in expected]
    retriever.similarity_top_k = 12
    everything = retriever.retrieve(QUESTION)
    assert everything[:4] == found
    assert sum(item.score or 0 for item in everything) == pytest.approx(1, abs=1e-4)
    assert [item.node_id for item in retriever.retrieve(OTHER_QUESTION)] != [item.node_id for item in everything]


def test_nodes_come_back_as_they_were(llm: FinchLLM) -> None:
    source = {NodeRelationship.SOURCE: RelatedNodeInfo(node_id="book")}
    given: list[Any] = [
        *base_nodes(2),
        TextNode(
            text=" x\n\ny ",
            id_="odd",
            metadata={"title": "T", "secret": 1, "tags": ["a", {"b": 2}]},
            excluded_llm_metadata_keys=["secret"],
            text_template="{metadata_str} | {content}",
            relationships=source,
        ),
        Document(text="A whole document.", id_="doc", metadata={"source": "web"}),
        IndexNode(text="Points elsewhere.", id_="pointer", index_id="other"),
    ]
    retriever = FinchRetriever(llm=llm, similarity_top_k=9)
    assert retriever.add_nodes(given) == [node.node_id for node in given]
    found = {item.node_id: item.node for item in retriever.retrieve(QUESTION)}
    assert found == {node.node_id: node for node in given}
    assert [type(found[node.node_id]) for node in given] == [type(node) for node in given]
    assert found["odd"].ref_doc_id == "book"


def test_embeddings_are_not_kept_and_the_given_nodes_not_touched(llm: FinchLLM) -> None:
    node = TextNode(text="Some text.", id_="e", embedding=[0.1, 0.2])
    (found,) = FinchRetriever.from_nodes([node], llm=llm).retrieve(QUESTION)
    assert found.node.embedding is None
    assert node.embedding == [0.1, 0.2]


def test_metadata_that_is_no_json_reads_alike(llm: FinchLLM) -> None:
    node = TextNode(text="Built.", id_="d", metadata={"day": date(1874, 5, 1), "file_name": "b.md"})
    (found,) = FinchRetriever.from_nodes([node], llm=llm).retrieve(QUESTION)
    assert found.node.metadata == {"day": "1874-05-01", "file_name": "b.md"}
    assert found.node.get_content(MetadataMode.LLM) == node.get_content(MetadataMode.LLM)


def test_passages_of_the_store_are_nodes_with_their_titles(llm: FinchLLM) -> None:
    store = store_of(llm)
    store.add([Passage("The pier is new.", "p", "Pier", {"page": 3, "source": "web"}), "No id, no title."])
    retriever = FinchRetriever(store)
    first, second = sorted(retriever.retrieve(QUESTION), key=lambda item: item.node_id != "p")
    assert isinstance(first.node, TextNode)
    assert (first.node_id, first.node.text) == ("p", "The pier is new.")
    assert first.node.metadata == {"page": 3, "source": "web", "title": "Pier"}
    assert first.node.get_content(MetadataMode.LLM) == "title: Pier\n\nThe pier is new."
    assert second.node.get_content(MetadataMode.LLM) == "No id, no title."
    assert second.node_id == sorted(retriever.retrieve(OTHER_QUESTION), key=lambda item: item.node_id != "p")[1].node_id
    for synthesizer in (None, FinchSynthesizer(llm)):
        with listening() as events:
            RetrieverQueryEngine.from_args(retriever, llm=llm, response_synthesizer=synthesizer).query(QUESTION)
        (report,) = reports(events)
        assert read(report) == (0, report["context_tokens"])
    assert [item.node_id for item in retriever.retrieve(QUESTION)].count("p") == 1
    assert len(retriever.retrieve(QUESTION)) == 2


@pytest.mark.parametrize("is_chat_model", [True, False])
@pytest.mark.parametrize("template", [None, "Say it in French.\n{context_str}\nNow: {query_str}"])
def test_a_query_engine_reads_nothing_that_the_retriever_has(
    finch: Finch, many_paragraphs: list[NodeWithScore], is_chat_model: bool, template: str | None
) -> None:
    llm = finch_llm(engine=finch, store=True, is_chat_model=is_chat_model)
    given = [*many_paragraphs, *nodes()]
    retriever = FinchRetriever.from_nodes([item.node for item in given], llm=llm, similarity_top_k=len(given))
    options: dict[str, Any] = {} if template is None else {"text_qa_template": PromptTemplate(template)}
    before = store_of(llm).info()
    with listening() as events:
        response = RetrieverQueryEngine.from_args(retriever, llm=llm, **options).query(QUESTION)
    (report,) = reports(events)
    assert read(report) == (0, before.tokens)
    assert (report["passages"], report["parse_mode"]) == (len(given), "apart")
    assert store_of(llm).info() == before
    assert calls(events) == 1
    assert len(response.source_nodes) == len(given)


def test_the_drop_in_cites_the_retrievers_nodes(retriever: FinchRetriever, llm: FinchLLM) -> None:
    (prompt,) = [PromptTemplate("Context:\n{context_str}\nQ: {query_str}\nA:")]
    context = "\n\n".join(shown(retriever.retrieve(QUESTION)))
    raw = llm.chat(llm._get_messages(prompt, context_str=context, query_str=QUESTION)).raw
    assert raw["citations"]
    by_id = {item.node_id: item.node for item in nodes()}
    for citation in raw["citations"]:
        assert citation["title"] == by_id[citation["passage_id"]].metadata["file_name"]


def test_a_context_of_other_texts_is_not_taken_for_known_nodes(
    retriever: FinchRetriever, llm: FinchLLM, requests: list[ParsedPrompt]
) -> None:
    known = shown(retriever.retrieve(QUESTION))
    engine = PromptTemplate("Context:\n{context_str}\nQ: {query_str}\nA:")
    for context, passages in (
        ("\n\n".join(known), 4),
        ("\n\n".join([*known, "A text that nobody knows."]), None),
        ("\n".join(known), None),
        (f"{known[0]} and more", None),
        (f"{known[0]}: {known[1]}", None),
        (known[0][:-3], None),
    ):
        llm.predict(engine, context_str=context, query_str=QUESTION)
        ids = [passage.id for passage in requests[-1].passages]
        assert (ids.count(None) == 0) == (passages is not None)
        assert passages is None or len(ids) == passages


def test_of_nodes_that_begin_alike_the_longest_is_found(llm: FinchLLM, requests: list[ParsedPrompt]) -> None:
    alike = {"a": "One line.", "b": "One line.\n\nAnother.", "c": "Another.", "d": "One line.\nMore."}
    FinchRetriever.from_nodes([TextNode(text=text, id_=own) for own, text in alike.items()], llm=llm).retrieve(QUESTION)
    prompt = PromptTemplate("Context:\n{context_str}\nQ: {query_str}\nA:")
    for order in ("abcd", "dcba", "aabd"):
        llm.predict(prompt, context_str="\n\n".join(alike[own] for own in order), query_str=QUESTION)
        expected = order.replace("ac", "b")
        assert "".join(str(passage.id) for passage in requests[-1].passages) == expected


def test_an_llm_knows_the_nodes_of_its_store_whoever_found_them(
    retriever: FinchRetriever, finch: Finch, requests: list[ParsedPrompt]
) -> None:
    other = finch_llm(engine=finch, store=True)
    other.chat([PassagesMessage(QUESTION, retriever.retrieve(QUESTION))])
    RetrieverQueryEngine.from_args(retriever, llm=other).query(QUESTION)
    assert requests[-1].parse_mode == "apart"


def test_another_llms_prompts_do_not_know_the_nodes(
    retriever: FinchRetriever, finch: Finch, requests: list[ParsedPrompt]
) -> None:
    engine = RetrieverQueryEngine.from_args(retriever, llm=finch_llm(engine=finch))
    engine.query(QUESTION)
    assert requests[-1].parse_mode == "llama-index/text-qa"


def test_a_synthesizer_leaves_the_nodes_in_the_store_as_they_are(retriever: FinchRetriever, llm: FinchLLM) -> None:
    before = retriever.retrieve(QUESTION)
    FinchSynthesizer(llm).synthesize(QUESTION, before)
    FinchRerank(llm).postprocess_nodes(before, query_str=QUESTION)
    assert retriever.retrieve(QUESTION) == before
    assert before[0].node.metadata["file_name"].startswith("notes-")


def test_a_retriever_finds_what_a_synthesizer_read(llm: FinchLLM) -> None:
    FinchSynthesizer(llm).synthesize(QUESTION, nodes())
    found = FinchRetriever(llm=llm, similarity_top_k=20).retrieve(QUESTION)
    assert {item.node_id: item.node for item in found} == {item.node_id: item.node for item in nodes()}


def test_a_changed_node_is_read_again_and_takes_the_others_place(retriever: FinchRetriever, llm: FinchLLM) -> None:
    size = len(retriever.store)
    changed = TextNode(text="Hugo Kessler sold the steamer Heron.", id_="n3", metadata={"file_name": "new.md"})
    with counted_passes(llm.engine) as passes:
        retriever.add_nodes([*base_nodes()[:3], changed])
        assert len(passes) == 1
        retriever.add_nodes([changed])
        assert len(passes) == 1
    assert len(retriever.store) == size
    retriever.similarity_top_k = 20
    (found,) = [item.node for item in retriever.retrieve(QUESTION) if item.node_id == "n3"]
    assert found == changed


def test_deleted_nodes_are_not_found(retriever: FinchRetriever) -> None:
    retriever.similarity_top_k = 20
    retriever.delete_nodes(["n1", "n2"])
    assert {item.node_id for item in retriever.retrieve(QUESTION)} == {f"n{n}" for n in range(12)} - {"n1", "n2"}
    with pytest.raises(InputError, match="1 of 2 ids are not in the store: 'n1'"):
        retriever.delete_nodes(["n1", "n3"])
    assert len(retriever.store) == 10
    asyncio.run(retriever.adelete_nodes(["n3"]))
    assert "n3" not in retriever.store


def test_nodes_without_text_are_skipped(llm: FinchLLM) -> None:
    retriever = FinchRetriever.from_nodes([TextNode(text=" ", id_="blank", metadata={"a": 1}), *base_nodes(2)], llm=llm)
    assert {item.node_id for item in retriever.retrieve(QUESTION)} == {"n0", "n1"}


def test_an_index_or_a_docstore_gives_its_nodes(llm: FinchLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    index = index_over(nodes())
    docstore = index.docstore
    docstore.add_documents(base_nodes())
    for given in ({"docstore": docstore}, {"nodes": iter(base_nodes())}, {"index": index}):
        store_of(llm).clear()
        monkeypatch.setattr(index, "_docstore", docstore)
        retriever = FinchRetriever.from_defaults(**given, llm=llm, similarity_top_k=20)
        assert len(retriever.retrieve(QUESTION)) == 12
    with pytest.raises(SettingsError, match=r"2 of index, nodes and docstore are given \(index, nodes\): pass one"):
        FinchRetriever.from_defaults(index=index, nodes=[], llm=llm)
    with pytest.raises(SettingsError, match=r"0 of index, nodes and docstore are given \(none\)"):
        FinchRetriever.from_defaults(llm=llm)
    with pytest.raises(InputError, match="docstore of the docstore has 0 nodes"):
        FinchRetriever.from_defaults(docstore=type(docstore)(), llm=llm)


def test_a_folder_is_found_again(finch: Finch, tmp_path: Path) -> None:
    llm = finch_llm(engine=finch)
    made = FinchRetriever.from_nodes(base_nodes(), store=tmp_path / "s", llm=llm)
    expected = made.retrieve(QUESTION)
    made.store.close()
    other = FinchRetriever(store=str(tmp_path / "s"), llm=finch_llm(engine=new_engine()))
    assert other.retrieve(QUESTION) == expected
    other.store.close()


def test_nothing_is_loaded_or_opened_before_the_first_use(tmp_path: Path) -> None:
    retriever = FinchRetriever(store=tmp_path / "s", llm=FinchLLM("/no/such/folder"))
    assert not (tmp_path / "s").exists()
    with pytest.raises(Exception, match="/no/such/folder"):
        retriever.retrieve(QUESTION)


def test_an_empty_store_finds_nothing(llm: FinchLLM) -> None:
    assert FinchRetriever(llm=llm).retrieve(QUESTION) == []


# Other retrievers


def test_fused_rankings_are_the_stores(llm: FinchLLM) -> None:
    retriever = FinchRetriever.from_nodes(base_nodes(), llm=llm, similarity_top_k=12)
    alone = [item.node_id for item in retriever.retrieve(QUESTION)]
    last_first = [NodeWithScore(node=TextNode(text=own, id_=own)) for own in [*alone[::-1], "unknown"]]
    others = [FixedRetriever(last_first), FixedRetriever(last_first[:2])]
    fused = FinchRetriever(llm=llm, similarity_top_k=12, fuse=others, fuse_k=3)
    rankings = [[item.node_id for item in last_first], [item.node_id for item in last_first[:2]]]
    expected = [each.passage.id for each in retriever.store.retrieve(QUESTION, 12, rankings, 3)]
    found = fused.retrieve(QUESTION)
    assert [item.node_id for item in found] == expected != alone
    assert found[0].node_id == alone[-1]
    assert {item.node_id: item.score for item in found} == {
        item.node_id: item.score for item in retriever.retrieve(QUESTION)
    }
    assert asyncio.run(fused.aretrieve(QUESTION)) == found


def test_it_is_one_of_several_retrievers(retriever: FinchRetriever, llm: FinchLLM) -> None:
    alone = [item.node_id for item in retriever.retrieve(QUESTION)]
    fusion = QueryFusionRetriever(
        [retriever, FixedRetriever(nodes()[:2])],
        llm=MockLLM(),
        num_queries=1,
        mode=FUSION_MODES.RECIPROCAL_RANK,
        similarity_top_k=12,
    )
    found = {item.node_id for item in fusion.retrieve(QUESTION)}
    assert found == {*alone, "n0", "n1"}


def test_a_router_chooses_it(retriever: FinchRetriever, llm: FinchLLM, says: Says) -> None:
    says('[{"choice": 2, "reason": "it fits"}]')
    tools = [
        RetrieverTool.from_defaults(FixedRetriever([]), description="nothing"),
        RetrieverTool.from_defaults(retriever, description="notes of the town"),
    ]
    chooser = finch_llm(max_new_tokens=80)
    router = RouterRetriever(LLMSingleSelector.from_defaults(llm=chooser), tools, llm=chooser)
    assert router.retrieve(QUESTION) == retriever.retrieve(QUESTION)


def test_it_stands_behind_chat_engines(retriever: FinchRetriever, llm: FinchLLM) -> None:
    made = ContextChatEngine.from_defaults(retriever=retriever, llm=llm)
    with listening() as events:
        made.chat(QUESTION)
        asyncio.run(made.achat(OTHER_QUESTION))
    for report in reports(events):
        assert read(report) == (0, report["context_tokens"])
        assert report["passages"] == 4


def test_index_nodes_lead_to_their_objects(llm: FinchLLM) -> None:
    target = TextNode(text="What it points to.", id_="target")
    pointer = IndexNode(text="A summary of it.", id_="pointer", index_id="i", obj=target)
    retriever = FinchRetriever(llm=llm, objects=[pointer])
    retriever.add_nodes([pointer])
    assert [item.node for item in retriever.retrieve(QUESTION)] == [target]
    assert pointer.obj is target
    other = IndexNode(text="Leads to a retriever.", id_="r", index_id="r", obj=FixedRetriever(nodes()[:2]))
    found = FinchRetriever.from_nodes([other], llm=llm, objects=[other]).retrieve(QUESTION)
    assert {item.node_id for item in found} >= {"n0", "n1"}


def test_callbacks_and_instrumentation_see_the_retrieval(llm: FinchLLM) -> None:
    handler = LlamaDebugHandler(print_trace_on_end=False)
    retriever = FinchRetriever(llm=llm, callback_manager=CallbackManager([handler]))
    retriever.add_nodes(base_nodes(3))
    with listening() as events:
        found = retriever.retrieve(QUESTION)
    ((start, end),) = handler.get_event_pairs(CBEventType.RETRIEVE)
    assert (start.payload or {})[EventPayload.QUERY_STR] == QUESTION
    assert end.payload == {EventPayload.NODES: found}
    assert [type(event).__name__ for event in events] == ["RetrievalStartEvent", "RetrievalEndEvent"]


@pytest.mark.parametrize("work", ["aretrieve", "aadd_nodes"])
def test_an_event_loop_goes_on_meanwhile(retriever: FinchRetriever, llm: FinchLLM, work: str) -> None:
    threads: list[int] = []
    ticks: list[float] = []

    def slow() -> None:
        threads.append(threading.get_ident())
        time.sleep(0.3)

    async def tick() -> None:
        while True:
            ticks.append(time.monotonic())
            await asyncio.sleep(0.01)

    async def run() -> None:
        ticking = asyncio.create_task(tick())
        given = QUESTION if work == "aretrieve" else [TextNode(text="A new text.", id_="new")]
        await getattr(retriever, work)(given)
        ticking.cancel()

    with on_each_pass(llm.engine, slow):
        asyncio.run(run())
    assert threads
    assert threading.get_ident() not in threads
    assert len(ticks) >= 5


# What cannot work


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"store": 3}, "store is int: pass a folder, True"),
        ({"store": " "}, "store is an empty text"),
        ({"shortlist_tokens": -1}, "shortlist_tokens is -1"),
    ],
)
def test_a_store_that_is_none_is_one_line(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(SettingsError, match=reason) as caught:
        finch_llm(**settings)
    assert "\n" not in str(caught.value)
    if "store" in settings:
        for component in (FinchRerank, FinchSynthesizer, FinchRetriever):
            with pytest.raises(SettingsError, match=reason):
                component(llm=finch_llm(), **settings)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"similarity_top_k": 0}, "similarity_top_k is 0: pass a whole number, the least is 1"),
        ({"similarity_top_k": True}, "similarity_top_k is True"),
        ({"fuse_k": 1.5}, r"fuse_k is 1\.5"),
        ({"fuse": FixedRetriever([])}, "fuse is FixedRetriever: pass a list"),
        ({"fuse": [["n1"]]}, "fuse holds list: pass retrievers"),
        ({"store": False}, "there is no store: pass store="),
        ({"llm": MockLLM()}, "not MockLLM: pass store= or llm="),
    ],
)
def test_a_retriever_that_cannot_work_is_one_line(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(SettingsError, match=reason) as caught:
        FinchRetriever(**{"store": True, "llm": finch_llm(), **settings})
    assert "\n" not in str(caught.value)


def test_without_a_store_there_is_no_retriever(monkeypatch: pytest.MonkeyPatch, llm: FinchLLM) -> None:
    with pytest.raises(SettingsError, match="there is no store"):
        FinchRetriever(llm=finch_llm())
    monkeypatch.setattr(Settings, "_llm", MockLLM())
    with pytest.raises(SettingsError, match="not MockLLM"):
        FinchRetriever(store=True)
    monkeypatch.setattr(Settings, "_llm", llm)
    assert FinchRetriever().store is store_of(llm)


def test_bad_nodes_and_questions_are_one_line(retriever: FinchRetriever) -> None:
    given: Any
    for given, reason in (
        ("text", "nodes is str: pass a list"),
        (TextNode(text="x"), "nodes is TextNode: pass a list"),
        ([TextNode(text="x"), "y"], r"node 1 is str: pass nodes"),
        ([TextNode(text="word " * 9000, id_="long")], r"passage long has \d+ tokens, .* room for \d+: split it"),
        ([TextNode(text="x", id_="a"), TextNode(text="y", id_="a")], "passages 0 and 1 have the id 'a'"),
    ):
        with pytest.raises(InputError, match=reason) as caught:
            retriever.add_nodes(given)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="node_ids is str: pass a list of ids"):
        retriever.delete_nodes("n1")
    with pytest.raises(InputError, match="the query is empty"):
        retriever.retrieve(" ")
    assert len(retriever.store) == 12


def test_a_folder_with_another_writer_is_one_line(finch: Finch, tmp_path: Path) -> None:
    with (
        finch.open_store(tmp_path / "s"),
        pytest.raises(StoreError, match=r"writes to the store in .* read_only") as caught,
    ):
        FinchRetriever(store=tmp_path / "s", llm=finch_llm(engine=new_engine())).retrieve(QUESTION)
    assert "\n" not in str(caught.value)


@pytest.fixture(autouse=True)
def closed(finch: Finch) -> Iterator[None]:
    """Lets go of the engine's store in memory."""
    yield
    if (opened := finch.runtime.stores.at(True)) is not None:
        opened.close()
