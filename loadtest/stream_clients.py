"""Many streaming chat requests from one process that notes when each byte arrived and parses nothing until the end.

The notes are then read as HTTP chunks and server-sent events. Each event's id ends in the number of tokens its text
brings the answer to, which says which tokens had arrived by when.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import msgspec
import uvloop


class Arrivals(msgspec.Struct):
    """requests: request id to (CLOCK_MONOTONIC seconds, number of tokens that had arrived by then), in order.

    sent_s: request id to the CLOCK_MONOTONIC seconds when it was sent.
    """

    requests: dict[str, list[tuple[float, int]]]
    sent_s: dict[str, float]


class StreamClient(asyncio.Protocol):
    """One connection, one request."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self.sent_s = 0.0
        self.received: list[tuple[float, bytes]] = []
        self.is_done = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.sent_s = time.monotonic()
        cast(asyncio.WriteTransport, transport).write(self._request)  # uvloop's do not inherit from it

    def data_received(self, data: bytes) -> None:
        self.received.append((time.monotonic(), data))

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.is_done.done():
            self.is_done.set_result(None)


def token_arrivals(received: list[tuple[float, bytes]]) -> tuple[str, list[tuple[float, int]]]:
    """The request id, and the number of tokens after each event that has text. Raises ValueError on another answer."""
    request_id, arrivals = "", []
    for arrival_s, event in _events(_body_pieces(received)):
        lines = event.split(b"\n")
        if not lines[0].startswith(b"id: ") or b'"content":"' not in lines[1] or b'"role"' in lines[1]:
            continue
        request_id, _, position = lines[0][4:].decode().rpartition(":")
        arrivals.append((arrival_s, int(position)))
    return request_id, arrivals


def _events(pieces: Iterator[tuple[float, bytes]]) -> Iterator[tuple[float, bytes]]:
    """Server-sent events, each with the time of its last byte."""
    rest = b""
    for arrival_s, piece in pieces:
        *events, rest = (rest + piece).split(b"\n\n")
        yield from ((arrival_s, event) for event in events)


def _body_pieces(received: list[tuple[float, bytes]]) -> Iterator[tuple[float, bytes]]:
    """What a response with `Transfer-Encoding: chunked` brought, without its framing."""
    rest, is_body = b"", False
    for arrival_s, data in received:
        rest += data
        if not is_body:
            head, separator, tail = rest.partition(b"\r\n\r\n")
            if not separator:
                continue
            if not head.startswith(b"HTTP/1.1 200") or b"chunked" not in head.lower():
                raise ValueError(f"not a streamed answer: {rest[:500]!r}")
            rest, is_body = tail, True
        while True:
            size_text, separator, tail = rest.partition(b"\r\n")
            if not separator or len(tail) < int(size_text, 16) + 2:
                break
            size = int(size_text, 16)
            yield arrival_s, tail[:size]
            rest = tail[size + 2 :]


async def run_streams(host: str, port: int, request: bytes, num_streams: int, spread_s: float) -> Arrivals:
    """Start the streams evenly over spread_s and wait until all have ended."""
    loop = asyncio.get_running_loop()
    clients = []
    begin_s = time.monotonic()
    for index in range(num_streams):
        await asyncio.sleep(max(0.0, begin_s + spread_s * index / num_streams - time.monotonic()))
        _, client = await loop.create_connection(lambda: StreamClient(request), host, port)
        clients.append(client)
    await asyncio.gather(*(client.is_done for client in clients))
    arrivals = Arrivals({}, {})
    for client in clients:
        request_id, arrivals_of_one = token_arrivals(client.received)
        arrivals.requests[request_id], arrivals.sent_s[request_id] = arrivals_of_one, client.sent_s
    return arrivals


def http_request(model: str, max_tokens: int) -> bytes:
    body = json.dumps(
        {
            "model": model,
            "messages": [{"role": "user", "content": "Measure."}],
            "max_tokens": max_tokens,
            "stream": True,
            "ignore_eos": True,
        }
    ).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--streams", type=int, required=True)
    parser.add_argument("--max-tokens", type=int, required=True)
    parser.add_argument("--spread-s", type=float, required=True)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    request = http_request(options.model, options.max_tokens)
    streams = run_streams(options.host, options.port, request, options.streams, options.spread_s)
    options.output.write_bytes(msgspec.msgpack.encode(uvloop.run(streams)))


if __name__ == "__main__":
    main()
