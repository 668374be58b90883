from __future__ import annotations

import asyncio
from typing import Any

import pytest
from li_support import calls, listening, reports
from llama_index.core import StorageContext, VectorStoreIndex
from llama_index.core.chat_engine import ContextChatEngine
from llama_index.core.llms import MockLLM
from llama_index.core.schema import TextNode
from llama_index.llms.finch import FinchLLM, FinchRerank, FinchSynthesizer

from finch_rag import Finch
from finch_rag.corpus import Question, load_questions, read_corpus
from finch_rag.corpus.example import example_corpus
from finch_rag.corpus.metrics import contains_answer
from finch_rag.corpus.retrieval import embedding_model_folder

pytestmark = pytest.mark.embedded

TOP_K = 4
CORPUS = read_corpus(example_corpus())
QUESTIONS = {question.id: question for question in load_questions(example_corpus() / "questions.jsonl")}
ASKED, OTHER = QUESTIONS["q07"], QUESTIONS["q26"]  # the retriever puts the first one's passage third


@pytest.fixture(scope="module")
def index() -> VectorStoreIndex:
    """The example corpus in FAISS, embedded by MiniLM."""
    import faiss
    from llama_index.embeddings.huggingface import HuggingFaceEmbedding
    from llama_index.vector_stores.faiss import FaissVectorStore

    model = HuggingFaceEmbedding(model_name=str(embedding_model_folder()), device="cpu")
    store = FaissVectorStore(faiss.IndexFlatIP(len(model.get_text_embedding("x"))))
    nodes = [
        TextNode(text=passage.text, id_=passage.id, metadata={"title": passage.title}) for passage in CORPUS.passages
    ]
    return VectorStoreIndex(nodes, embed_model=model, storage_context=StorageContext.from_defaults(vector_store=store))


@pytest.fixture
def llm(embedded: Finch) -> FinchLLM:
    return FinchLLM(engine=embedded, max_new_tokens=16)


def right(answer: Any, question: Question) -> bool:
    return contains_answer(str(answer), question.answers)


def test_a_query_over_an_index_is_answered_right_in_one_call(index: VectorStoreIndex, llm: FinchLLM) -> None:
    with listening() as events:
        response = index.as_query_engine(llm=llm, similarity_top_k=TOP_K).query(ASKED.question)
    assert right(response, ASKED)
    assert calls(events) == 1
    (report,) = reports(events)
    assert (report["parse_mode"], report["passages"]) == ("llama-index/text-qa", TOP_K)
    assert report["kept_tokens"] < report["context_tokens"]


def test_two_queries_stream_right_answers_at_once(index: VectorStoreIndex, llm: FinchLLM) -> None:
    made = index.as_query_engine(llm=llm, similarity_top_k=TOP_K, streaming=True)

    async def streamed(question: str) -> list[str]:
        response: Any = await made.aquery(question)
        return [delta async for delta in response.async_response_gen() if delta]

    async def run() -> list[list[str]]:
        return list(await asyncio.gather(streamed(ASKED.question), streamed(OTHER.question)))

    for deltas, question in zip(asyncio.run(run()), (ASKED, OTHER), strict=True):
        assert len(deltas) > 1
        assert right("".join(deltas), question)


def test_a_chat_engine_answers_right_and_remembers(index: VectorStoreIndex, llm: FinchLLM) -> None:
    made = ContextChatEngine.from_defaults(index.as_retriever(similarity_top_k=TOP_K), llm=llm)
    with listening() as events:
        assert right(made.chat(ASKED.question), ASKED)
        assert right(made.chat(OTHER.question), OTHER)
    first, second = reports(events)
    assert (first["parse_mode"], second["parse_mode"]) == 2 * ("llama-index/context-chat",)
    assert second["prefix_tokens"] > first["prefix_tokens"] + 20  # the first turn is read too
    assert (first["passages"], second["passages"]) == (TOP_K, TOP_K)


def test_the_synthesizer_cites_the_node_that_has_the_answer(index: VectorStoreIndex, llm: FinchLLM) -> None:
    made = index.as_query_engine(
        response_synthesizer=FinchSynthesizer(llm, streaming=True), llm=llm, similarity_top_k=TOP_K
    )
    response: Any = made.query(ASKED.question)
    assert right("".join(response.response_gen), ASKED)
    assert response.source_nodes[0].node_id != ASKED.gold_ids[0]
    assert response.metadata["finch"]["citations"][0]["passage_id"] == ASKED.gold_ids[0]


def test_the_reranker_puts_the_right_node_first(index: VectorStoreIndex, llm: FinchLLM) -> None:
    made = index.as_query_engine(llm=MockLLM(), similarity_top_k=TOP_K, node_postprocessors=[FinchRerank(llm, top_n=2)])
    response = made.query(ASKED.question)
    assert response.source_nodes[0].node_id == ASKED.gold_ids[0]
    assert len(response.source_nodes) == 2
