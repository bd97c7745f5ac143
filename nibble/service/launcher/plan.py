"""What is going to run: the command and the whole environment of each child, fixed before the first one starts.

A child gets the user's environment, their NIBBLE_ variables included, with what the launcher decides put in its place.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nibble.service.gateway.settings import GatewaySettings
from nibble.service.launcher.ports import claim_port, claim_port_near
from nibble.service.launcher.process import ProcessSpec
from nibble.service.launcher.settings import LauncherSettings
from nibble.service.worker.settings import WorkerSettings

GATEWAY = "gateway"
DRAIN_S = 2.0  # someone at a terminal wants their prompt back; NIBBLE_DRAIN_S says otherwise
_LAUNCHER_ONLY = frozenset({"NIBBLE_CACHE_DIR", "NIBBLE_NUM_WORKERS"})


@dataclass(frozen=True)
class Address:
    """Where the gateway listens."""

    host: str
    port: int

    @property
    def local_host(self) -> str:
        """A host that reaches it from this machine."""
        return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)

    @property
    def url(self) -> str:
        host = f"[{self.local_host}]" if ":" in self.local_host else self.local_host
        return f"http://{host}:{self.port}"


@dataclass(frozen=True)
class Model:
    """A native checkpoint directory and what clients call it."""

    directory: Path
    name: str


@dataclass(frozen=True)
class Plan:
    """All that is decided before the model is known; the processes follow from it, the model and the broker's URL."""

    settings: LauncherSettings
    address: Address
    metrics_ports: tuple[int, ...]  # one per worker
    drain_s: float
    needs_key: bool

    @classmethod
    def make(cls, settings: LauncherSettings, user: Mapping[str, str]) -> Plan:
        """Check what the children will read, and the ports. Raises SettingsError and LaunchError."""
        model_dir = settings.model_dir or Path()
        gateway = GatewaySettings.from_environment(model_dir=model_dir)
        worker = WorkerSettings.from_environment(model_dir=model_dir)
        address = Address(settings.host, claim_port(settings.host, settings.port))
        first = worker.metrics_port
        wanted = [first + index if first else 0 for index in range(settings.num_workers)]
        return cls(
            settings=settings,
            address=address,
            metrics_ports=tuple(claim_port_near(worker.metrics_host, port) for port in wanted),
            drain_s=gateway.drain_s if "NIBBLE_DRAIN_S" in user else DRAIN_S,
            needs_key=bool(gateway.api_keys or gateway.api_keys_file),
        )

    def processes(self, user: Mapping[str, str], redis_url: str, model: Model) -> tuple[ProcessSpec, ...]:
        """The gateway first, then the workers."""
        common = {name: value for name, value in user.items() if name not in _LAUNCHER_ONLY}
        common.update(
            NIBBLE_REDIS_URL=redis_url,
            NIBBLE_MODEL_DIR=str(model.directory),
            NIBBLE_MODEL_NAME=model.name,
            PYTHONUNBUFFERED="1",
        )
        return (self._gateway(common), *(self._worker(common, i) for i in range(self.settings.num_workers)))

    def _gateway(self, common: Mapping[str, str]) -> ProcessSpec:
        environment = dict(
            common,
            NIBBLE_HOST=self.address.host,
            NIBBLE_PORT=str(self.address.port),
            NIBBLE_DRAIN_S=f"{self.drain_s:g}",
        )
        return _python_process(GATEWAY, "nibble.service.gateway", environment)

    def _worker(self, common: Mapping[str, str], index: int) -> ProcessSpec:
        name = f"worker-{index + 1}"
        environment = dict(
            common,
            NIBBLE_WORKER_ID=f"{common.get('NIBBLE_WORKER_ID', socket.gethostname())}-{index + 1}",
            NIBBLE_METRICS_PORT=str(self.metrics_ports[index]),
        )
        if self.settings.num_workers > 1:  # workers of one machine share its cores evenly
            num_threads = max(1, (os.cpu_count() or 1) // self.settings.num_workers)
            environment.setdefault("NIBBLE_NUM_THREADS", str(num_threads))
        return _python_process(name, "nibble.service.worker", environment)


def _python_process(name: str, module: str, environment: Mapping[str, str]) -> ProcessSpec:
    return ProcessSpec(name=name, argv=(sys.executable, "-m", module), environment=environment)
