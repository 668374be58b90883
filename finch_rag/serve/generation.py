"""From a question to a response: who is asked, in which form the answer goes out, and how it ends."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from fastapi import Request
from starlette.responses import JSONResponse, Response

from ..prompts.chat_template import Message
from ..prompts.passages import Passage
from ..settings import CallOptions
from ..store.store import PassageStore
from .answers import AnswerPieces
from .events import EventStream, answer_events
from .parameters import Parameters, options_of
from .replies import Reply
from .service import Service
from .watching import Run, while_wanted

log = logging.getLogger("finch_rag.serve")


@dataclass(frozen=True, slots=True)
class Asked:
    """What a request asks.

    Attributes:
        messages: The conversation, or a prompt.
        passages: That the request brings.
        question: What a store is asked where it brings none.
        history: The messages before the question.
        system_prompt: The conversation's own.
    """

    messages: str | Sequence[Message]
    passages: list[Passage]
    question: str = ""
    history: Sequence[Message] = ()
    system_prompt: str | None = None


async def respond(service: Service, request: Request, parameters: Parameters, asked: Asked, reply: Reply) -> Response:
    """The response to a request.

    What cannot work is an error with its status, also in a stream: that begins with the first piece.

    Args:
        service: The server's parts.
        request: The client's.
        parameters: Of the request.
        asked: What it asks.
        reply: How the answer is told.

    Raises:
        ApiError: If it cannot be answered.
        FinchError: Likewise.
    """
    options = options_of(parameters)
    store = await store_of(service, request, parameters.store_name)
    if service.settings.log_prompts:
        log.info("asked: %s", asked.messages)
    run = Run(_pieces(service, asked, options, store), request, service.settings, service.metrics)
    streaming = False
    try:
        if not parameters.stream:
            return JSONResponse(reply.whole(await run.whole()))
        events = answer_events(
            run,
            await run.next_piece(),
            reply,
            include_usage=parameters.stream_options is not None and parameters.stream_options.include_usage,
            show_messages=service.settings.log_prompts,
        )
        streaming = True
        return EventStream(events, run.end, service.settings.timeout)
    finally:
        if not streaming:
            run.end()


async def store_of(service: Service, request: Request, name: str | None) -> PassageStore | None:
    """The store that a request names; None where it names none.

    Args:
        service: The server's parts.
        request: The client's.
        name: Its name.

    Raises:
        ApiError: 404 if there is none.
        StoreError: If it cannot be opened.
    """
    if name is None:
        return None
    opening = service.errands.run(lambda cancellation: service.shelf.store(name))
    return await while_wanted(request, opening, service.settings.timeout)


def _pieces(service: Service, asked: Asked, options: CallOptions, store: PassageStore | None) -> AnswerPieces:
    if store is None:
        return service.answers.chat(asked.messages, asked.passages, options)
    options["store"] = store
    if asked.passages:
        return service.answers.chat(asked.messages, asked.passages, options)
    if asked.history:
        options["history"] = asked.history
    if asked.system_prompt is not None:
        options.setdefault("system_prompt", asked.system_prompt)
    return service.answers.ask(asked.question, [], options)
