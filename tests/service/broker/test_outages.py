"""Redis away, back, and back without its memory; subscriptions and messages lost."""

import asyncio
import time
from pathlib import Path

import pytest
import redis
from synthetic import SyntheticWorker, check_integrity, make_request, tokens_of, until

from nibble.engine.protocol import FinishReason
from nibble.service.broker.embedded import EmbeddedValkey
from nibble.service.broker.errors import BrokerUnavailable
from nibble.service.broker.gateway_side import GatewayBroker
from nibble.service.broker.keys import Keys


async def collect(stream):
    return [event async for event in stream]


def tokens(events):
    return [token_id for event in events for token_id in event.token_ids]


@pytest.fixture(params=["empty", "append_only"])
def crashing(request, tmp_path: Path):
    """A server of the test's own, to be killed and started; with and without its memory."""
    with EmbeddedValkey(tmp_path, append_only=request.param == "append_only") as server:
        yield server


@pytest.fixture
def forgetful(tmp_path: Path):
    """A server that comes back empty."""
    with EmbeddedValkey(tmp_path) as server:
        yield server


async def start_gateway(server: EmbeddedValkey, gateway_id: str = "gateway", **options) -> GatewayBroker:
    gateway = GatewayBroker(server.url, gateway_id, **({"needs_worker": False, "silence_s": 0.1} | options))
    await gateway.start()
    return gateway


async def step_until_idle(worker: SyntheticWorker) -> None:
    async with asyncio.timeout(10):
        while True:
            try:
                worker.step()
            except BrokerUnavailable:
                await asyncio.sleep(0.02)
                continue
            if not worker.running and not worker.events:
                return
            await asyncio.sleep(0.002)


async def test_streams_survive_a_server_crash(crashing: EmbeddedValkey):
    gateway = await start_gateway(crashing)
    worker = SyntheticWorker(crashing.url, "worker", "nibble")
    streams = [await gateway.submit(make_request(f"request-{number}", max_tokens=30)) for number in range(4)]
    worker.exchange(capacity=2)
    for _ in range(5):
        worker.step(capacity=0)
    await until(lambda: len(streams[0].log.token_ids) == 5)
    crashing.kill()
    worker.generate()
    with pytest.raises(BrokerUnavailable):
        worker.exchange()
    crashing.start()
    with redis.Redis.from_url(crashing.url) as client:
        await until(lambda: client.exists(Keys("nibble").state("request-3")) == 1)
        while not all(stream.is_complete for stream in streams):
            await step_until_idle(worker)
            await asyncio.sleep(0.01)
        for number, stream in enumerate(streams):
            events = await collect(stream)
            assert tokens(events) == tokens_of(f"request-{number}", 0, 30)
            assert events[-1].finish_reason is FinishReason.LENGTH
        check_integrity(client, "nibble")
    worker.broker.close()
    await gateway.close()


async def test_restored_request_fences_the_worker_that_still_runs_it(forgetful: EmbeddedValkey):
    gateway = await start_gateway(forgetful)
    before = SyntheticWorker(forgetful.url, "before", "nibble")
    stream = await gateway.submit(make_request("request", max_tokens=20))
    before.exchange()
    before.step(num_tokens=3)
    await until(lambda: len(stream.log.token_ids) == 3)
    forgetful.kill()
    forgetful.start()
    after = SyntheticWorker(forgetful.url, "after", "nibble")
    with redis.Redis.from_url(forgetful.url) as client:
        await until(lambda: client.exists(Keys("nibble").state("request")) == 1)
    (assignment,) = after.exchange().assignments
    assert assignment.attempt > 1
    assert assignment.generated_token_ids == tokens_of("request", 0, 3)
    before.generate(num_tokens=4)
    exchange = before.exchange(capacity=0)
    assert exchange.num_fenced == 1
    assert exchange.dropped == ["request"]
    after.run_until_idle()
    assert tokens(await collect(stream)) == tokens_of("request", 0, 20)
    for worker in (before, after):
        worker.broker.close()
    await gateway.close()


async def test_two_gateways_restore_a_request_once_with_the_longer_log(forgetful: EmbeddedValkey):
    first, second = await start_gateway(forgetful, "first"), await start_gateway(forgetful, "second")
    worker = SyntheticWorker(forgetful.url, "worker", "nibble")
    stream = await first.submit(make_request("request", max_tokens=20))
    worker.exchange()
    worker.step(num_tokens=3)
    attached = await second.attach("request")
    worker.step(num_tokens=2)
    await until(lambda: len(stream.log.token_ids) == len(attached.log.token_ids) == 5)
    attached.log.token_ids = attached.log.token_ids[:3]  # as if its last message had been lost
    forgetful.kill()
    forgetful.start()
    with redis.Redis.from_url(forgetful.url) as client:
        keys = Keys("nibble")
        await until(lambda: b"," in (client.hget(keys.state("request"), "gateways") or b""))
        assert client.strlen(keys.tokens("request")) == 20
    await step_until_idle(worker)
    await until(lambda: stream.is_complete and attached.is_complete)
    assert tokens(await collect(stream)) == tokens_of("request", 0, 20)
    assert attached.log.token_ids == tokens_of("request", 0, 20)
    worker.broker.close()
    for gateway in (first, second):
        await gateway.close()


