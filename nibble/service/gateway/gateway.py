"""What all requests of one gateway process share."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from nibble.service.broker.gateway_side import GatewayBroker
from nibble.service.gateway.errors import ApiError
from nibble.service.gateway.metrics import GatewayMetrics
from nibble.service.gateway.served_model import ServedModel
from nibble.service.gateway.settings import GatewaySettings

if TYPE_CHECKING:
    from nibble.service.gateway.generation import Generation

_FINGERPRINT_MAX_AGE_S = 10.0  # a request asks the broker who is ready at most this often


@dataclass
class Gateway:
    """Made once by `app.py`. in_flight: every request whose answer has not ended."""

    settings: GatewaySettings
    model: ServedModel
    broker: GatewayBroker
    metrics: GatewayMetrics
    in_flight: set[Generation] = field(default_factory=set)
    is_draining: bool = False
    _fingerprint: str = ""
    _fingerprint_s: float = float("-inf")

    async def system_fingerprint(self) -> str:
        """What produces the tokens: engine version, model, device of a ready worker. Raises BrokerError."""
        now_s = time.monotonic()
        if now_s - self._fingerprint_s > _FINGERPRINT_MAX_AGE_S:
            status = await self.broker.status()
            devices = sorted({worker.device for worker in status.workers if worker.state == "ready"})
            self._fingerprint = "-".join([f"nibble-{nibble_version()}", self.model.name, *devices[:1]])
            self._fingerprint_s = now_s if devices else float("-inf")
        return self._fingerprint

    def interrupt_all(self, error: ApiError) -> None:
        """End every running answer with this error."""
        for generation in list(self.in_flight):
            generation.interrupt(error)


def nibble_version() -> str:
    try:
        return version("nibble")
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "0+source"
