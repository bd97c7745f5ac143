"""The calls a gateway makes to Redis: one method per script, typed in and out. No streams, no tasks, no retries."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import redis.asyncio
from redis.asyncio.client import PubSub
from redis.asyncio.retry import Retry
from redis.exceptions import NoScriptError, RedisError

from nibble.engine.protocol import PRIORITY_S, FinishReason, GenerationRequest, TokenEvent
from nibble.service.broker import scripts
from nibble.service.broker.errors import (
    AlreadyClaimed,
    BrokerError,
    DuplicateRequest,
    NoWorker,
    OverQuota,
    QueueFull,
    translated,
)
from nibble.service.broker.keys import Keys
from nibble.service.broker.terms import Level, Quota, Terms
from nibble.service.broker.token_log import TokenLog
from nibble.service.broker.wire import (
    BrokerStatus,
    ServerStatus,
    decode_event,
    decode_request,
    decode_worker_info,
    encode,
    pack_tokens,
    unpack_tokens,
)

MAX_PRIORITY = 4095  # nobody means to wait for days
CALL_TIMEOUT_S = 2.0
_ATTEMPTS_PER_RESTORE = 1 << 20  # attempts of a restored request begin above all earlier ones


@dataclass(frozen=True)
class SubmitPolicy:
    """What a gateway asks for with each request; see GatewayBroker."""

    max_queued: int
    needs_worker: bool
    max_attempts: int
    log_ttl_s: float


@dataclass(frozen=True)
class LogRead:
    """What a token log had from a position on: an event with the tokens and, if the request has ended, its end."""

    event: TokenEvent
    request: GenerationRequest | None
    context: bytes


class GatewayCalls:
    """All methods raise BrokerUnavailable after CALL_TIMEOUT_S at the latest."""

    def __init__(self, url: str, gateway_id: str, namespace: str, policy: SubmitPolicy) -> None:
        self._keys = Keys(namespace)
        self._gateway_id = gateway_id
        self._policy = policy
        self._client = redis.asyncio.Redis.from_url(url, **scripts.client_options(Retry, CALL_TIMEOUT_S))

    @property
    def channel(self) -> str:
        return self._keys.events(self._gateway_id)

    def pubsub(self) -> PubSub:
        return self._client.pubsub()

    async def close(self) -> None:
        await self._client.aclose()

    async def submit(self, request: GenerationRequest, nonce: str, terms: Terms) -> tuple[Level, ...]:
        """A repeat with the same nonce changes nothing. Returns how far the quota is used.

        Raises QueueFull, NoWorker, OverQuota, AlreadyClaimed, DuplicateRequest.
        """
        reply = await self._submit(request, nonce, "", TokenLog(), terms)
        refusal = self._refusal(request.request_id, reply, terms.quota)
        if refusal is not None:
            raise refusal
        return _levels(terms.quota, reply[1])

    async def restore(self, request: GenerationRequest, log: TokenLog, num_restores: int, terms: Terms) -> None:
        """Give a request to a server that lost it, past admission. num_restores >= 1 makes its attempts new."""
        await self._submit(request, "", num_restores * _ATTEMPTS_PER_RESTORE, log, terms)

    async def read(self, first_indexes: Mapping[str, int], with_request: bool) -> tuple[int, list[LogRead | None]]:
        """Read token logs from these positions on and subscribe this gateway to them.

        Returns the number of live workers, and None for each request that is not known.
        """
        arguments = [argument for pair in first_indexes.items() for argument in pair]
        num_workers, entries = await self._call(scripts.READ, self._gateway_id, int(with_request), *arguments)
        reads = [
            _log_read(request_id, index, entry) if entry else None
            for (request_id, index), entry in zip(first_indexes.items(), entries, strict=True)
        ]
        return num_workers, reads

    async def abort(self, request_id: str, reason: FinishReason, error: str) -> bool:
        """True if this ended the request, False if it had ended before or is not known."""
        return bool(await self._call(scripts.ABORT, request_id, reason.value, error))

    async def status(self) -> BrokerStatus:
        num_queued, num_running, infos, age_ms = await self._call(scripts.STATUS)
        workers = tuple(decode_worker_info(info) for info in infos)
        return BrokerStatus(num_queued=num_queued, num_running=num_running, workers=workers, queue_age_s=age_ms / 1000)

    async def server_status(self) -> ServerStatus:
        """Raises BrokerError where it may not be asked, too."""
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                info = await self._client.info()
        except (RedisError, OSError) as error:
            raise translated(error) from error
        return ServerStatus(
            memory_used_bytes=info["used_memory"],
            memory_limit_bytes=info["maxmemory"] or info["total_system_memory"],
            num_clients=info["connected_clients"],
            num_commands=info["total_commands_processed"],
            num_evicted_keys=info["evicted_keys"],
        )

    async def store_response(self, response_id: str, record: bytes, previous_id: str, ttl_s: float) -> None:
        await self._call(scripts.STORE_RESPONSE, response_id, record, previous_id, max(1, round(ttl_s * 1000)))

    async def read_responses(self, response_id: str, limit: int) -> list[bytes]:
        records: list[bytes] = await self._call(scripts.READ_RESPONSES, response_id, limit)
        return records

    async def delete_response(self, response_id: str, ttl_s: float) -> None:
        await self._call(scripts.DELETE_RESPONSE, response_id, max(1, round(ttl_s * 1000)))

    def _refusal(self, request_id: str, reply: list[Any], quota: Quota | None) -> BrokerError | None:
        match reply[0]:
            case b"ok":
                return None
            case b"queue_full":
                return QueueFull(reply[1], self._policy.max_queued, reply[2] / 1000)
            case b"no_worker":
                return NoWorker(reply[2] / 1000)
            case b"over_quota":
                assert quota is not None
                return OverQuota(quota.limits[reply[1] - 1], _levels(quota, reply[3]), reply[2] / 1000)
            case b"claimed":
                return AlreadyClaimed(reply[1].decode(), reply[2].decode())
            case _:
                return DuplicateRequest(request_id)

    async def _submit(
        self, request: GenerationRequest, nonce: str, attempt: int | str, log: TokenLog, terms: Terms
    ) -> list[Any]:
        if abs(request.priority) > MAX_PRIORITY:
            raise ValueError(f"priority {request.priority} is not within ±{MAX_PRIORITY}")
        reply: list[Any] = await self._call(
            scripts.SUBMIT,
            request.request_id,
            encode(request),
            self._gateway_id,
            nonce,
            round(request.priority * PRIORITY_S * 1000),
            "" if request.deadline_s is None else round(request.deadline_s * 1000),
            max(1, round(self._policy.log_ttl_s * 1000)),
            self._policy.max_attempts,
            self._policy.max_queued,
            int(self._policy.needs_worker),
            attempt,
            pack_tokens(log.token_ids),
            bytes(log.logprobs),
            log.prompt_logprobs or b"",
            *_packed(terms),
        )
        return reply

    async def _call(self, script: scripts.Script, *arguments: str | bytes | int) -> Any:
        root, client = self._keys.root, cast(Any, self._client)
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                try:
                    return await client.execute_command("EVALSHA", script.sha, 1, root, *arguments)
                except NoScriptError:
                    return await client.execute_command("EVAL", script.source, 1, root, *arguments)
        except (RedisError, OSError) as error:
            raise translated(error) from error


def _packed(terms: Terms) -> list[str | bytes | int]:
    """The last arguments of scripts/submit.lua."""
    claim, quota = terms.claim, terms.quota
    limits = [(limit.unit, limit.amount, limit.period_s * 1000) for limit in quota.limits] if quota else []
    return [
        terms.context,
        claim.name if claim else "",
        claim.fingerprint if claim else "",
        encode((quota.name, limits)) if quota else "",
        terms.num_requests,
        terms.num_tokens,
    ]


def _levels(quota: Quota | None, numbers: list[int]) -> tuple[Level, ...]:
    limits = quota.limits if quota else ()
    return tuple(Level(limit, numbers[2 * i], numbers[2 * i + 1] / 1000) for i, limit in enumerate(limits))


def _log_read(request_id: str, index: int, entry: list[Any]) -> LogRead:
    """From an entry of scripts/read.lua."""
    tokens, final_event, _, request, logprobs, prompt_logprobs, context = entry
    final = decode_event(final_event) if final_event else None
    event = TokenEvent(
        request_id=request_id,
        index=index,
        token_ids=unpack_tokens(tokens),
        finish_reason=None if final is None else final.finish_reason,
        error=None if final is None else final.error,
        error_fields=() if final is None else final.error_fields,
        metrics=None if final is None else final.metrics,
        logprobs=logprobs or None,
        prompt_logprobs=prompt_logprobs or None,
    )
    return LogRead(event, decode_request(request) if request else None, context)
