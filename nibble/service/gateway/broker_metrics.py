"""What a gateway exports of the broker: one look at every scrape, so that no exporter has to run beside Redis.

All of it is the deployment's, and every gateway says the same: take the largest over gateways, not the sum.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from typing import get_args

from prometheus_client.core import Metric

from nibble.service.broker.errors import BrokerError
from nibble.service.broker.gateway_side import GatewayBroker
from nibble.service.broker.wire import BrokerStatus, ServerStatus, WorkerState
from nibble.service.metrics import Families


class BrokerMetrics:
    """As of the last `refresh`."""

    def __init__(self) -> None:
        self._status: BrokerStatus | None = None  # the broker cannot be reached
        self._server: ServerStatus | None = None  # nor has it to say this
        self._num_restored = 0

    async def refresh(self, broker: GatewayBroker) -> None:
        """Ask. Takes as long as one call may at most, and does not raise."""
        status, server = await asyncio.gather(broker.status(), broker.server_status(), return_exceptions=True)
        for result in (status, server):
            if isinstance(result, BaseException) and not isinstance(result, BrokerError):
                raise result
        self._status = None if isinstance(status, BaseException) else status
        self._server = None if isinstance(server, BaseException) else server
        self._num_restored = broker.num_restored

    def collect(self, new: Families) -> Iterator[Metric]:
        text = "Whether the broker answered this scrape."
        yield from new.gauge("nibble_broker_up", text, int(self._status is not None))
        text = "Requests that this gateway gave back to a Redis that had lost them."
        yield from new.counter("nibble_restored_requests_total", text, self._num_restored)
        if self._status is not None:
            yield from _queue(new, self._status)
        if self._server is not None:
            yield from _redis(new, self._server)


def _queue(new: Families, status: BrokerStatus) -> Iterator[Metric]:
    yield from new.gauge("nibble_queued_requests", "Requests that wait for a worker.", status.num_queued)
    yield from new.gauge("nibble_leased_requests", "Requests that a worker has.", status.num_running)
    text = "How long the request that is served next has been waiting."
    yield from new.gauge("nibble_queue_age_seconds", text, status.queue_age_s)
    counts = Counter(worker.state for worker in status.workers)
    states = {(state,): float(counts[state]) for state in get_args(WorkerState)}
    yield from new.gauge_by(("state",), "nibble_workers", "Workers with a live heartbeat.", states.items())


def _redis(new: Families, server: ServerStatus) -> Iterator[Metric]:
    yield from new.gauge("nibble_redis_memory_used_bytes", "Memory that Redis uses.", server.memory_used_bytes)
    if server.memory_limit_bytes:
        text = "maxmemory of Redis; where none is set, the memory of its machine."
        yield from new.gauge("nibble_redis_memory_limit_bytes", text, server.memory_limit_bytes)
    yield from new.gauge("nibble_redis_clients", "Connections to Redis.", server.num_clients)
    yield from new.counter("nibble_redis_commands_total", "Commands that Redis processed.", server.num_commands)
    text = "Keys that Redis evicted: requests are lost, it must be set to evict none."
    yield from new.counter("nibble_redis_evicted_keys_total", text, server.num_evicted_keys)
