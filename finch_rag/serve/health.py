"""``/health`` and ``/metrics``."""

from __future__ import annotations

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import JSONResponse, Response

from .routes import router
from .service import ServiceOf

routes = router()


@routes.get("/health", tags=["server"])
async def health(service: ServiceOf) -> Response:
    """Whether requests are taken; needs no API key."""
    return JSONResponse({"status": "stopping"}, 503) if service.stopping else JSONResponse({"status": "ok"})


@routes.get("/metrics", tags=["server"])
async def metrics(service: ServiceOf) -> Response:
    """Figures for Prometheus."""
    return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)
