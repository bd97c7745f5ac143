"""Thousands of requests through a gateway, the broker and a worker: none of them leaves anything behind.

The real application (called in process, without sockets), a real Valkey, the real worker loop over a synthetic engine.
Answers end by length, at a stop string, with an error, or because the client left; whole and streamed; each has a user,
a request id and a cache salt of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import sys
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import orjson
import redis
from conftest import wait_for
from prometheus_client import generate_latest
from starlette.types import ASGIApp, Message

from nibble.engine.errors import RequestError
from nibble.engine.protocol import FinishReason, GenerationRequest, RequestMetrics, TokenEvent
from nibble.engine.stats import EngineStats
from nibble.service.broker.wire import WorkerInfo
from nibble.service.broker.worker_side import WorkerBroker
from nibble.service.gateway.app import create_app, create_gateway
from nibble.service.gateway.gateway import Gateway
from nibble.service.gateway.settings import GatewaySettings
from nibble.service.worker.loop import WorkerLoop
from nibble.service.worker.metrics import WorkerMetrics

NUM_WARM_UP = 1000  # until all caches and free lists have had their size
NUM_REQUESTS = 5000
NUM_CLIENTS = 32
LOG_TTL_S = 0.5
MAX_TOKENS = 12
REFUSED_SEED = 666
STOP = "fox"


class EchoingEngine:
    """Every answer is the same text, four tokens a step, to the request's max_tokens; one seed is refused."""

    def __init__(self, token_ids: list[int]) -> None:
        self.stats = EngineStats()
        self.requests: dict[str, tuple[GenerationRequest, int]] = {}
        self.num_aborted = 0
        self._token_ids = token_ids

    @property
    def has_unfinished(self) -> bool:
        return bool(self.requests)

    @property
    def capacity(self) -> int:
        return NUM_CLIENTS - len(self.requests)

    @property
    def preemptible(self) -> list[str]:
        return []

    def add(self, request: GenerationRequest, generated_token_ids: Sequence[int] = ()) -> None:
        if request.sampling.seed == REFUSED_SEED:
            raise RequestError("refused")
        self.requests[request.request_id] = (request, len(generated_token_ids))

    def abort(self, request_id: str) -> None:
        self.num_aborted += self.requests.pop(request_id, None) is not None

    def step(self) -> list[TokenEvent]:
        self.stats.num_steps += 1
        return [self._continue(request, index) for request, index in list(self.requests.values())]

    def _continue(self, request: GenerationRequest, index: int) -> TokenEvent:
        limit = request.sampling.max_tokens
        stop = min(index + 4, limit)
        self.requests[request.request_id] = (request, stop)
        metrics = None
        if stop == limit:
            del self.requests[request.request_id]
            metrics = RequestMetrics(
                prompt_tokens=1, cached_tokens=0, generated_tokens=limit, queue_s=0, prefill_s=0, decode_s=0
            )
        return TokenEvent(
            request_id=request.request_id,
            index=index,
            token_ids=[self._token_ids[i % len(self._token_ids)] for i in range(index, stop)],
            finish_reason=FinishReason.LENGTH if stop == limit else None,
            metrics=metrics,
        )


class Service:
    """A gateway's application and a worker in a thread, and what they hold."""

    def __init__(self, redis_url: str, namespace: str, model_dir: Path) -> None:
        settings = GatewaySettings(
            redis_url=redis_url, namespace=namespace, model_dir=model_dir, log_ttl_s=LOG_TTL_S, needs_worker=False
        )
        self.gateway: Gateway = create_gateway(settings)
        self.app: ASGIApp = create_app(self.gateway)
        self.engine = EchoingEngine(self.gateway.model.encode("The quick brown fox jumps. "))
        self.worker_broker = WorkerBroker(redis_url, "w", namespace=namespace)
        self.worker_metrics = WorkerMetrics("small", 1e9, with_vllm_names=True)
        info = WorkerInfo(worker_id="w", model="small", device="d", state="ready")
        self.loop = WorkerLoop(self.engine, self.worker_broker, self.worker_metrics, info, idle_wait_s=1.0)

    @contextlib.contextmanager
    def worker(self) -> Iterator[None]:
        thread = threading.Thread(target=self.loop.run)
        thread.start()
        try:
            yield
        finally:
            self.loop.stop()
            thread.join(10)
            assert not thread.is_alive()

    def held(self) -> int:
        """Requests that are still somewhere in the books."""
        broker = self.gateway.broker
        return (
            len(self.gateway.in_flight)
            + len(broker._streams)
            + len(broker._checker.pending_aborts)
            + len(self.worker_broker._attempts)
            + len(self.engine.requests)
            + len(self.loop._events)
        )

    def num_metric_lines(self) -> int:
        """Lines of both /metrics: a label that grows with requests shows here."""
        exported = self.gateway.metrics.render() + generate_latest(self.worker_metrics.registry)
        return exported.count(b"\n")


