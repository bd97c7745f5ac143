"""Many streaming chat requests from one process that notes when each byte arrived and parses nothing until the end.

The notes are then read as HTTP chunks and server-sent events. Each event's id ends in the number of tokens its text
brings the answer to, which says which tokens had arrived by when. It is epoll alone: asyncio's transports and protocols
would take as much of the cores that are shared with the gateway as half of the gateway itself does.
"""

from __future__ import annotations

import argparse
import gc
import json
import select
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

_MAX_READ_BYTES = 1 << 16
# A process that slept until something comes would be woken for nearly each chunk, in the gateway's time: that is part
# of a `write` to a client on the same machine. Latencies are longer by half of this on average.
_PAUSE_S = 0.0005


class Arrivals(msgspec.Struct):
    """requests: request id to (CLOCK_MONOTONIC seconds, number of tokens that had arrived by then), in order.

    sent_s: request id to the CLOCK_MONOTONIC seconds when it was sent.
    """

    requests: dict[str, list[tuple[float, int]]]
    sent_s: dict[str, float]


class StreamClient:
    """One connection, one request."""

    def __init__(self, host: str, port: int, request: bytes) -> None:
        self.socket = socket.create_connection((host, port))
        self.sent_s = time.monotonic()
        self.socket.sendall(request)
        self.received: list[tuple[float, bytes]] = []

    def receive(self) -> bool:
        """Take what has come. False at its end."""
        data = self.socket.recv(_MAX_READ_BYTES)
        self.received.append((time.monotonic(), data))
        return bool(data)


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


def run_streams(host: str, port: int, request: bytes, num_streams: int, spread_s: float) -> Arrivals:
    """Start the streams evenly over spread_s and wait until all have ended."""
    clients: list[StreamClient] = []
    running: dict[int, StreamClient] = {}  # by file descriptor
    begin_s = time.monotonic()
    with select.epoll() as poll:
        while running or len(clients) < num_streams:
            due_s = begin_s + spread_s * len(clients) / num_streams - time.monotonic()
            if len(clients) < num_streams and due_s <= 0:
                client = StreamClient(host, port, request)
                clients.append(client)
                running[client.socket.fileno()] = client
                poll.register(client.socket, select.EPOLLIN)
                continue
            time.sleep(_PAUSE_S)
            for descriptor, _ in poll.poll(0):
                if not running[descriptor].receive():
                    running.pop(descriptor).socket.close()
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
    gc.disable()  # all notes stay; looking through them would hold up those to come
    arrivals = run_streams(options.host, options.port, request, options.streams, options.spread_s)
    options.output.write_bytes(msgspec.msgpack.encode(arrivals))


if __name__ == "__main__":
    main()
