"""Clients as they are, against a server on loopback: what reaches their users."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cohere
import openai
import pytest
from langchain_cohere import CohereRerank
from langchain_core.documents import Document
from langchain_openai import ChatOpenAI, OpenAI
from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel, SecretStr

from finch_rag import Answer, Finch

from ..small import texts
from .support import ASKED, DOCUMENTS, PASSAGES, QUESTION, HeldAnswers, Live

KEY = "secret"
EXTRA: dict[str, Any] = {"documents": DOCUMENTS}


@pytest.fixture(scope="module")
def live(engine: Finch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    stores: Path = tmp_path_factory.mktemp("stores")
    with Live(engine, api_keys=(KEY,), stores=stores) as live:
        yield live


@pytest.fixture
def base(live: Live) -> str:
    return f"{live.url}/v1"


@pytest.fixture
def client(base: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=base, api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def expected(engine: Finch) -> Answer:
    return engine.chat(QUESTION, PASSAGES)


@pytest.fixture(scope="module")
def cited(expected: Answer) -> list[str | None]:
    """Ids of the passages that the statements rest on, in their order."""
    return [PASSAGES[source.index].id for statement in expected.statements for source in statement.sources]


def test_openai_lists_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["small"]
    assert client.models.retrieve("small").owned_by == "finch-rag"


def test_openai_chats_with_documents_and_reads_citations(
    client: openai.OpenAI, expected: Answer, cited: list[str | None]
) -> None:
    done = client.chat.completions.create(
        model="small", messages=[{"role": "user", "content": QUESTION}], extra_body=EXTRA
    )
    message: Any = done.choices[0].message
    assert message.content == expected.text
    assert message.annotations[0].type == "url_citation"
    places = [(a.url_citation.start_index, a.url_citation.end_index) for a in message.annotations]
    assert places == [(s.start, s.end) for s in expected.statements for _ in s.sources]
    assert [a.document["id"] for a in message.annotations] == cited
    assert [own for c in message.citations for own in c["document_ids"]] == cited
    usage: Any = done.usage
    assert usage.prompt_tokens_details.cached_tokens == 0
    assert usage.finch["kept_tokens"] == expected.report.kept_tokens


def test_openai_streams_and_reads_citations(client: openai.OpenAI, expected: Answer, cited: list[str | None]) -> None:
    stream = client.chat.completions.create(
        model="small",
        messages=[{"role": "user", "content": QUESTION}],
        stream=True,
        stream_options={"include_usage": True},
        extra_body=EXTRA,
    )
    chunks: list[Any] = list(stream)
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert "".join(delta.content or "" for delta in deltas) == expected.text
    assert [a["document"]["id"] for a in deltas[-1].annotations] == cited
    assert [own for c in deltas[-1].citations for own in c["document_ids"]] == cited
    assert chunks[-1].usage.completion_tokens == expected.report.new_tokens
    assert chunks[-1].usage.finch["kept_tokens"] == expected.report.kept_tokens


def test_openai_streams_by_its_helper(client: openai.OpenAI, expected: Answer) -> None:
    asked: Any = {"model": "small", "messages": ASKED, "extra_body": EXTRA, "stop": expected.text[3:5]}
    with client.chat.completions.stream(**asked) as stream:  # which refuses an answer that was cut off
        final: Any = stream.get_final_completion()
    assert final.choices[0].message.content == expected.text[:3].rstrip()


def test_openai_completes(client: openai.OpenAI, expected: Answer) -> None:
    done = client.completions.create(model="small", prompt=QUESTION, extra_body=EXTRA)
    assert done.choices[0].text == expected.text
    stream = client.completions.create(model="small", prompt=QUESTION, stream=True, extra_body=EXTRA)
    assert "".join(chunk.choices[0].text for chunk in stream) == expected.text


def test_openai_parses_what_a_schema_asks_for(client: openai.OpenAI) -> None:
    class Flag(BaseModel):
        yes: bool

    messages: Any = ASKED
    done = client.chat.completions.parse(
        model="small", messages=messages, response_format=Flag, max_completion_tokens=20, extra_body=EXTRA
    )
    assert isinstance(done.choices[0].message.parsed, Flag)


def test_openai_asks_a_store(client: openai.OpenAI, live: Live, engine: Finch) -> None:
    store = live.service.shelf
    store.create("asked", "bfloat16")
    store.store("asked").add(PASSAGES)
    messages: Any = ASKED
    done: Any = client.chat.completions.create(model="small", messages=messages, extra_body={"store": "asked"})
    assert done.usage.prompt_tokens_details.cached_tokens > 0
    assert done.choices[0].message.citations


def test_openai_raises_its_own_errors(client: openai.OpenAI, base: str, engine: Finch, answer: Answer) -> None:
    messages: Any = ASKED
    with pytest.raises(openai.NotFoundError, match="does not exist") as missing:
        client.chat.completions.create(model="gpt", messages=messages)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="one answer") as bad:
        client.chat.completions.create(model="small", messages=messages, n=2)
    assert bad.value.param == "n"
    with pytest.raises(openai.AuthenticationError, match="API key"):
        openai.OpenAI(base_url=base, api_key="wrong", max_retries=0).models.list()
    with Live(engine, HeldAnswers(answer, free_pieces=1), timeout=0.3) as live:
        hasty = openai.OpenAI(base_url=f"{live.url}/v1", api_key="any", max_retries=0)
        with pytest.raises(openai.APIError, match="was not there after"):
            list(hasty.chat.completions.create(model="small", messages=messages, stream=True))


def test_openai_answers_in_an_event_loop(base: str, expected: Answer) -> None:
    async def both() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=base, api_key=KEY) as client:
            messages: Any = ASKED
            calls = [
                client.chat.completions.create(model="small", messages=messages, extra_body=EXTRA) for _ in range(2)
            ]
            return [done.choices[0].message.content for done in await asyncio.gather(*calls)]

    assert asyncio.run(both()) == [expected.text] * 2


@pytest.fixture
def chat(base: str) -> ChatOpenAI:
    return ChatOpenAI(model="small", base_url=base, api_key=SecretStr(KEY), extra_body=EXTRA)


def test_langchain_chats_and_reads_citations(chat: ChatOpenAI, expected: Answer, cited: list[str | None]) -> None:
    message = chat.invoke(QUESTION)
    assert message.content == expected.text
    assert message.usage_metadata is not None
    assert message.usage_metadata["output_tokens"] == expected.report.new_tokens
    finch = message.response_metadata["token_usage"]["finch"]
    assert [own for citation in finch["citations"] for own in citation["document_ids"]] == cited
    assert finch["kept_tokens"] == expected.report.kept_tokens


def test_langchain_streams(chat: ChatOpenAI, expected: Answer) -> None:
    assert "".join(str(chunk.content) for chunk in chat.stream(QUESTION)) == expected.text


def test_langchain_brings_documents_of_a_call(base: str, expected: Answer) -> None:
    bare = ChatOpenAI(model="small", base_url=base, api_key=SecretStr(KEY))
    assert bare.invoke(QUESTION, extra_body=EXTRA).content == expected.text


def test_langchain_structures_output(chat: ChatOpenAI) -> None:
    class Flag(BaseModel):
        """Yes or no."""

        yes: bool

    structured = chat.with_structured_output(Flag, method="json_schema")
    assert isinstance(structured.invoke(QUESTION, max_tokens=20), Flag)


def test_langchain_completes(base: str, expected: Answer) -> None:
    llm = OpenAI(model="small", base_url=base, api_key=SecretStr(KEY), extra_body=EXTRA, temperature=0)
    assert llm.invoke(QUESTION, max_tokens=8) == expected.text


def test_openai_responds(client: openai.OpenAI, expected: Answer, cited: list[str | None]) -> None:
    done: Any = client.responses.create(model="small", input=QUESTION, extra_body=EXTRA)
    assert done.output_text == expected.text
    (item,) = done.output
    annotations = item.content[0].annotations
    assert {annotation.type for annotation in annotations} == {"url_citation"}
    assert [annotation.document["id"] for annotation in annotations] == cited
    assert done.usage.output_tokens == expected.report.new_tokens
    assert done.usage.finch["kept_tokens"] == expected.report.kept_tokens
    assert (done.status, done.incomplete_details.reason) == ("incomplete", "max_output_tokens")


def test_openai_streams_a_response(client: openai.OpenAI, expected: Answer, cited: list[str | None]) -> None:
    events: list[Any] = list(client.responses.create(model="small", input=QUESTION, stream=True, extra_body=EXTRA))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == expected.text
    added = [e.annotation for e in events if e.type == "response.output_text.annotation.added"]
    assert [annotation["document"]["id"] for annotation in added] == cited
    assert events[-1].type == "response.incomplete"
    assert events[-1].response.output_text == expected.text
    stopped = {**EXTRA, "stop": expected.text[3:5]}
    with client.responses.stream(model="small", input=QUESTION, extra_body=stopped) as stream:
        final = stream.get_final_response()
    assert (final.status, final.output_text) == ("completed", expected.text[:3].rstrip())


def test_a_response_that_fails_on_the_way_is_an_error(engine: Finch, answer: Answer) -> None:
    with Live(engine, HeldAnswers(answer, free_pieces=1), timeout=0.3) as live:
        hasty = openai.OpenAI(base_url=f"{live.url}/v1", api_key="any", max_retries=0)
        with pytest.raises(openai.APIError, match="was not there after"):
            list(hasty.responses.create(model="small", input=QUESTION, stream=True))


def test_langchain_reads_citations_of_responses(base: str, expected: Answer, cited: list[str | None]) -> None:
    chat = ChatOpenAI(
        model="small",
        base_url=base,
        api_key=SecretStr(KEY),
        extra_body=EXTRA,
        use_responses_api=True,
        output_version="v1",
    )

    def ids(message: Any) -> list[str]:
        (block,) = [block for block in message.content_blocks if block["type"] == "text"]
        assert block["text"] == expected.text
        return [_document_of(annotation)["id"] for annotation in block["annotations"]]

    assert ids(chat.invoke(QUESTION)) == cited
    chunks = list(chat.stream(QUESTION))
    assert len(chunks) > 3
    whole: Any = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    assert ids(whole) == cited


def _document_of(annotation: dict[str, Any]) -> dict[str, Any]:
    """Where LangChain puts what it does not know."""
    found: dict[str, Any] = annotation["extras"]["document"]
    return found


@pytest.fixture
def like(base: str) -> OpenAILike:
    extra = {"extra_body": EXTRA}
    return OpenAILike(
        model="small", api_base=base, api_key=KEY, is_chat_model=True, temperature=0, additional_kwargs=extra
    )


def test_llama_index_chats_and_reads_citations(like: OpenAILike, expected: Answer, cited: list[str | None]) -> None:
    response = like.chat([ChatMessage(role="user", content=QUESTION)])
    assert response.message.content == expected.text
    message: Any = response.raw.choices[0].message  # type: ignore[union-attr]
    assert [a.document["id"] for a in message.annotations] == cited


def test_llama_index_streams_and_reads_citations(like: OpenAILike, expected: Answer, cited: list[str | None]) -> None:
    responses = list(like.stream_chat([ChatMessage(role="user", content=QUESTION)]))
    assert responses[-1].message.content == expected.text
    delta: Any = responses[-1].raw.choices[0].delta  # type: ignore[union-attr]
    assert [a["document"]["id"] for a in delta.annotations] == cited


def test_llama_index_completes(base: str, expected: Answer) -> None:
    like = OpenAILike(
        model="small",
        api_base=base,
        api_key=KEY,
        is_chat_model=False,
        temperature=0,
        additional_kwargs={"extra_body": EXTRA},
    )
    assert like.complete(QUESTION).text == expected.text


def test_cohere_ranks(live: Live, engine: Finch) -> None:
    documents = texts(6)
    expected = [(c.index, c.share) for c in engine.rank(QUESTION, documents)]
    for client in (cohere.ClientV2(KEY, base_url=live.url), cohere.Client(KEY, base_url=live.url)):
        ranked = client.rerank(model="small", query=QUESTION, documents=documents, top_n=4)
        assert [(r.index, r.relevance_score) for r in ranked.results] == expected[:4]


def test_langchain_ranks_by_cohere(live: Live, engine: Finch) -> None:
    documents = texts(6)
    ranker = CohereRerank(model="small", cohere_api_key=SecretStr(KEY), base_url=live.url, top_n=2)
    ranked = ranker.compress_documents([Document(text) for text in documents], QUESTION)
    assert [d.page_content for d in ranked] == [documents[c.index] for c in engine.rank(QUESTION, documents)[:2]]


def test_every_answer_is_strict_json(live: Live) -> None:
    import httpx

    sent = {"messages": ASKED, **EXTRA, "finch": {"report": True}}
    headers = {"Authorization": f"Bearer {KEY}"}
    raw = httpx.post(f"{live.url}/v1/chat/completions", json=sent, headers=headers).text

    def refuse(constant: str) -> None:
        pytest.fail(constant)

    json.loads(raw, parse_constant=refuse)