def body(number: int) -> dict[str, Any]:
    """One of five kinds, in turn; the last one is left by its client."""
    kinds: list[dict[str, Any]] = [{}, {"stream": True}, {"stop": STOP}, {"seed": REFUSED_SEED}, {"stream": True}]
    request = {
        "model": "small",
        "messages": [{"role": "user", "content": f"number {number}"}],
        "max_tokens": MAX_TOKENS if number % 5 < 4 else 400,
        "user": f"user-{number}",
        "cache_salt": f"salt-{number}",
    }
    return request | kinds[number % 5]


async def ask(app: ASGIApp, number: int) -> bytes:
    """One POST. A client that leaves does so after the first piece of text."""
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": "/v1/chat/completions",
        "raw_path": b"/v1/chat/completions",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json"), (b"x-request-id", b"id-%d" % number)],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
    }
    is_left = asyncio.Event()
    requests = iter([{"type": "http.request", "body": orjson.dumps(body(number)), "more_body": False}])
    pieces: list[bytes] = []

    async def receive() -> Message:
        if (request := next(requests, None)) is not None:
            return request
        await is_left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        pieces.append(message.get("body", b""))
        if number % 5 == 4 and b"quick" in pieces[-1]:
            is_left.set()

    await app(scope, receive, send)
    return b"".join(pieces)


async def ask_all(app: ASGIApp, numbers: Iterator[int]) -> None:
    """NUM_CLIENTS at once; each answer is what its kind says."""

    async def client() -> None:
        for number in numbers:
            answer = await ask(app, number)
            expected = (b'"length"', b'"length"', b'"stop"', b"refused", b"quick")[number % 5]
            assert expected in answer, (number, answer)

    async with asyncio.TaskGroup() as group:
        for _ in range(NUM_CLIENTS):
            group.create_task(client())


@contextlib.asynccontextmanager
async def connected(gateway: Gateway) -> AsyncIterator[None]:
    await gateway.broker.start()
    try:
        yield
    finally:
        await gateway.broker.close()


def memory() -> tuple[int, int]:
    """Python objects that are alive, and bytes that the process has."""
    gc.collect()
    num_pages = int(Path("/proc/self/statm").read_text().split()[1])
    return len(gc.get_objects()), num_pages * 4096


async def test_thousands_of_requests_leave_nothing_behind(
    redis_url: str, redis_client: redis.Redis, namespace: str, model_dir: Path
) -> None:
    service = Service(redis_url, namespace, model_dir)
    with service.worker():
        async with connected(service.gateway):
            seen = []
            for start, stop in ((0, NUM_WARM_UP), (NUM_WARM_UP, NUM_WARM_UP + NUM_REQUESTS)):
                await ask_all(service.app, iter(range(start, stop)))
                await asyncio.to_thread(wait_for, lambda: service.held() == 0)
                seen.append((*memory(), service.num_metric_lines()))
            (objects, num_bytes, num_lines), (objects_after, bytes_after, lines_after) = seen
            sys.stdout.write(f"objects {objects} -> {objects_after} bytes {num_bytes} -> {bytes_after}\n")
            assert service.engine.num_aborted > NUM_REQUESTS / 10  # some come too late on a busy machine
            assert objects_after - objects < 500, "objects are kept"
            assert bytes_after - num_bytes < 8 << 20, "memory grows"
            assert lines_after == num_lines
            keys = f"{{{namespace}}}:*"
            await asyncio.to_thread(wait_for, lambda: len(list(redis_client.scan_iter(keys, count=10_000))) < 10)
