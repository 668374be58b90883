"""LangChain's own chains with ChatFinch and FinchLLM in another model's place: what the engine reads, nothing lost."""

from __future__ import annotations

import re
from typing import Any

import langchain
import pytest
from langchain.agents.middleware import SummarizationMiddleware
from langchain_classic.chains import ConversationalRetrievalChain, RetrievalQAWithSourcesChain
from langchain_classic.chains.conversational_retrieval.prompts import CONDENSE_QUESTION_PROMPT
from langchain_classic.chains.qa_with_sources.stuff_prompt import EXAMPLE_PROMPT
from langchain_classic.chains.qa_with_sources.stuff_prompt import PROMPT as SOURCES_PROMPT
from langchain_classic.chains.question_answering import load_qa_chain, map_rerank_prompt, refine_prompts
from langchain_classic.chains.summarize import load_summarize_chain, map_reduce_prompt
from langchain_classic.chains.summarize.refine_prompts import REFINE_PROMPT
from langchain_core.documents import Document
from langchain_core.messages import AIMessage, AnyMessage, HumanMessage
from langchain_core.prompts import format_document
from langchain_finch import ChatFinch, FinchLLM
from lc_support import QUESTION, Fixed, answer_with, texts_as_documents
from packaging.version import Version

import finch_rag.engine
from finch_rag import Finch
from finch_rag.prompts.parsing import WHOLE
from finch_rag.request import Request
from finch_rag.resolving import resolve_parsed
from tests.small import chat_tokenizer, small_model

pytestmark = pytest.mark.filterwarnings("ignore::langchain_core._api.LangChainDeprecationWarning")

BOTH = pytest.mark.parametrize("kind", [ChatFinch, FinchLLM])
ANSWER = "Clara Novak"
ANSWERED = "An earlier answer, from other passages, is: " + ANSWER


class Reading:
    """What the engine read in one call."""

    def __init__(self, request: Request) -> None:
        def text(token_ids: list[int]) -> str:
            return str(chat_tokenizer().decode(token_ids))

        prompt = request.prompt
        self.mode = request.parse_mode
        self.before = text(prompt.prefix)
        self.passages = [text(passage).strip() for passage in prompt.passages]
        self.question = text(prompt.question)
        self.all = f"{self.before}{''.join(map(text, prompt.passages))}{self.question}"


@pytest.fixture(scope="module")
def roomy() -> Finch:
    """An engine whose window holds LangChain's longest prompt, written letter by letter."""
    return Finch(small_model(max_position_embeddings=16384), chat_tokenizer(), name="roomy", heads="all")


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[Reading]:
    """What the engine reads, call by call; it answers what `ANSWER` says."""
    answer_with(monkeypatch, ANSWER)
    readings: list[Reading] = []

    def recorded(*args: Any) -> Request:
        request = resolve_parsed(*args)
        readings.append(Reading(request))
        return request

    monkeypatch.setattr(finch_rag.engine, "resolve_parsed", recorded)
    return readings


@pytest.fixture(scope="module")
def found() -> list[Document]:
    return texts_as_documents(3)


def texts_of(found: list[Document]) -> list[str]:
    return [document.page_content for document in found]


def whole(reading: Reading, *prompts: str) -> None:
    """The model reads these messages and nothing else of its own."""
    said = re.findall(r"<\|im_start\|>(?:system|user|assistant)\n(.*?)(?:<\|im_end\|>|\Z)", reading.all, re.DOTALL)
    assert (reading.mode, reading.passages) == (WHOLE, [])
    assert [text.strip() for text in said] == [text.strip() for text in prompts]


@BOTH
def test_summaries_are_read_whole(kind: Any, roomy: Finch, read: list[Reading], found: list[Document]) -> None:
    llm, texts = kind(engine=roomy), texts_of(found)
    first = map_reduce_prompt.PROMPT
    load_summarize_chain(llm, chain_type="stuff").invoke({"input_documents": found})
    whole(read.pop(), first.format(text="\n\n".join(texts)))
    load_summarize_chain(llm, chain_type="map_reduce").invoke({"input_documents": found})
    for reading, text in zip(read, [*texts, "\n\n".join([ANSWER] * 3)], strict=True):
        whole(reading, first.format(text=text))
    read.clear()
    load_summarize_chain(llm, chain_type="refine").invoke({"input_documents": found})
    whole(read[0], first.format(text=texts[0]))
    for reading, text in zip(read[1:], texts[1:], strict=True):
        whole(reading, REFINE_PROMPT.format(existing_answer=ANSWER, text=text))


@BOTH
def test_a_summary_of_more_than_the_window_keeps_its_words(kind: Any, folder: str, read: list[Reading]) -> None:
    found = texts_as_documents(150)
    llm = kind(model=folder, heads=[(0, 1), (1, 2)], budget=256, max_tokens=8)
    load_summarize_chain(llm, chain_type="stuff").invoke({"input_documents": found})
    [reading] = read
    assert reading.mode == "langchain/summary"
    assert "Write a concise summary of the following:" in reading.before + reading.question
    assert reading.question.strip().endswith("CONCISE SUMMARY:")
    assert all(document.page_content in "\n\n".join(reading.passages) for document in found)


@BOTH
def test_stuffed_documents_are_taken_apart(kind: Any, roomy: Finch, read: list[Reading], found: list[Document]) -> None:
    load_qa_chain(kind(engine=roomy), chain_type="stuff").invoke({"input_documents": found, "question": QUESTION})
    [reading] = read
    assert reading.mode == ("langchain/stuff-chat" if kind is ChatFinch else "langchain/stuff")
    assert reading.passages == texts_of(found)
    assert reading.question == f"Question: {QUESTION}"


