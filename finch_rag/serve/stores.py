"""``/v1/stores``: passages that are read once and asked for ever."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Annotated, Any, TypeVar

from fastapi import Query, Request
from pydantic import BaseModel, Field

from ..request import Cancellation
from ..store.figures import Added, Retrieved, StoreInfo
from ..store.reading import Precision
from .documents import Documents, passages_of
from .errors import refused
from .routes import router
from .service import Service, ServiceOf
from .watching import while_wanted

routes = router()

Result = TypeVar("Result")


class NewStore(BaseModel):
    """A store to be made.

    Attributes:
        name: Its name.
        precision: Of its keys: "bfloat16", or "int8", which takes half the bytes.
    """

    name: str
    precision: Precision = "bfloat16"


class NewPassages(BaseModel):
    """Passages to be read.

    Attributes:
        passages: Texts, or objects with id, title and text. An id that is known gets the new text.
    """

    passages: Documents = Field(min_length=1)


class Question(BaseModel):
    """What to look for.

    Attributes:
        query: The question.
        top_k: The most passages.
    """

    query: str
    top_k: int = Field(default=10, ge=1)


@routes.get("/v1/stores", tags=["stores"])
async def list_stores(request: Request, service: ServiceOf) -> dict[str, Any]:
    """All stores, by name."""
    names = await _errand(service, request, lambda cancellation: service.shelf.names())
    return {"object": "list", "data": [{"object": "store", "name": name} for name in names]}


@routes.post("/v1/stores", tags=["stores"], status_code=201)
async def create_store(body: NewStore, request: Request, service: ServiceOf) -> dict[str, Any]:
    """Makes an empty store."""
    made = await _errand(service, request, lambda cancellation: service.shelf.create(body.name, body.precision))
    return _shown(body.name, made)


@routes.get("/v1/stores/{name}", tags=["stores"])
async def show_store(name: str, request: Request, service: ServiceOf) -> dict[str, Any]:
    """What a store holds."""
    return _shown(name, await _errand(service, request, lambda cancellation: service.shelf.info(name)))


@routes.delete("/v1/stores/{name}", tags=["stores"])
async def delete_store(name: str, request: Request, service: ServiceOf) -> dict[str, Any]:
    """Deletes a store with all that it holds."""
    await _errand(service, request, lambda cancellation: service.shelf.delete(name))
    return {"object": "store.deleted", "name": name, "deleted": True}


@routes.post("/v1/stores/{name}/passages", tags=["stores"])
async def add_passages(name: str, body: NewPassages, request: Request, service: ServiceOf) -> dict[str, Any]:
    """Reads passages that are not known yet. What was read before a time limit or a lost connection stays."""
    passages = passages_of(body.passages, "passages")

    def add(cancellation: Cancellation) -> Added:
        def on_progress(done: int, total: int) -> None:
            cancellation.check()

        return service.shelf.store(name).add(passages, on_progress)

    added = await _errand(service, request, add)
    return {
        "store": name,
        "added": len(added.read),
        "read_tokens": added.read_tokens,
        "known_tokens": added.known_tokens,
    }


@routes.delete("/v1/stores/{name}/passages", tags=["stores"])
async def remove_passages(
    name: str,
    request: Request,
    service: ServiceOf,
    ids: Annotated[list[str], Query(alias="id", description="Of a passage; may stand several times.")],
) -> dict[str, Any]:
    """Removes passages by their ids; where one is not there, none is removed."""
    if not ids:
        raise refused("no id is given: pass ?id=...", "id")
    await _errand(service, request, lambda cancellation: service.shelf.store(name).remove(ids))
    return {"store": name, "removed": len(ids)}


@routes.post("/v1/stores/{name}/search", tags=["stores"])
async def search(name: str, body: Question, request: Request, service: ServiceOf) -> dict[str, Any]:
    """The passages that a question pays most attention to, over the whole store."""

    def look(cancellation: Cancellation) -> list[Retrieved]:
        return service.shelf.store(name).retrieve(body.query, body.top_k)

    found = await _errand(service, request, look)
    return {"object": "list", "store": name, "results": [_result(passage) for passage in found]}


async def _errand(service: Service, request: Request, work: Callable[[Cancellation], Result]) -> Result:
    service.check_open()
    return await while_wanted(request, service.errands.run(work), service.settings.timeout)


def _shown(name: str, info: StoreInfo) -> dict[str, Any]:
    held = {name: value for name, value in asdict(info).items() if name not in ("path", "max_bytes")}
    return {"object": "store", "name": name, **held}


def _result(found: Retrieved) -> dict[str, Any]:
    passage = found.passage
    return {
        "id": passage.id,
        "title": passage.title,
        "text": passage.text,
        "share": found.share,
        "tokens": found.tokens,
    }
