"""WorkerLoop over real Valkey: a synthetic engine, the real broker on both sides."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from counting import CountingEngine, collect, make_request, running_worker, until

from nibble.engine.protocol import FinishReason
from nibble.service.broker.embedded import EmbeddedValkey
from nibble.service.broker.gateway_side import GatewayBroker
from nibble.service.broker.wire import WorkerInfo
from nibble.service.broker.worker_side import WorkerBroker
from nibble.service.worker.heartbeat import Heartbeat
from nibble.service.worker.loop import WorkerLoop
from nibble.service.worker.metrics import WorkerMetrics


@pytest.fixture
async def gateway(redis_url: str, namespace: str) -> AsyncIterator[GatewayBroker]:
    broker = GatewayBroker(redis_url, "g", namespace=namespace, needs_worker=False)
    await broker.start()
    yield broker
    await broker.close()


async def test_requests_get_their_tokens(redis_url: str, namespace: str, gateway: GatewayBroker) -> None:
    with running_worker(redis_url, namespace):
        streams = [await gateway.submit(make_request(f"r{i}", 100 * i + 10, 3 + i)) for i in range(9)]
        for i, result in enumerate(await asyncio.gather(*map(collect, streams))):
            assert result[0] == [100 * i + 10 + k for k in range(3 + i)]
            assert result[1].finish_reason is FinishReason.LENGTH


async def test_a_request_the_engine_refuses_ends_with_its_error(
    redis_url: str, namespace: str, gateway: GatewayBroker
) -> None:
    with running_worker(redis_url, namespace):
        bad, good = await gateway.submit(make_request("bad", 0)), await gateway.submit(make_request("good"))
        token_ids, last = await collect(bad)
        assert (token_ids, last.finish_reason, last.error) == ([], FinishReason.ERROR, "prompt has a zero")
        assert len((await collect(good))[0]) == 5


async def test_an_abort_reaches_the_engine_while_it_works(
    redis_url: str, namespace: str, gateway: GatewayBroker
) -> None:
    with running_worker(redis_url, namespace) as engine:
        stream = await gateway.submit(make_request("r", max_tokens=100_000))
        await anext(aiter(stream))
        await gateway.abort("r")
        await until(lambda: not engine.requests)


async def test_a_step_longer_than_the_lease_does_not_lose_it(
    redis_url: str, namespace: str, gateway: GatewayBroker
) -> None:
    info = WorkerInfo(worker_id="other", model="m", device="d", state="ready", max_num_sequences=4)
    other = WorkerBroker(redis_url, "other", namespace=namespace)
    with running_worker(redis_url, namespace) as engine:
        engine.step_s = 3.0
        stream = await gateway.submit(make_request("r", max_tokens=2))
        await asyncio.sleep(2.6)
        other.exchange([], 0, info)  # takes expired leases away
        token_ids, last = await collect(stream)
        assert (token_ids, last.finish_reason) == ([10, 11], FinishReason.LENGTH)
        assert engine.num_adds == 1


async def test_the_lease_of_a_worker_that_hangs_is_not_renewed_for_ever(redis_url: str, namespace: str) -> None:
    info = WorkerInfo(worker_id="w", model="m", device="d", state="ready", max_num_sequences=4)
    hanging, other = (WorkerBroker(redis_url, name, namespace=namespace, lease_s=0.3) for name in ("w", "other"))
    hanging.exchange([], 1, info)
    heartbeat = Heartbeat(hanging, interval_s=0.1, max_step_s=0.8)
    heartbeat.start()
    await asyncio.sleep(0.6)
    other.exchange([], 1, info)  # takes expired leases away
    assert hanging.renew()
    await asyncio.sleep(0.8)
    other.exchange([], 1, info)
    heartbeat.stop()
    assert not hanging.renew()


async def test_a_stopped_worker_hands_its_requests_to_the_next(
    redis_url: str, namespace: str, gateway: GatewayBroker
) -> None:
    with running_worker(redis_url, namespace, "first"):
        stream = aiter(await gateway.submit(make_request("r", max_tokens=200)))
        events = [await anext(stream)]
    with running_worker(redis_url, namespace, "second") as second:
        events += [event async for event in stream]
        assert second.started_at["r"] > 0
    assert [token for event in events for token in event.token_ids] == [10 + i for i in range(200)]


async def test_events_are_kept_while_the_broker_is_away(
    tmp_path_factory: pytest.TempPathFactory, caplog: pytest.LogCaptureFixture
) -> None:
    """The server is stopped mid-stream and comes back with its data: the stream goes on, nothing is lost."""
    with EmbeddedValkey(tmp_path_factory.mktemp("away"), append_only=True) as server:
        gateway = GatewayBroker(server.url, "g", needs_worker=False)
        await gateway.start()
        with running_worker(server.url, "nibble") as engine:
            stream = aiter(await gateway.submit(make_request("r", max_tokens=300)))
            events = [await anext(stream)]
            server.stop()
            await until(lambda: "broker_unavailable" in caplog.text)
            server.start()
            events += [event async for event in stream]
            assert engine.started_at["r"] == 0
        await gateway.close()
    assert [token for event in events for token in event.token_ids] == [10 + i for i in range(300)]


async def test_a_request_that_breaks_every_worker_is_given_up(
    redis_url: str, namespace: str, gateway: GatewayBroker
) -> None:
    stream = await gateway.submit(make_request("poison", 1))
    for _ in range(3):
        broker = WorkerBroker(redis_url, "w", namespace=namespace)  # the supervisor restarts it under the same id
        info = WorkerInfo(worker_id="w", model="m", device="d", state="ready", max_num_sequences=4)
        loop = WorkerLoop(CountingEngine(), broker, WorkerMetrics("m", 1e9, False), info, idle_wait_s=0.5)
        with pytest.raises(ZeroDivisionError):
            await asyncio.to_thread(loop.run)
    with running_worker(redis_url, namespace):
        token_ids, last = await collect(stream)
    assert (token_ids, last.finish_reason) == ([], FinishReason.ERROR)
    assert last.error is not None
    assert "worker" in last.error
