"""`nibble serve`: a whole service on one machine, from the model file to a clean stop.

Embedded Valkey, workers and a gateway are child processes; this process only starts, watches and stops them. It must
stay light (no torch, no HTTP framework): it lies in the way of every start.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import os
import signal
import sys
import time

from rich.console import Console

from nibble.service.launcher.banner import process_rows, ready_banner
from nibble.service.launcher.broker_server import running_broker
from nibble.service.launcher.errors import ProcessFailed
from nibble.service.launcher.log_lines import LogLines
from nibble.service.launcher.model import locate_model
from nibble.service.launcher.plan import GATEWAY, Address, Model, Plan
from nibble.service.launcher.settings import LauncherSettings
from nibble.service.launcher.supervisor import Supervisor

GATEWAY_STOP_S = 0.5  # after its drain time
WORKER_STOP_S = 1.5  # a worker ends after its current step; one that computes longer is cut off
_READY_POLL_S = 0.05
_HINT_S = 6.0  # longer than a start with everything in the cache
_READY_TIMEOUT_S = 1.0


def serve(settings: LauncherSettings) -> None:
    """Serve until SIGINT, SIGTERM or SIGHUP. Raises LaunchError and SettingsError; nothing is left running then."""
    begin_s = time.monotonic()
    for number in (signal.SIGTERM, signal.SIGHUP):  # until the supervisor takes over: end a download in order
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    plan = Plan.make(settings, os.environ)
    directory, name = locate_model(settings.model_dir, settings.cache_dir, Console(stderr=True))
    model = Model(directory, settings.model_name or name)
    supervisor = Supervisor(LogLines(sys.stderr))
    with supervisor.handling_signals(), contextlib.closing(supervisor), running_broker(plan, supervisor.log) as broker:
        try:
            for spec in plan.processes(os.environ, broker.url, model):
                supervisor.start(spec)
            if _wait_until_ready(supervisor, plan.address):
                rows = asyncio.run(process_rows(plan, broker, supervisor.children))
                sys.stdout.write(ready_banner(plan, model, rows, time.monotonic() - begin_s))
                sys.stdout.flush()
                supervisor.supervise(broker.keep_running)
        finally:
            _stop(supervisor, plan)


def _wait_until_ready(supervisor: Supervisor, address: Address) -> bool:
    """False when a stop was requested meanwhile. Raises ProcessFailed."""
    hint_s: float | None = time.monotonic() + _HINT_S
    while not supervisor.stop_requested:
        for child in supervisor.run_once(_READY_POLL_S):
            reason = f": {child.last_line}" if child.last_line else ""
            raise ProcessFailed(f"{child.name} {child.describe_end()} before the service was ready{reason}")
        if is_ready(address):
            return True
        if hint_s is not None and time.monotonic() > hint_s:
            hint_s = None
            supervisor.log("nibble", "still loading; the first start of a release compiles its kernels for this CPU")
    return False


def is_ready(address: Address) -> bool:
    """Whether a request sent now would be served."""
    connection = http.client.HTTPConnection(address.local_host, address.port, timeout=_READY_TIMEOUT_S)
    try:
        connection.request("GET", "/ready")
        return connection.getresponse().status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _stop(supervisor: Supervisor, plan: Plan) -> None:
    """The gateway first, so that what is running can end; then the workers, which hand back what is left."""
    supervisor.log("nibble", "stopping")
    gateways = [child for child in supervisor.children if child.name == GATEWAY]
    supervisor.stop(gateways, plan.drain_s + GATEWAY_STOP_S)
    supervisor.stop(list(supervisor.children), WORKER_STOP_S)
