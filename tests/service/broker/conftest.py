"""Workers, gateways and keys of one test's namespace. `server_url` runs a test on each server there is."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from synthetic import SyntheticWorker, check_integrity

from nibble.service.broker.embedded import EmbeddedValkey
from nibble.service.broker.gateway_side import GatewayBroker
from nibble.service.broker.keys import Keys


@pytest.fixture
def keys(namespace: str) -> Keys:
    return Keys(namespace)


@pytest.fixture
def make_worker(redis_url: str, namespace: str, redis_client: redis.Redis) -> Iterator[Callable[..., SyntheticWorker]]:
    """Also checks the integrity of all keys at the end of the test."""
    workers = []

    def make(worker_id: str = "worker", **options: Any) -> SyntheticWorker:
        worker = SyntheticWorker(redis_url, worker_id, namespace, **options)
        workers.append(worker)
        return worker

    yield make
    check_integrity(redis_client, namespace)
    for worker in workers:
        worker.broker.close()
    check_integrity(redis_client, namespace)


@pytest.fixture
async def make_gateway(redis_url: str, namespace: str) -> AsyncIterator[Callable[..., Awaitable[GatewayBroker]]]:
    gateways = []

    async def make(gateway_id: str = "gateway", **options: Any) -> GatewayBroker:
        options = {"needs_worker": False, "silence_s": 0.1} | options
        gateway = GatewayBroker(redis_url, gateway_id, namespace=namespace, **options)
        gateways.append(gateway)
        await gateway.start()
        return gateway

    yield make
    for gateway in gateways:
        await gateway.close()


@pytest.fixture(scope="session", params=["valkey", "redis-server"])
def server_url(
    request: pytest.FixtureRequest, valkey: EmbeddedValkey, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """Happy paths run on the bundled Valkey and, where it is installed, on Redis."""
    if request.param == "valkey":
        yield valkey.url
        return
    binary = shutil.which(request.param)
    if binary is None:
        pytest.skip(f"{request.param} is not installed")
    with EmbeddedValkey(tmp_path_factory.mktemp("redis"), binary=Path(binary)) as server:
        yield server.url
