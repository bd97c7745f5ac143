"""What operators and orchestrators ask: /health, /ready, /metrics, /version."""

from __future__ import annotations

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from nibble.service.broker.errors import BrokerError
from nibble.service.gateway.gateway import Gateway
from nibble.service.gateway.routes.body import gateway_of, json_response
from nibble.service.version import nibble_version

router = APIRouter(tags=["operations"])


@router.get("/health")
async def health() -> Response:
    """Whether this process lives; a broken broker or worker is no reason to restart it."""
    return json_response({"status": "ok"})


@router.get("/ready")
async def ready(request: Request) -> Response:
    """Whether a request sent now would be served; 503 with the reason otherwise."""
    gateway = gateway_of(request)
    reason = await _why_not_ready(gateway)
    if reason is None:
        return json_response({"status": "ready", "model": gateway.model.name})
    return json_response({"status": "not ready", "model": gateway.model.name, "reason": reason}, status=503)


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Prometheus text format."""
    gateway = gateway_of(request)
    await gateway.metrics.broker.refresh(gateway.broker)
    return Response(gateway.metrics.render(), media_type=CONTENT_TYPE_LATEST)


@router.get("/version")
async def version(request: Request) -> Response:
    """Version of this server and the model it serves."""
    return json_response({"version": nibble_version(), "model": gateway_of(request).model.name})


async def _why_not_ready(gateway: Gateway) -> str | None:
    if gateway.is_draining:
        return "the gateway is shutting down"
    try:
        status = await gateway.broker.status()
    except BrokerError as error:
        return f"the broker cannot be reached: {error}"
    states = [worker.state for worker in status.workers]
    if "ready" in states or not gateway.settings.needs_worker:
        return None
    return f"no worker is ready: {', '.join(states)}" if states else "no worker is alive"
