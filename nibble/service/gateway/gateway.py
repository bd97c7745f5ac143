"""What all requests of one gateway process share."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from nibble.service.broker.gateway_side import GatewayBroker
from nibble.service.gateway.api_keys import KeyRing
from nibble.service.gateway.errors import ApiError
from nibble.service.gateway.metrics import GatewayMetrics
from nibble.service.gateway.served_model import ServedModel
from nibble.service.gateway.settings import GatewaySettings
from nibble.service.version import nibble_version

if TYPE_CHECKING:
    from nibble.service.gateway.generation import Generation
    from nibble.service.tracing import Tracer

_FLEET_MAX_AGE_S = 10.0  # a request asks the broker who is ready at most this often


@dataclass(frozen=True)
class Fleet:
    """What the ready workers are. fingerprint: what produces the tokens: engine version, model, device of one of them.
    model: as all of them can serve it; any of them may get a request, so its context length is the smallest one's."""

    fingerprint: str
    model: ServedModel


@dataclass
class Gateway:
    """Made once by `app.py`. tracer: None where tracing is off. in_flight: every request whose answer has not ended."""

    settings: GatewaySettings
    model: ServedModel
    broker: GatewayBroker
    metrics: GatewayMetrics
    keys: KeyRing
    tracer: Tracer | None = None
    in_flight: set[Generation] = field(default_factory=set)
    is_draining: bool = False
    _fleet: Fleet | None = None
    _fleet_s: float = float("-inf")

    async def fleet(self) -> Fleet:
        """As it was at most _FLEET_MAX_AGE_S ago. Raises BrokerError."""
        now_s = time.monotonic()
        if self._fleet is None or now_s - self._fleet_s > _FLEET_MAX_AGE_S:
            workers = [worker for worker in (await self.broker.status()).workers if worker.state == "ready"]
            devices = sorted({worker.device for worker in workers})
            fingerprint = "-".join([f"nibble-{nibble_version()}", self.model.name, *devices[:1]])
            limits = [worker.max_context_tokens for worker in workers if worker.max_context_tokens]
            context_length = min([self.model.context_length, *limits])
            self._fleet = Fleet(fingerprint, replace(self.model, context_length=context_length))
            self._fleet_s = now_s if workers else float("-inf")
        return self._fleet

    def interrupt_all(self, error: ApiError) -> None:
        """End every running answer with this error."""
        for generation in list(self.in_flight):
            generation.interrupt(error)
