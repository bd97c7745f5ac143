"""Clients that read more slowly than their answer is generated."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from typing import Any

from conftest import RunningGateway, wait_for
from responses_client import events_of
from starlette.types import Message

from nibble.service.gateway.app import create_app, create_gateway

# Some megabytes of events: more than the sockets between client and gateway hold.
BODY: dict[str, Any] = {
    "model": "small",
    "messages": [{"role": "user", "content": "random 400"}],
    "n": 8,
    "logprobs": True,
    "top_logprobs": 20,
    "seed": 5,
}
PAUSE_S = 0.5  # for the sockets to fill


def connect(running: RunningGateway) -> socket.socket:
    """A client whose own socket holds little, with the request sent."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", int(running.url.rpartition(":")[2])))
    client.settimeout(30)
    body = json.dumps({**BODY, "stream": True}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    client.sendall(head.encode() + body)
    return client


def read_all(client: socket.socket) -> str:
    """The body, out of its HTTP chunks."""
    rest = bytearray()
    while part := client.recv(1 << 16):
        rest += part
    _, _, rest = rest.partition(b"\r\n\r\n")
    body = bytearray()
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        body += rest[: int(size, 16)]
        rest = rest[int(size, 16) + 2 :]
    return body.decode()


def test_all_of_it_comes_in_order(running: RunningGateway) -> None:
    whole = running.post(BODY).json()
    with connect(running) as client:
        wait_for(lambda: running.worker.is_done)
        threading.Event().wait(PAUSE_S)
        assert running.gateway.in_flight, "the answer does not fit into the sockets"
        events = [json.loads(part.partition("data: ")[2]) for part in read_all(client).split("\n\n")[:-2]]
    for choice in whole["choices"]:
        own = [event["choices"][0] for event in events if event["choices"][0]["index"] == choice["index"]]
        assert "".join(part["delta"].get("content", "") for part in own) == choice["message"]["content"]
        tokens = [token for part in own if part["logprobs"] for token in part["logprobs"]["content"]]
        assert tokens == choice["logprobs"]["content"]
        assert own[-1]["finish_reason"] == "stop"


def test_one_that_reads_nothing_keeps_no_other_one_waiting(running: RunningGateway) -> None:
    with connect(running):
        wait_for(lambda: running.worker.is_done)
        threading.Event().wait(PAUSE_S)
        short = {**BODY, "n": 1, "messages": [{"role": "user", "content": "hello"}]}
        assert running.post(short).json()["choices"][0]["message"]["content"] == "hello"
        assert running.gateway.in_flight
    wait_for(lambda: not running.gateway.in_flight)


async def test_events_that_come_at_once_wait_for_their_turn(running: RunningGateway) -> None:
    """A server that always waits, and an answer that is there already: in process, where nothing is buffered."""
    created = await asyncio.to_thread(running.openai().responses.create, model="small", input="a b c d e f")
    gateway = create_gateway(running.gateway.settings.model_copy(update={"gateway_id": "another"}))
    path = f"/v1/responses/{created.id}"
    scope = {"type": "http", "method": "GET", "path": path, "query_string": b"stream=true", "headers": []}
    pieces: list[bytes] = []

    async def receive() -> Message:
        return await asyncio.Future[Message]()

    async def send(message: Message) -> None:
        await asyncio.sleep(0.001)
        pieces.append(message.get("body", b""))

    await gateway.broker.start()
    try:
        await create_app(gateway)(scope, receive, send)
    finally:
        await gateway.broker.close()
    assert len(pieces) > 5
    assert events_of(b"".join(pieces).decode())[-1]["response"]["output"][0]["content"][0]["text"] == "a b c d e f"
