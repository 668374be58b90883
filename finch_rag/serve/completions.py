"""``POST /v1/completions``."""

from __future__ import annotations

from fastapi import Request
from starlette.responses import Response

from .documents import passages_of
from .errors import refused
from .generation import Asked, respond
from .parameters import Parameters
from .replies import TextReply
from .routes import router
from .service import ServiceOf

routes = router()


class CompletionRequest(Parameters):
    """A prompt to answer.

    Attributes:
        prompt: A text, or a list of one.
    """

    prompt: str | list[str]

    @property
    def text(self) -> str:
        """The prompt.

        Raises:
            ApiError: 400, if there is not one.
        """
        if isinstance(self.prompt, str):
            return self.prompt
        if len(self.prompt) != 1:
            raise refused(
                f"prompt has {len(self.prompt)} texts: pass one, and the others in requests of their own", "prompt"
            )
        return self.prompt[0]


@routes.post("/v1/completions", tags=["answers"])
async def complete(body: CompletionRequest, request: Request, service: ServiceOf) -> Response:
    """Answers a prompt, from documents, with citations."""
    service.check(body.model)
    passages = passages_of(body.documents)
    asked = Asked(body.text, passages, question=body.text)
    return await respond(service, request, body, asked, TextReply(service.name, passages, body.wants_report))
