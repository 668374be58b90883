"""``/v1/rerank``, ``/v2/rerank`` and ``/rerank``: attention as a reranker, in the shape of Cohere, Jina and vLLM."""

from __future__ import annotations

import uuid
from typing import Any

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field

from ..answer import Citation
from ..prompts.passages import Passage
from ..request import Cancellation, no_progress
from .documents import Documents, passages_of
from .errors import refused
from .routes import router
from .service import ServiceOf
from .watching import while_wanted

routes = router()


class RerankRequest(BaseModel):
    """Documents to be ranked for a query. Other fields are left aside: documents are read whole.

    Attributes:
        query: The query.
        documents: Texts, or objects with text.
        model: The model; may be left out.
        top_n: The most results; all when None.
        return_documents: Whether results have their documents.
    """

    model_config = ConfigDict(extra="allow")

    query: str
    documents: Documents
    model: str | None = None
    top_n: int | None = Field(default=None, ge=1)
    return_documents: bool | None = None


@routes.post("/rerank", tags=["ranking"])
@routes.post("/v1/rerank", tags=["ranking"])
@routes.post("/v2/rerank", tags=["ranking"])
async def rerank(body: RerankRequest, request: Request, service: ServiceOf) -> dict[str, Any]:
    """Ranks documents by the attention that a query pays to them; scores sum to 1."""
    service.check(body.model)
    passages = passages_of(body.documents)
    if not passages:
        raise refused("documents is empty: pass some", "documents")

    def ranked(cancellation: Cancellation) -> list[Citation]:
        on_progress = cancellation.telling("rank", no_progress)
        return service.finch.rank(
            body.query, passages, store=None, on_progress=lambda stage, done, total: on_progress(done, total)
        )

    found = await while_wanted(request, service.errands.run(ranked), service.settings.timeout)
    tokens = sum(citation.passage_tokens for citation in found)
    return {
        "id": f"rerank-{uuid.uuid4().hex}",
        "object": "list",
        "model": service.name,
        "results": [_result(citation, passages, bool(body.return_documents)) for citation in found[: body.top_n]],
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        "meta": {"api_version": {"version": "2"}, "billed_units": {"search_units": 1}},
    }


def _result(citation: Citation, passages: list[Passage], with_document: bool) -> dict[str, Any]:
    result: dict[str, Any] = {"index": citation.index, "relevance_score": citation.share}
    if with_document:
        passage = passages[citation.index]
        named = {"id": passage.id, "title": passage.title}
        result["document"] = {
            "text": passage.text,
            **{name: value for name, value in named.items() if value is not None},
        }
    return result
