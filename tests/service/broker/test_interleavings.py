"""Random interleavings of everything that can happen, against a real server. Each seed is one reproducible story.

Several workers and gateways serve synthetic requests, while calls and replies get lost, leases expire under workers
that go on (zombies), workers die, leave and come back, gateways lose their subscriptions, clients attach and abort, and
the server forgets everything. In the end every request must have ended exactly once, in every stream, with exactly
the tokens of the synthetic model; and all keys must agree with each other at any time.
"""

from __future__ import annotations

import asyncio
import collections
import random

import pytest
import redis
from synthetic import SyntheticWorker, check_integrity, logprobs_of, make_request, prompt_logprobs_of, tokens_of

from nibble.engine.protocol import FinishReason, TokenEvent
from nibble.service.broker.errors import BrokerUnavailable, UnknownRequest
from nibble.service.broker.gateway_side import GatewayBroker
from nibble.service.broker.keys import Keys
from nibble.service.broker.token_stream import TokenStream

NUM_ACTIONS = 250
MAX_ATTEMPTS = 4

# How often each action is chosen, relative to the others.
WEIGHTS = {
    "submit": 12,
    "step": 60,
    "attach": 8,
    "abort": 3,
    "lease_expires": 2,
    "worker_dies": 1,
    "worker_leaves": 1,
    "renew": 1,
    "deadline_passes": 1,
    "subscriptions_break": 1,
    "time_passes": 4,
}


class Listener:
    """Reads a stream to its end and checks each event as it comes."""

    def __init__(self, stream: TokenStream, from_index: int) -> None:
        self.stream = stream
        self.next_index = from_index
        self.final: TokenEvent | None = None
        self.task = asyncio.create_task(self._listen())

    async def _listen(self) -> None:
        async for event in self.stream:
            assert self.final is None, "an event after the final one"
            if event.finish_reason is not None and not event.token_ids:
                assert event.index <= self.next_index  # it was attached from beyond the end
            else:
                assert event.index == self.next_index, "a gap or a repeat"
            self.next_index = event.index + len(event.token_ids)
            assert event.token_ids == tokens_of(event.request_id, event.index, self.next_index)
            assert event.logprobs == logprobs_of(event.request_id, event.index, self.next_index)
            if event.token_ids:
                assert event.prompt_logprobs == prompt_logprobs_of(event.request_id, event.index)
            if event.finish_reason is not None:
                self.final = event


