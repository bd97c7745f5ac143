"""Values and encodings on the wire between gateways, Redis and workers.

Published message (channel `{namespace}:events:<gateway>`): a msgpack array (array32 header) of TokenEvents, each a
msgpack array as engine/protocol.py declares it. The worker encodes each event once; the exchange script only puts
a header before those it accepted for a gateway and publishes them, so that one engine step costs one message per
gateway and no script decodes or encodes a token. Events that a script makes itself (abort, deadline, quarantine)
have the same form.

Token log (`{namespace}:tokens:<request>`): token ids as uint32, little endian, appended. It is the truth: live
messages may be lost, a reader compares `TokenEvent.index` with what it has and reads the log when they differ.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from typing import Literal

import msgspec

from nibble.engine.protocol import GenerationRequest, TokenEvent

_UINT32 = "I"
assert array(_UINT32).itemsize == 4, "token logs need a 4-byte unsigned int"


WorkerState = Literal["loading", "ready", "draining"]


class WorkerInfo(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """What a worker says of itself in each exchange; kv_cache_usage is a fraction of its blocks, 0 to 1.

    tokens_per_s: generated for all of them together, per second of recent steps.
    max_context_tokens: the longest sequence that it can hold, 0 where it does not say. A request whose prompt is as
    long as that can never run there.
    """

    worker_id: str
    model: str
    device: str
    state: WorkerState
    num_running: int = 0
    num_waiting: int = 0
    kv_cache_usage: float = 0.0
    max_num_sequences: int = 0
    tokens_per_s: float = 0.0
    max_context_tokens: int = 0


class BrokerStatus(msgspec.Struct, frozen=True, kw_only=True):
    """num_queued: waiting for a worker. num_running: leased to one. workers: those with a live heartbeat.

    queue_age_s: how long the request that is served next has been waiting; those behind it with a lower priority may
    have waited longer, as they are meant to. 0: none waits.
    """

    num_queued: int
    num_running: int
    workers: tuple[WorkerInfo, ...]
    queue_age_s: float = 0.0


class ServerStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What Redis says of itself. memory_limit_bytes: its maxmemory; where none is set, the memory of its machine."""

    memory_used_bytes: int
    memory_limit_bytes: int
    num_clients: int
    num_commands: int  # since its start
    num_evicted_keys: int  # since its start; a broker's must never be


class Assignment(msgspec.Struct, frozen=True, kw_only=True):
    """A request to serve, from position len(generated_token_ids) on. A higher attempt supersedes a lower one."""

    request: GenerationRequest
    attempt: int
    generated_token_ids: list[int]


class Exchange(msgspec.Struct, frozen=True, kw_only=True):
    """What one exchange brought. Process `dropped` first: a request may be in both lists (it starts anew).

    dropped: free these at once (aborted, past their deadline, or taken over by another worker).
    The counts are of this deployment since some worker's last exchange, to be added to this worker's counters:
    num_recovered requests put back into the queue because their worker was lost, num_fenced appends refused because
    their attempt was over, num_quarantined requests given up after too many lost workers, num_expired deadlines.
    """

    assignments: list[Assignment]
    dropped: list[str]
    num_recovered: int = 0
    num_fenced: int = 0
    num_quarantined: int = 0
    num_expired: int = 0


encode = msgspec.msgpack.Encoder().encode
decode_events = msgspec.msgpack.Decoder(list[TokenEvent]).decode
decode_event = msgspec.msgpack.Decoder(TokenEvent).decode
decode_request = msgspec.msgpack.Decoder(GenerationRequest).decode
decode_worker_info = msgspec.msgpack.Decoder(WorkerInfo).decode


def pack_tokens(token_ids: Sequence[int]) -> bytes:
    """Token ids as the log stores them."""
    tokens = array(_UINT32, token_ids)
    if sys.byteorder == "big":
        tokens.byteswap()
    return tokens.tobytes()


def unpack_tokens(log: bytes) -> list[int]:
    """The token ids of a log or a part of one."""
    tokens = array(_UINT32)
    tokens.frombytes(log)
    if sys.byteorder == "big":
        tokens.byteswap()
    return tokens.tolist()
