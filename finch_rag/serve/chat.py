"""``POST /v1/chat/completions``."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import Request
from starlette.responses import Response

from .conversation import ChatMessage, conversation_of
from .documents import passages_of
from .errors import refused
from .generation import Asked, respond
from .parameters import Parameters
from .replies import ChatReply
from .routes import router
from .service import ServiceOf

routes = router()


class ChatRequest(Parameters):
    """A conversation to go on with.

    Attributes:
        messages: The conversation.
        max_completion_tokens: The newer name of ``max_tokens``.
    """

    messages: list[ChatMessage]
    max_completion_tokens: int | None = None

    @property
    def most_tokens(self) -> int | None:
        """The most tokens of the answer; None for the default.

        Raises:
            ApiError: 400, if the two names say different things.
        """
        new, old = self.max_completion_tokens, self.max_tokens
        if new is not None and old is not None and new != old:
            raise refused(
                f"max_completion_tokens is {new} and max_tokens is {old}: leave one of them out",
                "max_completion_tokens",
            )
        return old if new is None else new


@routes.post("/v1/chat/completions", tags=["answers"])
async def complete_chat(body: ChatRequest, request: Request, service: ServiceOf) -> Response:
    """Answers the last message of a conversation, from documents, with citations."""
    service.check(body.model)
    asked = asked_of(body, body.messages)
    return await respond(service, request, body, asked, ChatReply(service.name, asked.passages, body.wants_report))


def asked_of(parameters: Parameters, messages: Sequence[ChatMessage]) -> Asked:
    """What a conversation asks.

    Args:
        parameters: Of the request.
        messages: The conversation.

    Raises:
        ApiError: 400, if it cannot be read.
    """
    conversation = conversation_of(messages)
    passages = [*passages_of(parameters.documents), *conversation.passages]
    if parameters.store_name is not None and not passages:
        return Asked(conversation.messages, passages, *conversation.apart())
    return Asked(conversation.messages, passages)
