"""``/v1/models``: the one that there is."""

from __future__ import annotations

from typing import Any

from .routes import router
from .service import Service, ServiceOf

routes = router()


@routes.get("/v1/models", tags=["server"])
async def list_models(service: ServiceOf) -> dict[str, Any]:
    """All models."""
    return {"object": "list", "data": [_shown(service)]}


@routes.get("/v1/models/{name:path}", tags=["server"])
async def show_model(name: str, service: ServiceOf) -> dict[str, Any]:
    """A model."""
    service.check(name)
    return _shown(service)


def _shown(service: Service) -> dict[str, Any]:
    about = {"id": service.name, "object": "model", "created": service.created, "owned_by": "finch-rag"}
    return {**about, "max_model_len": service.finch.window}