class Deployment:
    """Two gateways, three workers, and the actions that a story is made of."""

    def __init__(self, url: str, namespace: str, client: redis.Redis, rng: random.Random) -> None:
        self.url = url
        self.namespace = namespace
        self.client = client
        self.random = rng
        self.keys = Keys(namespace)
        self.lengths: dict[str, int] = {}
        self.aborted: set[str] = set()
        self.expired: set[str] = set()
        self.has_forgotten = False
        self.listeners: list[Listener] = []
        self.gateways: list[GatewayBroker] = []
        self.workers: list[SyntheticWorker] = []
        self.dead: list[SyntheticWorker] = []
        self.num_workers_made = 0
        self.num_seen: collections.Counter[str] = collections.Counter()

    async def start(self) -> None:
        for number in range(2):
            gateway = GatewayBroker(
                self.url,
                f"gateway-{number}",
                namespace=self.namespace,
                needs_worker=False,
                no_worker_timeout_s=None,
                silence_s=0.05,
                max_attempts=MAX_ATTEMPTS,
            )
            self.gateways.append(gateway)
            await gateway.start()
        for _ in range(3):
            self.add_worker()

    def add_worker(self, worker_id: str | None = None) -> None:
        self.num_workers_made += 1
        name = worker_id or f"worker-{self.num_workers_made}"
        self.workers.append(SyntheticWorker(self.url, name, self.namespace))

    def any_request(self) -> str:
        """One of the last few: older ones have mostly ended."""
        return self.random.choice(list(self.lengths)[-8:])

    async def act(self) -> None:
        (name,) = self.random.choices(list(WEIGHTS), WEIGHTS.values())
        if self.lengths or name == "submit":
            self.num_seen[name] += 1
            await getattr(self, name)()

    async def submit(self) -> None:
        request_id = f"request-{len(self.lengths)}"
        self.lengths[request_id] = self.random.randint(1, 25)
        request = make_request(
            request_id, self.lengths[request_id], priority=self.random.randint(-1, 1), deadline_s=4e9
        )
        stream = await self.random.choice(self.gateways).submit(request)
        self.listeners.append(Listener(stream, 0))

    async def step(self) -> None:
        worker = self.random.choice(self.workers)
        worker.generate(
            [name for name in sorted(worker.running) if self.random.random() < 0.7], self.random.randint(1, 3)
        )
        lost = self.random.choices([None, "call", "reply"], [8, 1, 1])[0]
        worker.link.lose_next = lost
        try:
            worker.exchange(self.random.randint(0, 3), self.random.choice([None, *sorted(worker.running)]))
            assert lost is None
        except BrokerUnavailable:
            assert lost is not None
            self.num_seen[f"lost {lost}"] += 1

    async def attach(self) -> None:
        request_id, from_index = self.any_request(), self.random.choice([0, 0, 1, 7, 30])
        try:
            stream = await self.random.choice(self.gateways).attach(request_id, from_index)
        except UnknownRequest:
            assert self.has_forgotten
        else:
            self.listeners.append(Listener(stream, from_index))

    async def abort(self) -> None:
        request_id = self.any_request()
        self.aborted.add(request_id)
        await self.random.choice(self.gateways).abort(request_id)

    async def lease_expires(self) -> None:
        """The worker does not know: it is dead for all others, and a zombie when it steps again."""
        self.client.zadd(self.keys.leases, {self.random.choice(self.workers).name: 1}, xx=True)

    async def worker_dies(self) -> None:
        """For good. Its lease may run on; a successor of the same name need not wait for its end."""
        worker = self.workers.pop(self.random.randrange(len(self.workers)))
        self.dead.append(worker)
        self.add_worker(self.random.choice([None, worker.info.worker_id]))

    async def worker_leaves(self) -> None:
        worker = self.workers.pop(self.random.randrange(len(self.workers)))
        worker.broker.close()
        self.add_worker()

    async def renew(self) -> None:
        self.random.choice(self.workers).broker.renew()

    async def deadline_passes(self) -> None:
        request_id = self.any_request()
        self.expired.add(request_id)
        self.client.zadd(self.keys.deadlines, {request_id: 1}, xx=True)

    async def subscriptions_break(self) -> None:
        for entry in self.client.client_list(_type="pubsub"):
            self.client.client_kill_filter(_id=entry["id"])

    async def time_passes(self) -> None:
        await asyncio.sleep(0.01)

    async def server_forgets_everything(self) -> None:
        self.has_forgotten = True
        keys = list(self.client.scan_iter(f"{self.keys.root}*", count=1000))
        if keys:
            self.client.delete(*keys)

    async def check(self) -> None:
        await asyncio.sleep(0)
        check_integrity(self.client, self.namespace)
        for listener in self.listeners:
            if listener.task.done():
                listener.task.result()

    async def finish(self) -> None:
        """All live workers go on until each stream has ended; the leases of the dead run out."""
        for worker in self.dead:
            self.client.zadd(self.keys.leases, {worker.name: 1}, xx=True)
        async with asyncio.timeout(20):
            while not all(listener.task.done() for listener in self.listeners):
                for worker in self.workers:
                    worker.step(num_tokens=2)
                await asyncio.sleep(0.001)
        for listener in self.listeners:
            listener.task.result()
            self.check_end(listener)
        while any(worker.running or worker.events for worker in self.workers):  # requests that nobody listens to
            for worker in self.workers:
                worker.step()
        check_integrity(self.client, self.namespace)
        assert (self.client.zcard(self.keys.queue), self.client.zcard(self.keys.suspects)) == (0, 0)

    def check_end(self, listener: Listener) -> None:
        request_id, final = listener.stream.request_id, listener.final
        assert final is not None, "ended in silence"
        if final.finish_reason is FinishReason.LENGTH:
            assert listener.next_index == self.lengths[request_id]
            self.num_seen["served"] += 1
        elif final.finish_reason is FinishReason.ABORT:
            assert request_id in self.aborted
        elif "deadline" in (final.error or ""):
            assert request_id in self.expired
        else:
            assert "given up" in (final.error or "")
            self.num_seen["given up"] += 1

    async def close(self) -> None:
        for listener in self.listeners:
            listener.task.cancel()
        await asyncio.gather(*(listener.task for listener in self.listeners), return_exceptions=True)
        for gateway in self.gateways:
            await gateway.close()
        for worker in self.workers + self.dead:
            worker.broker.close()


async def tell(deployment: Deployment, forget_every: int | None) -> None:
    await deployment.start()
    try:
        for number in range(NUM_ACTIONS):
            await deployment.act()
            if forget_every is not None and number % forget_every == forget_every - 1:
                await deployment.server_forgets_everything()
            await deployment.check()
        await deployment.finish()
    finally:
        await deployment.close()


@pytest.mark.parametrize("seed", range(10))
async def test_every_request_ends_once_with_exactly_its_tokens(redis_url, namespace, redis_client, seed):
    deployment = Deployment(redis_url, namespace, redis_client, random.Random(seed))
    await tell(deployment, forget_every=None)
    assert deployment.num_seen["served"] >= 5


@pytest.mark.parametrize("seed", range(5))
async def test_every_request_ends_once_though_the_server_forgets(redis_url, namespace, redis_client, seed):
    deployment = Deployment(redis_url, namespace, redis_client, random.Random(1000 + seed))
    await tell(deployment, forget_every=60)
    assert deployment.num_seen["served"] >= 5
