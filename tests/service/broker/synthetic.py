"""A deterministic model behind the real worker side of the broker, and an integrity check of a deployment's keys.

Token i of a request is a function of its id and i, so any log and any stream can be checked on its own.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import redis

from nibble.engine.protocol import FinishReason, GenerationRequest, SamplingParams, TokenEvent
from nibble.service.broker.keys import Keys
from nibble.service.broker.wire import Exchange, WorkerInfo, decode_event, pack_tokens, unpack_tokens
from nibble.service.broker.worker_side import WorkerBroker


def token_at(request_id: str, index: int) -> int:
    return zlib.crc32(f"{request_id}:{index}".encode())  # all 32 bits are used


def tokens_of(request_id: str, start: int, stop: int) -> list[int]:
    return [token_at(request_id, index) for index in range(start, stop)]


def wants_logprobs(request_id: str) -> bool:
    """Requests whose name ends with an odd digit; their records have three words each."""
    return request_id[-1] in "13579"


def logprobs_of(request_id: str, start: int, stop: int) -> bytes | None:
    """Records beside tokens_of. None where there are none."""
    if not wants_logprobs(request_id) or start >= stop:
        return None
    return b"".join(pack_tokens([token_at(request_id, index), index, 7]) for index in range(start, stop))


def prompt_logprobs_of(request_id: str, start: int) -> bytes | None:
    """They come with the first token."""
    return f"prompt of {request_id}".encode() if wants_logprobs(request_id) and start == 0 else None


def make_request(request_id: str, max_tokens: int = 4, **fields: Any) -> GenerationRequest:
    return GenerationRequest(
        request_id=request_id,
        prompt_token_ids=[1, 2, 3],
        sampling=SamplingParams(max_tokens=max_tokens),
        arrival_s=time.time(),
        **fields,
    )


class LossyClient:
    """A redis client whose next calls can be lost before they reach the server, or whose replies can be."""

    def __init__(self, client: redis.Redis) -> None:
        self._client = client
        self.lose_next: str | None = None  # "call" | "reply"
        self.is_open = True

    def execute_command(self, *arguments: Any) -> Any:
        lost, self.lose_next = self.lose_next, None
        if lost == "call":
            raise redis.ConnectionError("lost on the way to the server")
        reply = self._client.execute_command(*arguments)
        if lost == "reply":
            raise redis.TimeoutError("lost on the way back")
        return reply

    def close(self) -> None:
        self.is_open = False
        self._client.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)


class SyntheticWorker:
    """The worker loop in small: it keeps events until an exchange succeeds, then drops, then adds."""

    def __init__(self, url: str, worker_id: str, namespace: str, **options: Any) -> None:
        self.broker = WorkerBroker(url, worker_id, namespace=namespace, **options)
        self.name = self.broker._worker  # its key in the leases
        self.link = LossyClient(self.broker._client)
        self.broker._client = self.link  # type: ignore[assignment]
        self.info = WorkerInfo(worker_id=worker_id, model="synthetic", device="none", state="ready")
        self.running: dict[str, tuple[GenerationRequest, int]] = {}  # request, tokens generated
        self.events: list[TokenEvent] = []  # not recorded yet

    def generate(self, request_ids: Iterable[str] | None = None, num_tokens: int = 1) -> None:
        """One engine step: num_tokens more for each of these (all by default)."""
        for request_id in list(self.running if request_ids is None else request_ids):
            request, start = self.running[request_id]
            stop = min(start + num_tokens, request.sampling.max_tokens)
            is_last = stop >= request.sampling.max_tokens
            self.events.append(
                TokenEvent(
                    request_id=request_id,
                    index=start,
                    token_ids=tokens_of(request_id, start, stop),
                    finish_reason=FinishReason.LENGTH if is_last else None,
                    logprobs=logprobs_of(request_id, start, stop),
                    prompt_logprobs=prompt_logprobs_of(request_id, start),
                )
            )
            self.running[request_id] = (request, stop)
            if is_last:
                del self.running[request_id]

    def exchange(self, capacity: int = 8, preemptible: Sequence[str] = ()) -> Exchange:
        exchange = self.broker.exchange(self.events, capacity, self.info, preemptible)
        self.events = []
        for request_id in exchange.dropped:
            self.running.pop(request_id, None)
        for assignment in exchange.assignments:
            request_id = assignment.request.request_id
            assert request_id not in self.running, "assigned twice without a drop"
            generated = assignment.generated_token_ids
            assert generated == tokens_of(request_id, 0, len(generated))
            self.running[request_id] = (assignment.request, len(generated))
        return exchange

    def step(self, num_tokens: int = 1, capacity: int = 8) -> Exchange:
        self.generate(num_tokens=num_tokens)
        return self.exchange(capacity)

    def run_until_idle(self, max_steps: int = 1000) -> None:
        for _ in range(max_steps):
            self.step()
            if not self.running and not self.events:
                return
        raise AssertionError("the worker did not become idle")


def expire_lease(client: redis.Redis, keys: Keys, worker: str) -> None:
    """As if the worker had been silent for longer than its lease."""
    assert client.zscore(keys.leases, worker) is not None, "the worker has no lease"
    client.zadd(keys.leases, {worker: 1}, xx=True)


def read_log(client: redis.Redis, keys: Keys, request_id: str) -> list[int]:
    log = client.get(keys.tokens(request_id))
    return unpack_tokens(log) if log else []  # type: ignore[arg-type]


# All keys of a namespace at one moment: name, value (a flat list for all but strings), ms to live.
_SNAPSHOT = """
local read = {
  string = function(key) return redis.call('GET', key) end,
  hash = function(key) return redis.call('HGETALL', key) end,
  zset = function(key) return redis.call('ZRANGE', key, 0, -1) end,
  set = function(key) return redis.call('SMEMBERS', key) end,
  list = function(key) return redis.call('LRANGE', key, 0, -1) end,
}
local entries = {}
for _, key in ipairs(redis.call('KEYS', ARGV[1] .. '*')) do
  entries[#entries + 1] = {key, read[redis.call('TYPE', key).ok](key), redis.call('PTTL', key)}
end
return entries
"""


class Snapshot:
    def __init__(self, client: redis.Redis, keys: Keys) -> None:
        self.values: dict[str, Any] = {}
        self.ttl_ms: dict[str, int] = {}
        for key, value, ttl_ms in client.eval(_SNAPSHOT, 0, keys.root):
            self.values[key.decode()] = value
            self.ttl_ms[key.decode()] = ttl_ms

    def members(self, key: str) -> set[str]:
        return {value.decode() for value in self.values.get(key, [])}

    def fields(self, key: str) -> dict[str, bytes]:
        flat = self.values.get(key, [])
        return {flat[at].decode(): flat[at + 1] for at in range(0, len(flat), 2)}

    def suffixes(self, prefix: str) -> set[str]:
        return {key.removeprefix(prefix) for key in self.values if key.startswith(prefix)}


def check_integrity(client: redis.Redis, namespace: str) -> None:
    """Every key of the namespace agrees with every other, and every log is what the synthetic model generates."""
    keys = Keys(namespace)
    now = Snapshot(client, keys)
    leases, queued, suspects = now.members(keys.leases), now.members(keys.queue), now.members(keys.suspects)
    assert set(now.fields(keys.workers)) == leases
    assert not queued & suspects
    held: dict[str, tuple[str, str]] = {}
    for worker in now.suffixes(keys.worker("")):
        assert worker in leases, f"{worker} holds requests without a lease"
        for request_id, fence in now.fields(keys.worker(worker)).items():
            assert request_id not in held, "held by two workers"
            held[request_id] = (worker, fence.decode())
    for prefix in (keys.dropped(""), keys.wake_worker("")):
        assert now.suffixes(prefix) <= leases
    unfinished = set()
    for request_id in now.suffixes(keys.state("")):
        if _check_request(now, keys, request_id, held, queued | suspects) != "finished":
            unfinished.add(request_id)
    assert now.members(keys.deadlines) <= unfinished
    assert set(held) | queued | suspects == unfinished


def _check_request(
    now: Snapshot, keys: Keys, request_id: str, held: dict[str, tuple[str, str]], waiting: set[str]
) -> str:
    state = now.fields(keys.state(request_id))
    status, worker = state["status"].decode(), state["worker"].decode()
    log = unpack_tokens(now.values.get(keys.tokens(request_id), b""))
    assert log == tokens_of(request_id, 0, len(log))
    assert now.values.get(keys.logprobs(request_id)) == logprobs_of(request_id, 0, len(log))
    assert now.values.get(keys.prompt_logprobs(request_id)) == (prompt_logprobs_of(request_id, 0) if log else None)
    assert (request_id in waiting) == (status == "queued")
    assert (request_id in held) == (status == "running")
    assert keys.request(request_id) in now.values
    if status == "running":
        assert held[request_id] == (worker, f"{state['attempt'].decode()}:{state['gateways'].decode()}")
    else:
        assert worker == ""
    assert (status == "finished") == ("final" in state)
    for kind in (keys.state, keys.request, keys.tokens, keys.logprobs, keys.prompt_logprobs, keys.context):
        key = kind(request_id)
        assert key not in now.values or (now.ttl_ms[key] >= 0) == (status == "finished")
    if status == "finished":
        assert decode_event(state["final"]).finish_reason is not None
    return status


async def until(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    import asyncio

    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - conditions on another process cannot set an event
            await asyncio.sleep(0.002)
