"""The names of a cluster's Services, over UDP: what CoreDNS is in a cluster of somebody else's."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import struct
import threading
import urllib.request
from pathlib import Path
from typing import Any

ZONE = "svc.cluster.local"
TTL_S = 1
A, IN = 1, 1
FORWARD_S = 5.0


class NameServer:
    """Answers with addresses (A) of Services, or of pods where there is none; this machine's server knows the rest."""

    def __init__(self, address: str, api: str, token: str) -> None:
        self._address = (address, 53)
        self._api = api
        self._token = token
        self._socket: socket.socket | None = None

    def start(self) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(self._address)
        threading.Thread(target=self._serve, args=(self._socket,), daemon=True).start()

    def stop(self) -> None:
        if self._socket is not None:
            self._socket.close()

    def _serve(self, server: socket.socket) -> None:
        while True:
            try:
                query, client = server.recvfrom(4096)
            except OSError:  # closed
                return
            threading.Thread(target=self._answer, args=(server, query, client), daemon=True).start()

    def _answer(self, server: socket.socket, query: bytes, client: Any) -> None:
        name, kind, end = _question(query)
        if not name.endswith(".cluster.local"):
            answer = _forward(query)
        else:
            addresses = self._addresses(name)
            answer = _response(query[:end], addresses or [], kind, is_known=addresses is not None)
        with contextlib.suppress(OSError):  # closed meanwhile
            server.sendto(answer, client)

    def _addresses(self, name: str) -> list[str] | None:
        """None: no such Service."""
        labels = name.removesuffix(f".{ZONE}").split(".")
        if len(labels) != 2 or not name.endswith(ZONE):
            return None
        service, namespace = labels
        found = self._get(f"namespaces/{namespace}/services/{service}")
        if found is None:
            return None
        if (address := found["spec"]["clusterIP"]) != "None":
            return [address]
        endpoints = self._get(f"namespaces/{namespace}/endpoints/{service}") or {}
        return [each["ip"] for subset in endpoints.get("subsets", []) for each in subset.get("addresses", [])]

    def _get(self, path: str) -> dict[str, Any] | None:
        request = urllib.request.Request(
            f"{self._api}/api/v1/{path}", headers={"Authorization": f"Bearer {self._token}"}
        )
        context = ssl._create_unverified_context()  # a server of this machine's own making
        try:
            with urllib.request.urlopen(request, timeout=FORWARD_S, context=context) as response:
                return dict(json.load(response))
        except OSError:
            return None


def _question(query: bytes) -> tuple[str, int, int]:
    """Name, type, and where the question ends."""
    labels, position = [], 12
    while length := query[position]:
        labels.append(query[position + 1 : position + 1 + length].decode())
        position += 1 + length
    (kind,) = struct.unpack_from(">H", query, position + 1)
    return ".".join(labels).lower(), kind, position + 5


def _response(question: bytes, addresses: list[str], kind: int, *, is_known: bool) -> bytes:
    records = addresses if kind == A else []
    header = question[:2] + struct.pack(">HHHHH", 0x8580 | (0 if is_known else 3), 1, len(records), 0, 0)
    body = b"".join(struct.pack(">HHHIH", 0xC00C, A, IN, TTL_S, 4) + socket.inet_aton(address) for address in records)
    return header + question[12:] + body


def _forward(query: bytes) -> bytes:
    lines = Path("/etc/resolv.conf").read_text().splitlines()
    server = next(line.split()[1] for line in lines if line.startswith("nameserver"))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as upstream:
        upstream.settimeout(FORWARD_S)
        upstream.sendto(query, (server, 53))
        return upstream.recv(4096)