@BOTH
def test_a_long_list_of_stuffed_documents_is_compressed(kind: Any, folder: str, read: list[Reading]) -> None:
    found = texts_as_documents(150)
    llm = kind(model=folder, heads=[(0, 1), (1, 2)], budget=256, max_tokens=8)
    load_qa_chain(llm, chain_type="stuff").invoke({"input_documents": found, "question": QUESTION})
    [reading] = read
    # A first paragraph as short as an instruction is read as one, where nothing but a blank line parts it from them.
    short = kind is FinchLLM
    assert reading.passages == texts_of(found)[short:]
    assert (texts_of(found)[0] in reading.before) == short
    assert reading.question == f"Question: {QUESTION}"


@BOTH
def test_a_refined_answer_is_read_with_its_passage(
    kind: Any, roomy: Finch, read: list[Reading], found: list[Document]
) -> None:
    load_qa_chain(kind(engine=roomy), chain_type="refine").invoke({"input_documents": found, "question": QUESTION})
    first, *others = read
    assert first.mode == ("langchain/refine-start-chat" if kind is ChatFinch else "langchain/refine-start")
    assert (first.passages, first.question) == ([found[0].page_content], f"Question: {QUESTION}")
    for reading, text in zip(others, texts_of(found)[1:], strict=True):
        if kind is ChatFinch:  # three messages, the last of which is no known prompt
            refine = refine_prompts.CHAT_REFINE_PROMPT
            messages = refine.format_messages(question=QUESTION, existing_answer=ANSWER, context_str=text)
            whole(reading, *(message.text for message in messages))
        else:
            assert reading.mode == "langchain/refine"
            assert ANSWERED in reading.before
            assert (reading.passages, reading.question) == ([text], f"Question: {QUESTION}")


@BOTH
def test_map_reduce_of_a_question_is_read_whole(
    kind: Any, roomy: Finch, read: list[Reading], found: list[Document]
) -> None:
    chain = load_qa_chain(kind(engine=roomy), chain_type="map_reduce", token_max=8192)
    chain.invoke({"input_documents": found, "question": QUESTION})
    *mapped, reduced = read
    for reading, text in zip(mapped, texts_of(found), strict=True):
        assert (reading.mode, reading.passages) == (WHOLE, [])
        assert "Return any relevant text verbatim." in reading.all
        assert text in reading.all
        assert QUESTION in reading.question
    assert reduced.mode == WHOLE
    assert "\n\n".join([ANSWER] * 3) in reduced.all
    assert QUESTION in reduced.all


@BOTH
def test_the_examples_of_map_rerank_are_no_passages(
    kind: Any, roomy: Finch, read: list[Reading], found: list[Document], monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_with(monkeypatch, f"{ANSWER}\nScore: 90")
    load_qa_chain(kind(engine=roomy), chain_type="map_rerank").invoke({"input_documents": found, "question": QUESTION})
    for reading, text in zip(read, texts_of(found), strict=True):
        whole(reading, map_rerank_prompt.PROMPT.format(context=text, question=QUESTION))


@BOTH
def test_answers_with_sources_see_the_sources(
    kind: Any, roomy: Finch, read: list[Reading], found: list[Document]
) -> None:
    chain = RetrievalQAWithSourcesChain.from_chain_type(
        kind(engine=roomy), chain_type="stuff", retriever=Fixed(found=found)
    )
    assert chain.invoke({"question": QUESTION})["answer"].strip() == ANSWER
    [reading] = read
    summaries = "\n\n".join(format_document(document, EXAMPLE_PROMPT) for document in found)
    whole(reading, SOURCES_PROMPT.format(summaries=summaries, question=QUESTION))


@BOTH
def test_a_conversation_condenses_its_question_first(
    kind: Any, roomy: Finch, read: list[Reading], found: list[Document]
) -> None:
    chain = ConversationalRetrievalChain.from_llm(kind(engine=roomy), retriever=Fixed(found=found))
    chain.invoke({"question": QUESTION, "chat_history": [("where?", "there")]})
    condensed, answered = read
    history = "\nHuman: where?\nAssistant: there"
    whole(condensed, CONDENSE_QUESTION_PROMPT.format(chat_history=history, question=QUESTION))
    assert answered.mode in ("langchain/stuff", "langchain/stuff-chat")
    assert (answered.passages, answered.question) == (texts_of(found), f"Question: {ANSWER}")


def test_a_summary_by_middleware_is_read_whole(roomy: Finch, read: list[Reading]) -> None:
    if Version(langchain.__version__) < Version("1.3.10"):
        pytest.skip(f"langchain {langchain.__version__} tells a conversation otherwise than 1.3.10 and later")
    middleware: Any = SummarizationMiddleware(
        ChatFinch(engine=roomy), trigger=("messages", 4), keep=("messages", 1), trim_tokens_to_summarize=None
    )
    messages: list[AnyMessage] = [HumanMessage("alpha"), AIMessage("beta"), HumanMessage("gamma"), AIMessage("delta")]
    state = middleware.before_model({"messages": [*messages, HumanMessage("epsilon")]}, None)
    [reading] = read
    told = "".join(f'<message type="{message.type}">{message.text}</message>\n' for message in messages)
    assert reading.mode == WHOLE
    whole(reading, middleware.summary_prompt.format(messages=told.strip()))
    assert ANSWER in state["messages"][1].text
