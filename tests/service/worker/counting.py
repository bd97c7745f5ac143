"""A synthetic engine with predictable tokens, a worker around it, and what reads its streams."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager

from nibble.engine.errors import RequestError
from nibble.engine.protocol import FinishReason, GenerationRequest, SamplingParams, TokenEvent
from nibble.engine.stats import EngineStats
from nibble.service.broker.wire import WorkerInfo
from nibble.service.broker.worker_side import WorkerBroker
from nibble.service.worker.loop import WorkerLoop
from nibble.service.worker.metrics import WorkerMetrics
from nibble.service.worker.tracing import RequestSpans


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

    @property
    def preemptible(self) -> list[str]:
        return []

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
def running_worker(
    url: str, namespace: str, worker_id: str = "w", spans: RequestSpans | None = None
) -> Iterator[CountingEngine]:
    engine = CountingEngine()
    info = WorkerInfo(worker_id=worker_id, model="m", device="d", state="ready", max_num_sequences=4)
    broker = WorkerBroker(url, worker_id, namespace=namespace, lease_s=2.0)
    loop = WorkerLoop(engine, broker, WorkerMetrics("m", 1e9, True), info, idle_wait_s=0.5, spans=spans)
    thread = threading.Thread(target=loop.run)
    thread.start()
    try:
        yield engine
    finally:
        loop.stop()
        thread.join(5)
        assert not thread.is_alive()


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