async def test_unreachable_server_fails_a_submit_quickly_and_ends_streams_in_time(tmp_path: Path):
    with EmbeddedValkey(tmp_path) as server:
        gateway = await start_gateway(server, give_up_s=0.3)
        stream = await gateway.submit(make_request("request"))
        server.kill()
        started = time.monotonic()
        with pytest.raises(BrokerUnavailable):
            await gateway.submit(make_request("another"))
        with pytest.raises(BrokerUnavailable):
            await gateway.status()
        with pytest.raises(BrokerUnavailable):
            await gateway.attach("request")
        await gateway.abort("nothing")
        assert time.monotonic() - started < 2
        (event,) = await asyncio.wait_for(collect(stream), 3)
        assert event.finish_reason is FinishReason.ERROR
        assert "not reachable" in (event.error or "")
        server.start()
        await until(lambda: not gateway._checker.pending_aborts)
        await gateway.submit(make_request("another"))
        await gateway.close()


async def test_hanging_server_fails_a_submit_within_two_seconds(tmp_path: Path):
    import os
    import signal

    with EmbeddedValkey(tmp_path) as server:
        gateway = await start_gateway(server)
        os.kill(server.pid, signal.SIGSTOP)
        try:
            started = time.monotonic()
            with pytest.raises(BrokerUnavailable):
                await gateway.submit(make_request("request"))
            assert time.monotonic() - started < 2.5
        finally:
            os.kill(server.pid, signal.SIGCONT)
        # Its submit was read from the socket after all; it does not stay.
        with redis.Redis.from_url(server.url) as client:
            await until(lambda: not gateway._checker.pending_aborts)
            assert client.zcard(Keys("nibble").queue) == 0
        await gateway.close()


async def test_gateway_starts_before_its_server(tmp_path: Path):
    server = EmbeddedValkey(tmp_path)
    server.start()
    server.stop()
    gateway = await start_gateway(server)
    with pytest.raises(BrokerUnavailable):
        await gateway.status()
    with server:
        await until(gateway._is_subscribed.is_set)
        assert (await gateway.status()).num_queued == 0
        await gateway.close()


async def test_lost_messages_are_read_from_the_log(make_gateway, make_worker, monkeypatch):
    gateway, worker = await make_gateway(silence_s=60), make_worker()
    stream = await gateway.submit(make_request("request", max_tokens=10))
    worker.exchange()
    worker.step()
    await until(lambda: len(stream.log.token_ids) == 1)
    dispatch = gateway._streams.dispatch
    monkeypatch.setattr(gateway._streams, "dispatch", lambda message: True)
    worker.step()
    worker.step()
    await asyncio.sleep(0.05)
    monkeypatch.setattr(gateway._streams, "dispatch", dispatch)
    worker.step()  # shows the gap
    await until(lambda: len(stream.log.token_ids) == 4)
    worker.run_until_idle()
    assert tokens(await collect(stream)) == tokens_of("request", 0, 10)


async def test_lost_final_message_is_noticed_by_silence(make_gateway, make_worker, monkeypatch):
    gateway, worker = await make_gateway(silence_s=0.1), make_worker()
    streams = [await gateway.submit(make_request(f"request-{number}")) for number in range(3)]
    monkeypatch.setattr(gateway._streams, "dispatch", lambda message: True)
    worker.run_until_idle()
    for number, stream in enumerate(streams):
        assert tokens(await collect(stream)) == tokens_of(f"request-{number}", 0, 4)


async def test_silent_streams_are_read_in_one_call(make_gateway, make_worker, monkeypatch):
    gateway, worker = await make_gateway(silence_s=60), make_worker()
    for number in range(50):
        await gateway.submit(make_request(f"request-{number}"))
    calls = []
    read = gateway._calls.read

    async def counted(indexes, with_request):
        calls.append(len(indexes))
        return await read(indexes, with_request)

    monkeypatch.setattr(gateway._calls, "read", counted)
    gateway._streams.mark_all_silent()
    gateway._checker.check_soon()
    await until(lambda: bool(calls))
    assert calls == [50]
    worker.exchange()


async def test_broken_subscription_is_renewed_and_nothing_is_missed(make_gateway, make_worker, redis_client, keys):
    gateway, worker = await make_gateway(silence_s=60), make_worker()
    stream = await gateway.submit(make_request("request", max_tokens=10))
    worker.exchange()
    worker.step()
    channel = keys.events("gateway")
    assert redis_client.pubsub_numsub(channel)[0][1] == 1
    redis_client.client_kill_filter(_type="pubsub")
    worker.step(num_tokens=9)
    assert tokens(await asyncio.wait_for(collect(stream), 5)) == tokens_of("request", 0, 10)
    assert redis_client.pubsub_numsub(channel)[0][1] == 1
