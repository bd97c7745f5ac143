"""WorkerLoop over real Valkey: a synthetic engine, the real broker on both sides."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest

from nibble.engine.errors import RequestError
from nibble.engine.llm_engine import EngineStats
from nibble.engine.protocol import FinishReason, GenerationRequest, SamplingParams, TokenEvent
from nibble.service.broker.embedded import EmbeddedValkey
from nibble.service.broker.gateway_side import GatewayBroker
from nibble.service.broker.wire import WorkerInfo
from nibble.service.broker.worker_side import WorkerBroker
from nibble.service.worker.heartbeat import Heartbeat
from nibble.service.worker.loop import WorkerLoop
from nibble.service.worker.metrics import WorkerMetrics


class CountingEngine:
    """Token i of a request is prompt[0] + i; one token per request and step, a step at most every 5 ms."""

    def __init__(self) -> None:
        self.stats = EngineStats()
        self.requests: dict[str, tuple[GenerationRequest, int]] = {}
        self.started_at: dict[str, int] = {}
        self.step_s = 0.005
        self.num_adds = 0

    @property
    def has_unfinished(self) -> bool:
        return bool(self.requests)

    @property
    def capacity(self) -> int:
        return 4 - len(self.requests)

    def add(self, request: GenerationRequest, generated_token_ids: Sequence[int] = ()) -> None:
        if request.prompt_token_ids == [1]:
            raise ZeroDivisionError("a bug")
        if request.prompt_token_ids == [0]:
            raise RequestError("prompt has a zero")
        self.num_adds += 1
        self.requests[request.request_id] = (request, len(generated_token_ids))
        self.started_at[request.request_id] = len(generated_token_ids)

    def abort(self, request_id: str) -> None:
        self.requests.pop(request_id, None)

    def step(self) -> list[TokenEvent]:
        time.sleep(self.step_s)
        events = []
        for request_id, (request, index) in list(self.requests.items()):
            is_last = index + 1 == request.sampling.max_tokens
            token_id = request.prompt_token_ids[0] + index
            reason = FinishReason.LENGTH if is_last else None
            events.append(TokenEvent(request_id=request_id, index=index, token_ids=[token_id], finish_reason=reason))
            self.requests[request_id] = (request, index + 1)
            if is_last:
                del self.requests[request_id]
        return events


def make_request(request_id: str, first_token: int = 10, max_tokens: int = 5) -> GenerationRequest:
    sampling = SamplingParams(max_tokens=max_tokens)
    return GenerationRequest(
        request_id=request_id, prompt_token_ids=[first_token], sampling=sampling, arrival_s=time.time()
    )


@contextmanager
def running_worker(url: str, namespace: str, worker_id: str = "w") -> Iterator[CountingEngine]:
    engine = CountingEngine()
    info = WorkerInfo(worker_id=worker_id, model="m", device="d", state="ready", max_num_sequences=4)
    broker = WorkerBroker(url, worker_id, namespace=namespace, lease_s=2.0)
    loop = WorkerLoop(engine, broker, WorkerMetrics("m", 1e9, True), info, idle_wait_s=0.5)
    thread = threading.Thread(target=loop.run)
    thread.start()
    try:
        yield engine
    finally:
        loop.stop()
        thread.join(5)
        assert not thread.is_alive()


@pytest.fixture
async def gateway(redis_url: str, namespace: str) -> AsyncIterator[GatewayBroker]:
    broker = GatewayBroker(redis_url, "g", namespace=namespace, needs_worker=False)
    await broker.start()
    yield broker
    await broker.close()


async def collect(stream: AsyncIterator[TokenEvent]) -> tuple[list[int], TokenEvent]:
    token_ids: list[int] = []
    async for event in stream:
        token_ids += event.token_ids
    return token_ids, event


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it did not happen within 5 s")


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
