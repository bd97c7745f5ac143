"""`python -m loadtest.chunk_cost`: CPU time of a chunk in the gateway's own code: no sockets, no Valkey, no worker.

The real application behind the real HTTP protocol, whose transports drop what is written; published messages as an
exchange would send them are handed to the table of streams.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import sys
import time
from pathlib import Path
from typing import Any

import uvicorn
import uvloop
from uvicorn.server import ServerState

from loadtest.stream_clients import http_request
from nibble.engine.checkpoint.resolve import resolve_checkpoint
from nibble.engine.protocol import FinishReason, GenerationRequest, TokenEvent
from nibble.service.broker.gateway_side import NO_TERMS, GatewayBroker
from nibble.service.broker.terms import Terms
from nibble.service.broker.token_stream import TokenStream
from nibble.service.broker.wire import BrokerStatus, WorkerInfo, encode
from nibble.service.demo_model import fetch_demo_model
from nibble.service.gateway.app import create_app, create_gateway
from nibble.service.gateway.http_protocol import GatewayProtocol
from nibble.service.gateway.settings import GatewaySettings

_TOKEN_ID = 504  # SmolLM2's " time"
_STREAMS_PER_MESSAGE = 125
_NUM_OPENING = 2  # writes before there is text: the head, the chunk with the role


class Nowhere(asyncio.Transport):
    """What is written is dropped. is_opened: the answer has begun. is_closed: it has ended."""

    def __init__(self) -> None:
        super().__init__()
        self.num_writes = 0
        self.is_opened, self.is_closed = asyncio.Event(), asyncio.Event()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.num_writes += 1
        if self.num_writes == _NUM_OPENING:
            self.is_opened.set()

    def close(self) -> None:
        self.is_closed.set()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return ("127.0.0.1", 1) if name in ("peername", "sockname") else default

    def is_closing(self) -> bool:
        return False


class NoBroker(GatewayBroker):
    """Takes every request and does nothing with it."""

    async def submit(self, request: GenerationRequest, terms: Terms = NO_TERMS) -> TokenStream:
        stream = TokenStream(request.request_id)
        self._streams.add(stream)
        return stream

    async def status(self) -> BrokerStatus:
        worker = WorkerInfo(worker_id="w", model="m", device="none", state="ready")
        return BrokerStatus(num_queued=0, num_running=1, workers=(worker,))

    @property
    def request_ids(self) -> list[str]:
        """Of those that run."""
        return [stream.request_id for stream in self._streams]

    def publish(self, message: bytes) -> None:
        assert self._streams.dispatch(message), "a gap"


async def measure(model_dir: Path, num_streams: int, num_steps: int) -> list[float]:
    """CPU us per chunk of each message, in rising order."""
    settings = GatewaySettings(model_dir=model_dir, model_name="measured")
    gateway = create_gateway(settings)
    broker = gateway.broker = NoBroker(settings.redis_url, "g")
    config = uvicorn.Config(create_app(gateway), ws="none", log_config=None, access_log=False)
    config.load()
    transports = [Nowhere() for _ in range(num_streams)]
    gc.disable()  # rare in a gateway's process
    for transport in transports:
        protocol = GatewayProtocol(config, ServerState(), {})
        protocol.connection_made(transport)
        protocol.data_received(http_request("measured", num_steps + 1))
    await asyncio.gather(*(transport.is_opened.wait() for transport in transports))
    request_ids, results = broker.request_ids, []
    for step in range(num_steps):
        for first in range(0, num_streams, _STREAMS_PER_MESSAGE):
            results.append(await _publish(broker, request_ids[first : first + _STREAMS_PER_MESSAGE], step))
    assert sum(transport.num_writes for transport in transports) == (_NUM_OPENING + num_steps) * num_streams
    await _publish(broker, request_ids, num_steps, FinishReason.LENGTH)
    await asyncio.gather(*(transport.is_closed.wait() for transport in transports))
    return sorted(results)


async def _publish(broker: NoBroker, names: list[str], index: int, reason: FinishReason | None = None) -> float:
    """CPU us for each of these streams until all have written."""
    events = [TokenEvent(request_id=name, index=index, token_ids=[_TOKEN_ID], finish_reason=reason) for name in names]
    message = encode(events)
    begin_s = time.thread_time()
    broker.publish(message)
    for _ in range(2):  # turns of the loop: consumers are told in the next one
        await asyncio.sleep(0)
    return (time.thread_time() - begin_s) / len(names) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=60, help="tokens of each stream")
    parser.add_argument("--cache-dir", type=Path, default=Path.home() / ".cache" / "nibble")
    options = parser.parse_args()
    source = fetch_demo_model(options.cache_dir, lambda *_: None)
    model_dir = resolve_checkpoint(source, options.cache_dir, lambda *_: None)
    results = uvloop.run(measure(model_dir, options.streams, options.steps))
    tenth, half = results[len(results) // 10], results[len(results) // 2]
    sys.stdout.write(f"CPU us/chunk: least {results[0]:.1f}, a tenth below {tenth:.1f}, half below {half:.1f}\n")


if __name__ == "__main__":
    main()
