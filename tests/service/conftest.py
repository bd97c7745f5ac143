"""A real Valkey for all service tests. Each test has a namespace of its own, so nothing is shared but the server."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import pytest
import redis

from nibble.service.broker.embedded import EmbeddedValkey


@pytest.fixture(scope="session")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedValkey]:
    with EmbeddedValkey(tmp_path_factory.mktemp("valkey")) as server:
        yield server


@pytest.fixture
def redis_url(valkey: EmbeddedValkey) -> str:
    return valkey.url


@pytest.fixture
def redis_client(redis_url: str) -> Iterator[redis.Redis]:
    client = redis.Redis.from_url(redis_url)
    yield client
    client.close()


@pytest.fixture
def namespace(redis_client: redis.Redis) -> Iterator[str]:
    name = f"test-{secrets.token_hex(4)}"
    yield name
    keys = list(redis_client.scan_iter(f"{{{name}}}*", count=1000))
    if keys:
        redis_client.delete(*keys)
