"""Chat and text completions: what is answered, from which documents, with which citations."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from fastapi.testclient import TestClient

from finch_rag import Answer, Finch, Passage
from finch_rag.serve.citations import Cited
from finch_rag.serve.conversation import ChatMessage, conversation_of
from finch_rag.serve.documents import Document, passages_of

from .support import (
    ASKED,
    CHAT,
    COMPLETIONS,
    DOCUMENTS,
    PASSAGES,
    QUESTION,
    HeldAnswers,
    client_of,
    error_in,
    events_of,
)

LLAMA_INDEX = (
    "Context information is below.\n---------------------\n{context}\n---------------------\nGiven the context "
    "information and not prior knowledge, answer the query.\nQuery: {query}\nAnswer: "
)


def asked(client: TestClient, **changes: Any) -> dict[str, Any]:
    response = client.post(CHAT, json={"model": "small", "messages": ASKED, "documents": DOCUMENTS, **changes})
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


def test_a_chat_is_answered_as_the_engine_does(client: TestClient, engine: Finch) -> None:
    body = asked(client)
    expected = engine.chat([{"role": "user", "content": QUESTION}], PASSAGES)
    assert expected.text
    (choice,) = body["choices"]
    assert (body["object"], body["model"], choice["index"]) == ("chat.completion", "small", 0)
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"] == expected.text
    assert choice["finish_reason"] == ("length" if expected.report.stop_reason == "length" else "stop")
    figures, usage = expected.report, body["usage"]
    assert usage["completion_tokens"] == figures.new_tokens
    assert usage["prompt_tokens"] == figures.prefix_tokens + figures.context_tokens + figures.question_tokens
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 0}
    assert usage["finch"]["kept_tokens"] == figures.kept_tokens
    assert usage["finch"]["context_tokens"] == figures.context_tokens
    assert "report" not in usage["finch"]


def test_the_report_comes_when_it_is_asked_for(client: TestClient) -> None:
    report = asked(client, finch={"report": True, "budget": 40})["usage"]["finch"]["report"]
    assert (report["budget"], report["passages"], report["parse_mode"]) == (40, 3, "apart")


def test_statements_are_cited_in_both_shapes(client: TestClient, engine: Finch) -> None:
    expected = engine.chat([{"role": "user", "content": QUESTION}], PASSAGES)
    message = asked(client)["choices"][0]["message"]
    stated = [statement for statement in expected.statements if statement.sources]
    assert stated
    assert [(c["start"], c["end"], c["text"]) for c in message["citations"]] == [
        (s.start, s.end, s.text) for s in stated
    ]
    for citation, statement in zip(message["citations"], stated, strict=True):
        assert message["content"][citation["start"] : citation["end"]] == statement.text
        ids = [PASSAGES[source.index].id for source in statement.sources]
        assert citation["document_ids"] == ids == [source["id"] for source in citation["sources"]]
        for shown, source in zip(citation["sources"], statement.sources, strict=True):
            assert shown["document"]["title"] == PASSAGES[source.index].title
            for quote in shown["quotes"]:
                assert PASSAGES[source.index].text[quote["start"] : quote["end"]] == quote["text"]
    pairs = [(s.start, s.end, PASSAGES[source.index].id) for s in stated for source in s.sources]
    cited = [a["url_citation"] for a in message["annotations"]]
    assert [(c["start_index"], c["end_index"]) for c in cited] == [pair[:2] for pair in pairs]
    assert [a["document"]["id"] for a in message["annotations"]] == [pair[2] for pair in pairs]


def test_an_annotation_has_the_documents_url_and_title(answer: Answer) -> None:
    by_id = {a["document"]["id"]: a["url_citation"] for a in Cited(answer, PASSAGES).annotations()}
    assert by_id
    expected = {
        "light": ("Lighthouse", "urn:document:light"),
        "harbour": ("harbour", "https://example.org/harbour"),
        "museum": ("museum", "urn:document:museum"),
    }
    assert {own: (cited["title"], cited["url"]) for own, cited in by_id.items()}.items() <= expected.items()


def test_quotes_can_be_left_out(client: TestClient) -> None:
    message = asked(client, finch={"quotes": False})["choices"][0]["message"]
    assert (message["annotations"], message["citations"]) == ([], [])


def test_a_stream_says_the_same_in_pieces(client: TestClient) -> None:
    whole = asked(client)
    response = client.post(CHAT, json={"messages": ASKED, "documents": DOCUMENTS, "stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    chunks = events_of(response.text)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    opening, *pieces, closing = (chunk["choices"][0] for chunk in chunks)
    assert opening["delta"] == {"role": "assistant", "content": ""}
    message = whole["choices"][0]["message"]
    assert "".join(piece["delta"]["content"] for piece in pieces) == message["content"]
    assert len(pieces) > 1
    assert {piece["finish_reason"] for piece in pieces} == {None}
    assert closing["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert closing["delta"] == {name: message[name] for name in ("annotations", "citations")}


def test_a_stream_has_usage_when_it_is_asked_for(client: TestClient) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}}
    last = events_of(client.post(CHAT, json={"messages": ASKED, "documents": DOCUMENTS, **options}).text)[-1]
    assert last["choices"] == []
    assert last["usage"] == asked(client)["usage"]


@pytest.mark.parametrize(
    "documents",
    [
        ["One.", "Two."],
        [{"text": "One."}, {"text": "Two.", "other": [1]}],
        [{"snippet": "One."}, {"data": "Two."}],
        [{"data": {"text": "One."}}, {"data": {"snippet": "Two.", "author": "x"}}],
    ],
)
def test_documents_have_many_shapes(documents: list[Any]) -> None:
    read = passages_of([Document(**d) if isinstance(d, dict) else d for d in documents])
    assert [passage.text for passage in read] == ["One.", "Two."]


def test_a_document_keeps_its_id_title_url_and_score() -> None:
    fields = {"id": 7, "title": "T", "text": "x", "url": "u", "score": 0.5}
    assert passages_of([Document(**fields)]) == [Passage("x", "7", "T", {"url": "u"}, 0.5)]  # type: ignore[arg-type]
    assert passages_of([Document(id="a", data={"title": "T", "snippet": "x"})]) == [Passage("x", "a", "T")]


@pytest.mark.parametrize("document", [{}, {"id": "a"}, {"data": {"title": "T"}}, {"text": None}])
def test_a_document_without_text_is_refused(client: TestClient, document: Any) -> None:
    body = {"messages": ASKED, "documents": ["fine", document]}
    error = error_in(client.post(CHAT, json=body), 400)
    assert error["param"] == "documents.1"


def parts(*found: dict[str, Any]) -> list[ChatMessage]:
    return [ChatMessage(role="user", content=[*found, {"type": "text", "text": QUESTION}])]


@pytest.mark.parametrize(
    ("part", "passage"),
    [
        ({"type": "document", "id": "a", "title": "T", "text": "x"}, Passage("x", "a", "T")),
        ({"type": "document", "document": {"id": "a", "text": "x"}}, Passage("x", "a")),
        ({"type": "document", "document": {"id": "a", "data": {"title": "T", "text": "x"}}}, Passage("x", "a", "T")),
        ({"type": "document", "title": "T", "source": {"type": "text", "data": "x"}}, Passage("x", None, "T")),
        ({"type": "file", "file": {"filename": "a.txt", "text": "x"}}, Passage("x", "a.txt")),
        (
            {
                "type": "file",
                "file": {"filename": "a", "file_data": "data:text/plain;base64," + base64.b64encode(b"x").decode()},
            },
            Passage("x", "a"),
        ),
    ],
)
def test_parts_of_a_message_hold_passages(part: dict[str, Any], passage: Passage) -> None:
    read = conversation_of(parts(part))
    assert read.passages == [passage]
    assert read.messages == [{"role": "user", "content": QUESTION}]


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "x"}},
        {"type": "file", "file": {"file_id": "f"}},
        {"type": "file", "file": {"file_data": "data:application/pdf;base64,eA=="}},
        {"type": "file", "file": {"file_data": "data:text/plain;base64,%%"}},
        {"type": "file", "file": {"file_data": "data:text/plain;base64,\u00e9eA=="}},
        {"type": "document", "document": {"text": 7}},
        {"type": "text"},
        {},
    ],
)
def test_parts_that_cannot_be_read_are_refused(client: TestClient, part: dict[str, Any]) -> None:
    error = error_in(client.post(CHAT, json={"messages": [m.model_dump() for m in parts(part)]}), 400)
    assert error["param"] == "messages.0.content.0"


def test_neighbours_of_one_role_are_merged_and_system_messages_stay_apart() -> None:
    said = [("developer", "A"), ("system", "B"), ("user", "C"), ("user", "D"), ("assistant", ""), ("user", "E")]
    read = conversation_of([ChatMessage(role=role, content=text) for role, text in said])
    expected = [("system", "A"), ("system", "B"), ("user", "C\n\nD\n\nE")]
    assert [(m["role"], m["content"]) for m in read.messages] == expected


def test_passages_are_found_in_a_known_prompt(client: TestClient) -> None:
    prompt = LLAMA_INDEX.format(context="\n\n".join(str(d["text"]) for d in DOCUMENTS), query=QUESTION)
    body = asked(client, messages=[{"role": "user", "content": prompt}], documents=[], finch={"report": True})
    report = body["usage"]["finch"]["report"]
    assert report["parse_mode"] not in ("apart", "whole")
    assert report["passages"] >= 1


def test_history_and_system_prompt_are_read(client: TestClient, engine: Finch) -> None:
    said = [("system", "Be brief."), ("user", "Who are you?"), ("assistant", "A model."), ("user", QUESTION)]
    messages: list[Any] = [{"role": role, "content": text} for role, text in said]
    assert asked(client, messages=messages)["choices"][0]["message"]["content"] == engine.chat(messages, PASSAGES).text


@pytest.mark.parametrize(
    ("sent", "option", "value"),
    [
        ({"max_tokens": 3}, "max_new_tokens", 3),
        ({"max_completion_tokens": 3, "max_tokens": 3}, "max_new_tokens", 3),
        ({"temperature": 0.5}, "temperature", 0.5),
        ({"top_p": 0.9}, "top_p", 0.9),
        ({"seed": 7}, "seed", 7),
        ({"stop": "x"}, "stop", "x"),
        ({"stop": ["x", "y"]}, "stop", ["x", "y"]),
        ({"top_k": 5}, "top_k", 5),
        ({"finch": {"rounds": 1, "cutoff": 0.0}}, "rounds", 1),
        ({"response_format": {"type": "json_object"}}, "json_schema", {"type": "object", "additionalProperties": True}),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "integer"}}}},
            "json_schema",
            {"type": "integer"},
        ),
    ],
)
def test_parameters_become_options(engine: Finch, answer: Answer, sent: Any, option: str, value: Any) -> None:
    held = HeldAnswers(answer, free_pieces=9)
    with client_of(engine, answers=held) as client:
        assert client.post(CHAT, json={"messages": ASKED, **sent}).status_code == 200
    ((_, _, options),) = held.asked
    assert dict(options)[option] == value


def test_what_is_not_sent_is_left_to_the_engine(engine: Finch, answer: Answer) -> None:
    held = HeldAnswers(answer, free_pieces=9)
    with client_of(engine, answers=held) as client:
        assert client.post(CHAT, json={"messages": ASKED, "temperature": None, "stop": None}).status_code == 200
    assert held.asked == [([{"role": "user", "content": QUESTION}], [], {})]


@pytest.mark.parametrize(
    "harmless",
    [
        {"user": "u", "metadata": {"a": "b"}, "service_tier": "auto", "safety_identifier": "x"},
        {"n": 1, "frequency_penalty": 0, "presence_penalty": 0.0, "logprobs": False, "logit_bias": {}},
        {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True, "modalities": ["text"]},
        {"store": False, "reasoning_effort": None, "response_format": {"type": "text"}, "stream": False},
        {"store": None, "top_logprobs": None, "prediction": {"type": "content", "content": "x"}},
    ],
)
def test_parameters_that_do_nothing_are_taken(client: TestClient, harmless: Any) -> None:
    assert asked(client, **harmless)["choices"]


@pytest.mark.parametrize(
    ("sent", "named"),
    [
        ({"n": 2}, "n"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"logprobs": True}, "logprobs"),
        ({"logit_bias": {"50256": -100}}, "logit_bias"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens"),
        ({"maxtokens": 3}, "maxtokens"),
        ({"store": True}, "store"),
        ({"finch": {"render": "x"}}, "finch.render"),
        ({"finch": {"store": "/etc"}}, "finch.store"),
        ({"finch": {"budgett": 1}}, "finch.budgett"),
        ({"finch": {"report": "yes"}}, "finch.report"),
        ({"finch": {"temperature": 1}, "temperature": 1}, "finch.temperature"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"temperature": "hot"}, "temperature"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(client: TestClient, sent: Any, named: str) -> None:
    error = error_in(client.post(CHAT, json={"messages": ASKED, **sent}), 400)
    assert error["param"] == named
    assert named.rpartition(".")[2] in error["message"]


@pytest.mark.parametrize("sent", [{"temperature": -1}, {"top_p": 2}, {"max_tokens": 0}, {"finch": {"cutoff": 3}}])
def test_values_that_cannot_work_are_refused(client: TestClient, sent: Any) -> None:
    assert "is" in error_in(client.post(CHAT, json={"messages": ASKED, **sent}), 400)["message"]


def test_another_model_is_not_found(client: TestClient) -> None:
    error = error_in(client.post(CHAT, json={"model": "gpt-5", "messages": ASKED}), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "'small'" in error["message"]


def test_an_answer_can_be_held_to_a_schema(client: TestClient) -> None:
    schema = {"type": "object", "properties": {"year": {"enum": [1874, 1902]}}, "required": ["year"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "year", "schema": schema, "strict": True}}
    body = asked(client, response_format=wanted, max_tokens=30)
    assert json.loads(body["choices"][0]["message"]["content"])["year"] in (1874, 1902)


def test_a_text_is_completed(client: TestClient, engine: Finch) -> None:
    body = client.post(COMPLETIONS, json={"model": "small", "prompt": QUESTION, "documents": DOCUMENTS}).json()
    (choice,) = body["choices"]
    assert body["object"] == "text_completion"
    assert choice["text"] == engine.chat(QUESTION, PASSAGES).text
    assert choice["citations"]
    assert body["usage"]["finch"]["kept_tokens"] > 0
    listed = client.post(COMPLETIONS, json={"prompt": [QUESTION], "documents": DOCUMENTS}).json()
    assert listed["choices"][0]["text"] == choice["text"]


def test_a_text_is_completed_in_pieces(client: TestClient) -> None:
    whole = client.post(COMPLETIONS, json={"prompt": QUESTION, "documents": DOCUMENTS}).json()["choices"][0]
    sent = {"prompt": QUESTION, "documents": DOCUMENTS, "stream": True}
    choices = [chunk["choices"][0] for chunk in events_of(client.post(COMPLETIONS, json=sent).text)]
    assert "".join(choice["text"] for choice in choices) == whole["text"]
    assert choices[-1]["citations"] == whole["citations"]


@pytest.mark.parametrize(
    "sent", [{"prompt": ["a", "b"]}, {"prompt": []}, {"prompt": [1, 2]}, {"prompt": "a", "echo": True}]
)
def test_prompts_that_cannot_be_read_are_refused(client: TestClient, sent: Any) -> None:
    error_in(client.post(COMPLETIONS, json=sent), 400)


def test_a_response_is_a_chat_of_another_form(client: TestClient, engine: Finch, answer: Answer) -> None:
    said = [
        {"role": "user", "content": [{"type": "input_text", "text": "Who are you?"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "A model."}]},
        {"role": "user", "content": QUESTION},
    ]
    sent = {"input": said, "instructions": "Be brief.", "documents": DOCUMENTS, "temperature": 0}
    body = client.post("/v1/responses", json=sent).json()
    messages: list[Any] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Who are you?"},
        {"role": "assistant", "content": "A model."},
        {"role": "user", "content": QUESTION},
    ]
    assert body["output"][0]["content"][0]["text"] == engine.chat(messages, PASSAGES).text
    held = HeldAnswers(answer, free_pieces=9)
    schema = {"type": "json_schema", "name": "n", "schema": {"type": "integer"}, "strict": True}
    with client_of(engine, answers=held) as steered:
        sent = {"input": "x", "max_output_tokens": 5, "text": {"format": schema, "verbosity": "medium"}}
        assert steered.post("/v1/responses", json=sent).status_code == 200
    assert held.asked[0][2] == {"max_new_tokens": 5, "json_schema": {"type": "integer"}}


@pytest.mark.parametrize(
    "sent",
    [
        {"previous_response_id": "resp_1"},
        {"tools": [{"type": "web_search"}]},
        {"text": {"verbosity": "high"}},
        {"text": {"format": {"type": "json_schema"}}},
        {"background": True},
        {"input": [{"type": "function_call_output", "output": "x"}]},
    ],
)
def test_responses_that_cannot_be_made_are_refused(client: TestClient, sent: Any) -> None:
    error_in(client.post("/v1/responses", json={"input": "x", **sent}), 400)


def test_models_are_listed(client: TestClient, engine: Finch) -> None:
    (model,) = client.get("/v1/models").json()["data"]
    assert (model["id"], model["object"], model["max_model_len"]) == ("small", "model", engine.window)
    assert client.get("/v1/models/small").json() == model
    assert error_in(client.get("/v1/models/other/one"), 404)["code"] == "model_not_found"


def test_a_model_may_have_another_name(engine: Finch) -> None:
    with client_of(engine, name="house/model") as client:
        assert client.get("/v1/models/house/model").json()["id"] == "house/model"
        assert asked(client, model="house/model")["model"] == "house/model"


def test_the_endpoints_are_documented(client: TestClient) -> None:
    assert client.get("/docs").status_code == 200
    paths = client.get("/openapi.json").json()["paths"]
    assert {CHAT, COMPLETIONS, "/v1/rerank", "/v1/stores/{name}/search", "/health", "/metrics"} <= set(paths)
