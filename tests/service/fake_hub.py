"""As much of the Hugging Face hub's protocol as a download needs, on a port of this machine."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

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
    """Has one model, `some/model`, and a gated one."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.requested: list[str] = []  # files, by GET
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
            self._send_json([_entry(name) for name in FILES])
        elif path.startswith("/api/models/some/model"):
            siblings = [{"rfilename": name} for name in FILES]
            self._send_json({"id": "some/model", "sha": COMMIT, "siblings": siblings})
        elif file in FILES:
            self._send_file(file)
        elif "gated/model" in path:
            self._send(403, b"{}", {"X-Error-Code": "GatedRepo"})
        else:
            is_known = path.startswith("/some/model/")
            self._send(404, b"{}", {"X-Error-Code": "EntryNotFound" if is_known else "RepoNotFound"})

    def _send_json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {})

    def _send_file(self, name: str) -> None:
        content, wanted = FILES[name], self.headers.get("Range")
        if self.command == "GET":
            self.server.requested.append(name)
            self.server.ranges.append(wanted)
        headers = {"ETag": f'"{_entry(name)["oid"]}"', "X-Repo-Commit": COMMIT, "X-Linked-Size": str(len(content))}
        start = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted else 0
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._send(206 if start else 200, content[start:], headers)

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
        self.wfile.write(body)


def _entry(name: str) -> dict[str, object]:
    digest = hashlib.sha1(FILES[name]).hexdigest()
    return {"type": "file", "path": name, "size": len(FILES[name]), "oid": digest}
