"""``POST /v1/responses``: the newer form of a chat, without tools and without memory."""

from __future__ import annotations

from typing import Any

from fastapi import Request
from starlette.responses import Response

from .chat import asked_of
from .conversation import ChatMessage
from .errors import refused
from .generation import respond
from .parameters import Parameters
from .response_reply import ResponseReply
from .routes import router
from .service import ServiceOf

routes = router()


class ResponseRequest(Parameters):
    """A conversation to go on with.

    Attributes:
        input: A question, or the conversation.
        instructions: A system message before it.
        max_output_tokens: The most tokens of the answer.
        text: ``format`` of the answer.
    """

    input: str | list[ChatMessage]
    instructions: str | None = None
    max_output_tokens: int | None = None
    text: dict[str, Any] | None = None

    @property
    def most_tokens(self) -> int | None:
        """The most tokens of the answer; None for the default."""
        return self.max_output_tokens

    @property
    def answer_format(self) -> dict[str, Any] | None:
        """The form of the answer, as chats have it; None for free text.

        Raises:
            ApiError: 400, if there is something beside the format that would change the answer.
        """
        text = dict(self.text or {})
        form = text.pop("format", None)
        verbosity = text.pop("verbosity", None)
        if text or verbosity not in (None, "medium") or not isinstance(form, dict | None):
            raise refused("text cannot be honoured: use its format alone", "text")
        if form is None or form.get("type") != "json_schema":
            return form
        return {"type": "json_schema", "json_schema": form}

    @property
    def messages(self) -> list[ChatMessage]:
        """The conversation."""
        said = [ChatMessage(role="user", content=self.input)] if isinstance(self.input, str) else self.input
        return said if self.instructions is None else [ChatMessage(role="system", content=self.instructions), *said]


@routes.post("/v1/responses", tags=["answers"])
async def create_response(body: ResponseRequest, request: Request, service: ServiceOf) -> Response:
    """Answers the last message of a conversation, from documents, with annotations. Nothing is kept of it."""
    service.check(body.model)
    asked = asked_of(body, body.messages)
    reply = ResponseReply(service.name, asked.passages, body.wants_report)
    return await respond(service, request, body, asked, reply)
