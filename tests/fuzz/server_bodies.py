"""Bodies of requests: each is answered, or refused in OpenAI's shape."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError

from finch_rag import Finch, FinchError
from finch_rag.serve.bodies import parsed
from finch_rag.serve.chat import ChatRequest, asked_of
from finch_rag.serve.completions import CompletionRequest
from finch_rag.serve.documents import passages_of
from finch_rag.serve.errors import ApiError, error_of
from finch_rag.serve.generation import Asked
from finch_rag.serve.parameters import Parameters, options_of
from finch_rag.serve.replies import ChatReply
from finch_rag.serve.rerank import RerankRequest
from finch_rag.serve.responses import ResponseRequest
from finch_rag.serve.stores import NewPassages, Question
from tests.small import small_finch

from .support import Choices, dictionary, holds, text_of

WORDS = (
    *("{", "}", "[", "]", ", ", ": ", '"', "null", "true", "false", "0", "-1", "1e999", "1e-400", "NaN", "9" * 30),
    *(
        '"messages": ',
        '"role": "user"',
        '"role": "system"',
        '"role": "assistant"',
        '"role": "developer"',
        '"content": ',
    ),
    *('"who built it?"', '{"role": "user", "content": "who?"}', '{"type": "text", "text": "x"}', '"type": "document"'),
    *('"type": "file"', '"file": ', '"file_data": "data:text/plain;base64,', '"source": {"type": "text", "data": "x"}'),
    *('"documents": ', '{"id": 1, "title": "T", "text": "The bridge."}', '"data": ', '"snippet": "s"', '"score": '),
    *('"url": "https://a"', '"finch": ', '"budget": ', '"chunk_size": ', '"rounds": ', '"heads": ', '"quotes": true'),
    *('"report": true', '"strategy": "independent"', '"selection": "token"', '"cutoff": ', '"prior": ', '"stop": '),
    *('"temperature": ', '"top_p": ', '"top_k": ', '"seed": ', '"max_tokens": ', '"stop_token_ids": ', '"store": '),
    *('"response_format": ', '{"type": "json_object"}', '"json_schema": ', '"schema": {"type": "object"}', '"n": '),
    *('"prompt": ', '"input": ', '"instructions": ', '"query": ', '"top_n": ', '"passages": ', '"stream_options": {}'),
    *(
        '"repetition_penalty": ',
        '"system_prompt": ',
        '"max_context_tokens": ',
        '"min_support": ',
        '"\\ud800"',
        "[" * 500,
    ),
    *('"stream": true', '"model": "small"', '"tools": []', '"logit_bias": {}', '"shortlist_tokens": ', '"support": '),
)
DICTIONARY = dictionary(WORDS)
_MODELS: tuple[type[BaseModel], ...] = (
    ChatRequest,
    CompletionRequest,
    ResponseRequest,
    RerankRequest,
    NewPassages,
    Question,
)
_READ = 0x80  # of the first byte: the answer is made, too


@cache
def _finch() -> Finch:
    return small_finch(max_new_tokens=2)


def seeds() -> list[bytes]:
    """A body for each endpoint, and richer ones."""
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "who built it?"}]
    documents = ["The bridge.", {"id": "a", "title": "T", "text": "The museum.", "score": 1.5, "url": "https://a"}]
    part = {"type": "document", "document": {"id": 1, "title": "T", "text": "x"}}
    file = {"type": "file", "file": {"filename": "a", "file_data": "data:text/plain;base64,VGhlIGJyaWRnZS4="}}
    text = {"type": "text", "text": "who?"}
    own = {"budget": 40, "chunk_size": 32, "rounds": 1, "quotes": True, "report": True, "strategy": "independent"}
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["red", "blue"]}}}
    bodies: list[tuple[int, dict[str, Any]]] = [
        (0, {"messages": turns}),
        (_READ, {"messages": turns, "documents": documents, "finch": own, "max_tokens": 2, "stop": ["x"]}),
        (0, {"messages": [{"role": "user", "content": [part, file, text]}], "temperature": 0.5, "seed": 1, "top_k": 3}),
        (0, {"messages": turns, "documents": documents, "response_format": schema, "stop_token_ids": [1]}),
        (1, {"prompt": ["who built it?"], "documents": documents, "top_p": 0.5, "repetition_penalty": 1.1}),
        (2, {"input": turns, "instructions": "Short.", "max_output_tokens": 3, "text": {"format": {"type": "text"}}}),
        (3, {"query": "who?", "documents": documents, "top_n": 1, "return_documents": True}),
        (4, {"passages": [{"data": {"title": "T", "snippet": "x"}}, {"data": "x"}]}),
        (5, {"query": "who?", "top_k": 3}),
    ]
    return [bytes((kind,)) + json.dumps(body).encode() for kind, body in bodies]


def check(data: bytes) -> None:
    """An endpoint, then a body."""
    choices = Choices(data)
    kind = choices.number(256)
    content = choices.rest()
    body = content if content[:1] == b"\xff" else text_of(content, WORDS).encode()
    try:
        _answer(_MODELS[kind % len(_MODELS)] if kind < _READ else _MODELS[(kind - _READ) % 3], body, kind >= _READ)
    except ValidationError as error:
        _check_refusal(error_of(RequestValidationError(error.errors())))
    except (ApiError, FinchError) as error:
        _check_refusal(error_of(error))


def _answer(model: type[BaseModel], body: bytes, read: bool) -> None:
    request = model.model_validate(parsed(body))
    if isinstance(request, (RerankRequest, NewPassages)):
        passages_of(request.documents if isinstance(request, RerankRequest) else request.passages)
    if not isinstance(request, Parameters):
        return
    options = options_of(request)
    _ = request.store_name, request.wants_report
    asked = _asked(request)
    if read:
        options["max_new_tokens"] = min(2, options.get("max_new_tokens", 2))
    stream = _finch().stream_chat(asked.messages, asked.passages, **options)
    if read:
        whole = ChatReply("small", asked.passages, request.wants_report).whole(stream.read())
        json.dumps(whole, allow_nan=False, ensure_ascii=False).encode()


def _asked(request: Parameters) -> Asked:
    if isinstance(request, CompletionRequest):
        return Asked(request.text, passages_of(request.documents))
    assert isinstance(request, (ChatRequest, ResponseRequest))
    return asked_of(request, request.messages)


def _check_refusal(error: ApiError) -> None:
    holds(400 <= error.status_code < 500 or error.status_code == 501, f"status {error.status_code}: {error.message}")
    holds("\n" not in error.message, f"a refusal is not one line: {error.message!r}")
    holds(len(error.response.body) > 0, "a refusal without a body")
