"""Random interleavings of everything that can happen, against a real server.

Several workers and gateways serve synthetic requests, while calls and replies get lost, leases expire under workers
that go on (zombies), workers die, leave and come back, gateways lose their subscriptions, clients attach and abort, and
the server forgets everything. In the end every request must have ended exactly once, in every stream, with exactly
the tokens of the synthetic model; and all keys must agree with each other at any time.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
from typing import ClassVar

import pytest
import redis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)
from synthetic import SyntheticWorker, check_integrity, make_request, tokens_of

from nibble.engine.protocol import FinishReason, TokenEvent
from nibble.service.broker.errors import BrokerUnavailable, UnknownRequest
from nibble.service.broker.gateway_side import GatewayBroker
from nibble.service.broker.keys import Keys
from nibble.service.broker.token_stream import TokenStream

MAX_ATTEMPTS = 3
LOSSES = st.sampled_from([None, None, None, "call", "reply"])


class Listener:
    """Reads a stream to its end and checks each event as it comes."""

    def __init__(self, stream: TokenStream, from_index: int) -> None:
        self.stream = stream
        self.next_index = from_index
        self.final: TokenEvent | None = None
        self.task = asyncio.ensure_future(self._listen())

    async def _listen(self) -> None:
        async for event in self.stream:
            assert self.final is None, "an event after the final one"
            if event.finish_reason is not None and not event.token_ids:
                assert event.index <= self.next_index  # it was attached from beyond the end
            else:
                assert event.index == self.next_index, "a gap or a repeat"
            self.next_index = event.index + len(event.token_ids)
            assert event.token_ids == tokens_of(event.request_id, event.index, self.next_index)
            if event.finish_reason is not None:
                self.final = event


class Deployment(RuleBasedStateMachine):
    url: ClassVar[str]
    can_forget: ClassVar[bool]

    workers: Bundle[SyntheticWorker] = Bundle("workers")
    gateways: Bundle[GatewayBroker] = Bundle("gateways")
    requests: Bundle[str] = Bundle("requests")

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.namespace = f"test-{secrets.token_hex(4)}"
        self.keys = Keys(self.namespace)
        self.client = redis.Redis.from_url(self.url)
        self.numbers = itertools.count()
        self.lengths: dict[str, int] = {}
        self.aborted: set[str] = set()
        self.expired: set[str] = set()
        self.listeners: list[Listener] = []
        self.all_gateways: list[GatewayBroker] = []
        self.all_workers: list[SyntheticWorker] = []
        self.dead: list[SyntheticWorker] = []
        self.num_crashes = 0

    def make_worker(self, worker_id: str) -> SyntheticWorker:
        worker = SyntheticWorker(self.url, worker_id, self.namespace)
        self.all_workers.append(worker)
        return worker

    async def make_gateway(self, gateway_id: str) -> GatewayBroker:
        gateway = GatewayBroker(
            self.url,
            gateway_id,
            namespace=self.namespace,
            needs_worker=False,
            no_worker_timeout_s=None,
            silence_s=0.02,
            max_attempts=MAX_ATTEMPTS,
        )
        await gateway.start()
        self.all_gateways.append(gateway)
        return gateway

    @initialize(target=gateways)
    def start_gateways(self):
        return multiple(*(self.loop.run_until_complete(self.make_gateway(f"gateway-{n}")) for n in range(2)))

    @initialize(target=workers)
    def start_workers(self):
        return multiple(*(self.make_worker(f"worker-{n}") for n in range(3)))

    @rule(target=requests, gateway=gateways, length=st.integers(1, 12), priority=st.integers(-1, 1))
    def submit(self, gateway, length, priority):
        request_id = f"request-{next(self.numbers)}"
        self.lengths[request_id] = length
        request = make_request(request_id, max_tokens=length, priority=priority, deadline_s=4e9)
        stream = self.loop.run_until_complete(gateway.submit(request))
        self.listen(stream, 0)
        return request_id

    def listen(self, stream, from_index):
        async def start():
            self.listeners.append(Listener(stream, from_index))

        self.loop.run_until_complete(start())

    @rule(worker=workers, data=st.data(), num_tokens=st.integers(1, 4), capacity=st.integers(0, 3), lost=LOSSES)
    def step(self, worker, data, num_tokens, capacity, lost):
        if worker.running:
            worker.generate(data.draw(st.sets(st.sampled_from(sorted(worker.running)))), num_tokens)
        worker.link.lose_next = lost
        if lost:
            with pytest.raises(BrokerUnavailable):
                worker.exchange(capacity)
        else:
            worker.exchange(capacity)

    @rule(worker=workers)
    def lease_expires(self, worker):
        """The worker does not know: it is dead for all others, and a zombie if it steps again."""
        self.num_crashes += 1
        self.client.zadd(self.keys.leases, {worker.name: 1}, xx=True)

    @rule(target=workers, worker=consumes(workers), same_name=st.booleans())
    def worker_dies(self, worker, same_name):
        """For good. Its lease runs on; a successor of the same name need not wait for its end."""
        self.num_crashes += 1
        self.dead.append(worker)
        return self.make_worker(worker.info.worker_id if same_name else f"worker-{next(self.numbers)}")

    @rule(target=workers, worker=consumes(workers))
    def worker_leaves(self, worker):
        worker.broker.close()
        return self.make_worker(worker.info.worker_id)

    @rule(gateway=gateways, request=requests, from_index=st.integers(0, 14))
    def attach(self, gateway, request, from_index):
        try:
            stream = self.loop.run_until_complete(gateway.attach(request, from_index))
        except UnknownRequest:
            assert self.can_forget
            return
        self.listen(stream, from_index)

    @rule(gateway=gateways, request=requests)
    def abort(self, gateway, request):
        self.aborted.add(request)
        self.loop.run_until_complete(gateway.abort(request))

    @rule(request=requests)
    def deadline_passes(self, request):
        if self.client.zadd(self.keys.deadlines, {request: 1}, xx=True, ch=True):
            self.expired.add(request)

    @rule(worker=workers)
    def renew(self, worker):
        worker.broker.renew()

    @rule()
    def subscriptions_break(self):
        self.client.client_kill_filter(_type="pubsub")

    @rule()
    def time_passes(self):
        self.loop.run_until_complete(asyncio.sleep(0.005))

    @rule()
    def server_forgets_everything(self):
        if self.can_forget:
            for key in self.client.scan_iter(f"{self.keys.root}*", count=1000):
                self.client.delete(key)

    @invariant()
    def keys_agree(self):
        check_integrity(self.client, self.namespace)
        for listener in self.listeners:
            if listener.task.done():
                listener.task.result()

    def teardown(self):
        try:
            self.loop.run_until_complete(self.finish())
        finally:
            self.loop.run_until_complete(self.close())
            self.loop.close()
            self.client.close()

    async def finish(self):
        """All live workers go on until each stream has ended; the leases of the dead run out."""
        workers = [worker for worker in self.all_workers if worker.link.is_open and worker not in self.dead]
        for worker in self.dead:
            self.client.zadd(self.keys.leases, {worker.name: 1}, xx=True)
        async with asyncio.timeout(20):
            while not all(listener.task.done() for listener in self.listeners):
                for worker in workers:
                    worker.step(num_tokens=2)
                await asyncio.sleep(0.001)
        for listener in self.listeners:
            listener.task.result()
            self.check_end(listener)
        for _ in range(3):
            for worker in workers:
                worker.step()
        check_integrity(self.client, self.namespace)
        assert (self.client.zcard(self.keys.queue), self.client.zcard(self.keys.suspects)) == (0, 0)

    def check_end(self, listener):
        request_id, final = listener.stream.request_id, listener.final
        assert final is not None, "ended in silence"
        if final.finish_reason is FinishReason.LENGTH:
            assert listener.next_index == self.lengths[request_id]
        elif final.finish_reason is FinishReason.ABORT:
            assert request_id in self.aborted
        elif "deadline" in (final.error or ""):
            assert request_id in self.expired
        else:
            assert "given up" in (final.error or "")
            assert self.num_crashes >= MAX_ATTEMPTS

    async def close(self):
        for listener in self.listeners:
            listener.task.cancel()
        await asyncio.gather(*(listener.task for listener in self.listeners), return_exceptions=True)
        for gateway in self.all_gateways:
            await gateway.close()
        for worker in self.all_workers:
            if worker.link.is_open:
                worker.broker.close()
        for key in self.client.scan_iter(f"{self.keys.root}*", count=1000):
            self.client.delete(key)


@pytest.mark.parametrize("can_forget", [False, True])
def test_every_request_ends_once_with_exactly_its_tokens(redis_url, can_forget):
    machine = type("BoundDeployment", (Deployment,), {"url": redis_url, "can_forget": can_forget})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=30,
            stateful_step_count=40,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
