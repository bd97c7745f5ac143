"""As much of the Hugging Face hub's protocol as a download needs, on a port of this machine."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest
from huggingface_hub import constants

NOWHERE = "http://127.0.0.1:9"
COMMIT = "c" * 40
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": bytes(range(256)) * 40,
    "pytorch_model.bin": b"a pickle",
    "consolidated.safetensors": b"the same again",
    "onnx/config.json": b"{}",
    "modeling.py": b"raise SystemExit",
    "model-q4.gguf": b"GGUF" + bytes(100),
}


class FakeHub(ThreadingHTTPServer):
    """Has one model, `some/model`, and a gated one. knows_ranges: whether it heeds them."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.files = dict(FILES)
        self.knows_ranges = True
        self.requested: list[str] = []  # files, by GET
        self.num_bytes = 0  # of files, sent
        self.ranges: list[str | None] = []
        self.breaks_off = False  # in the middle of every large file


@contextmanager
def running_hub() -> Iterator[FakeHub]:
    hub = FakeHub()
    thread = threading.Thread(target=hub.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()


def point_to(address: str, patch: pytest.MonkeyPatch) -> None:
    """Make `huggingface_hub` take what is at this address for the hub."""
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + template)
    patch.setattr(constants, "ENDPOINT", address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeHub

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        file = path.removeprefix(f"/some/model/resolve/{path.split('/')[4] if path.count('/') > 4 else ''}/")
        if path.startswith("/api/models/some/model/tree/"):
            self._send_json([self._entry(name) for name in self.server.files])
        elif path.startswith("/api/models/some/model"):
            siblings = [{"rfilename": name, "size": len(content)} for name, content in self.server.files.items()]
            self._send_json({"id": "some/model", "sha": COMMIT, "siblings": siblings})
        elif file in self.server.files:
            self._send_file(file)
        elif "gated/model" in path:
            self._send(403, b"{}", {"X-Error-Code": "GatedRepo"})
        else:
            is_known = path.startswith("/some/model/")
            self._send(404, b"{}", {"X-Error-Code": "EntryNotFound" if is_known else "RepoNotFound"})

    def _send_json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {})

    def _send_file(self, name: str) -> None:
        content, wanted = self.server.files[name], self.headers.get("Range")
        headers = {"ETag": f'"{self._entry(name)["oid"]}"', "X-Repo-Commit": COMMIT, "X-Linked-Size": str(len(content))}
        if self.command == "GET":
            self.server.requested.append(name)
            self.server.ranges.append(wanted)
        if wanted is None or not self.server.knows_ranges:
            self._send(200, content, headers)
            return
        start, end = (int(number or len(content) - 1) for number in wanted.removeprefix("bytes=").split("-"))
        headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
        self._send(206, content[start : end + 1], headers)

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.server.breaks_off and len(body) > 5000:
            body = body[: len(body) // 2]
            self.close_connection = True
        for start in range(0, len(body), 1 << 16):
            try:
                self.wfile.write(body[start : start + (1 << 16)])
            except ConnectionError:  # it has what it wanted
                self.close_connection = True
                return
            self.server.num_bytes += len(body[start : start + (1 << 16)])

    def _entry(self, name: str) -> dict[str, object]:
        content = self.server.files[name]
        return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
