"""The broker as a worker sees it: one round trip per engine step, and a wait for work when idle. Blocking.

`exchange` may fail at any moment and be repeated: the worker passes the same events again (more may have joined them)
and the log ends right, because an event that is in the log already is accepted silently. After a failure the worker
also tells what it holds, so that assignments and drops of a lost reply are sent again. It tells so every
_RESYNC_S in any case: a Redis that restarted from an older state then converges with its workers.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Sequence
from typing import Any, cast

import redis
from redis.exceptions import NoScriptError, RedisError
from redis.retry import Retry

from nibble.engine.protocol import TokenEvent
from nibble.service.broker import scripts
from nibble.service.broker.errors import BrokerError, translated
from nibble.service.broker.keys import Keys
from nibble.service.broker.wire import (
    Assignment,
    Exchange,
    WorkerInfo,
    decode_request,
    encode,
    pack_tokens,
    unpack_tokens,
)

logger = logging.getLogger(__name__)

# An idle worker looks again after this time even if no wake-up came (another worker may have lost it).
MAX_WAIT_S = 0.2
_CALL_TIMEOUT_S = 2.0
_RESYNC_S = 5.0


class WorkerBroker:
    """One worker's connection. Not thread-safe, but for renew() and give_up(), which may run in another thread.

    worker_id names the worker to people; a process that starts with the id of a running one replaces it. The lease
    covers all requests of this worker: exchange at least every lease_s / 3 (idle too), or renew() during a long step.
    """

    def __init__(self, url: str, worker_id: str, *, namespace: str = "nibble", lease_s: float = 10.0) -> None:
        self._keys = Keys(namespace)
        self._worker_id = worker_id
        self._worker = f"{worker_id}#{secrets.token_hex(4)}"
        self._lease_ms = max(1, round(lease_s * 1000))
        self._client = redis.Redis.from_url(url, **scripts.client_options(Retry, _CALL_TIMEOUT_S))
        self._attempts: dict[str, int] = {}  # what this worker holds, and under which attempt
        self._is_first = True
        self._must_resync = False
        self._resynced_s = time.monotonic()
        self._can_take_work = False

    def exchange(
        self, events: Sequence[TokenEvent], capacity: int, info: WorkerInfo, preemptible: Sequence[str] = ()
    ) -> Exchange:
        """Record and publish this step's events, renew the lease, take up to `capacity` new requests; without capacity
        one for each of `preemptible`, which this worker holds, that is to be served before it.

        Events of requests that were dropped are ignored. Raises BrokerUnavailable: nothing or everything was done;
        call again with the same events, which the caller keeps.
        """
        arguments, finished = self._arguments(events, capacity, info, preemptible)
        self._must_resync, had_to_resync = True, self._must_resync  # until the reply is here
        reply = self._call(scripts.EXCHANGE, arguments)
        if had_to_resync:
            self._resynced_s = time.monotonic()
        self._is_first = False
        self._must_resync = (bool(reply[0]) and not had_to_resync) or self._is_resync_due()
        self._can_take_work = capacity > 0
        for request_id in finished:
            self._attempts.pop(request_id, None)
        return self._received(reply)

    def wait(self, timeout_s: float) -> None:
        """Block until there may be work or an abort, at most timeout_s and at most MAX_WAIT_S. Never raises."""
        timeout_s = min(timeout_s, MAX_WAIT_S)
        if timeout_s <= 0:
            return
        names = [self._keys.wake_worker(self._worker)]
        if self._can_take_work:
            names.append(self._keys.wake)
        started_s = time.monotonic()
        try:
            self._client.blpop(names, timeout_s)
        except (RedisError, OSError):  # the next exchange reports it
            time.sleep(max(0.0, timeout_s - (time.monotonic() - started_s)))

    def renew(self) -> bool:
        """Renew the lease; False if it is lost already. May be called from any thread. Raises BrokerUnavailable."""
        return bool(self._call(scripts.RENEW, [self._worker, self._lease_ms]))

    def give_up(self) -> int:
        """This worker is broken: let others take its requests over at once, as if its lease had expired.

        May be called from any thread. Returns how many requests it held. Raises BrokerUnavailable.
        """
        return int(self._call(scripts.HAND_BACK, [self._worker, 1]))

    def close(self) -> None:
        """Hand unfinished requests back, so that another worker continues them at once, and deregister."""
        try:
            num_handed_back = self._call(scripts.HAND_BACK, [self._worker, 0])
            logger.info("worker left worker_id=%s handed_back=%d", self._worker_id, num_handed_back)
        except BrokerError as error:
            logger.warning("worker could not hand back, its lease will expire worker_id=%s: %s", self._worker_id, error)
        self._attempts.clear()
        self._client.close()

    def _is_resync_due(self) -> bool:
        return time.monotonic() - self._resynced_s > _RESYNC_S

    def _arguments(
        self, events: Sequence[TokenEvent], capacity: int, info: WorkerInfo, preemptible: Sequence[str]
    ) -> tuple[list[str | bytes | int], set[str]]:
        held = self._attempts
        running = [event for event in events if event.finish_reason is None and event.request_id in held]
        final = [event for event in events if event.finish_reason is not None and event.request_id in held]
        finished = {event.request_id for event in final}
        fields: list[str | int] = []
        token_ids: list[int] = []
        encoded: list[bytes] = []
        logprobs: list[bytes] = []
        for event in running + final:
            request_id, new_ids, packed = event.request_id, event.token_ids, encode(event)
            own, prompt = event.logprobs or b"", event.prompt_logprobs or b""
            fields += (request_id, held[request_id], event.index, len(new_ids), len(packed), len(own), len(prompt))
            token_ids += new_ids
            encoded.append(packed)
            logprobs += (own, prompt)
        known: bytes | str = ""
        if self._must_resync:
            known = encode({name: attempt for name, attempt in held.items() if name not in finished})
        arguments: list[str | bytes | int] = [
            self._worker,
            self._worker_id,
            encode(info),
            self._lease_ms,
            max(0, capacity),
            int(self._is_first),
            known,
            len(final),
            encode(fields),
            pack_tokens(token_ids),
            b"".join(encoded),
            b"".join(logprobs),
            encode(list(preemptible)) if preemptible else "",
        ]
        return arguments, finished

    def _received(self, reply: list[Any]) -> Exchange:
        dropped = [name for name in map(bytes.decode, reply[1]) if self._attempts.pop(name, None) is not None]
        assignments = []
        for at in range(0, len(reply[2]), 3):
            request = decode_request(reply[2][at])
            attempt = int(reply[2][at + 1])
            if request.request_id in self._attempts:
                dropped.append(request.request_id)
            self._attempts[request.request_id] = attempt
            generated = unpack_tokens(reply[2][at + 2])
            assignments.append(Assignment(request=request, attempt=attempt, generated_token_ids=generated))
        counts = {reply[3][at].decode(): int(reply[3][at + 1]) for at in range(0, len(reply[3]), 2)}
        return Exchange(
            assignments=assignments,
            dropped=dropped,
            num_recovered=counts.get("recovered", 0),
            num_fenced=counts.get("fenced", 0),
            num_quarantined=counts.get("quarantined", 0),
            num_expired=counts.get("expired", 0),
        )

    def _call(self, script: scripts.Script, arguments: list[str | bytes | int]) -> Any:
        root = self._keys.root
        try:
            try:
                return cast(Any, self._client).execute_command("EVALSHA", script.sha, 1, root, *arguments)
            except NoScriptError:
                return cast(Any, self._client).execute_command("EVAL", script.source, 1, root, *arguments)
        except (RedisError, OSError) as error:
            raise translated(error) from error
