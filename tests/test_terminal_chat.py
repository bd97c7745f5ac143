"""`nibble chat` in a pseudo-terminal, against a small HTTP server that streams what the test tells it to."""

from __future__ import annotations

import json
import os
import re
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

CTRL_C, CTRL_D = b"\x03", b"\x04"
TIMEOUT_S = 15.0


class ScriptedServer(ThreadingHTTPServer):
    """Streams `pieces`; with `is_endless`, goes on with dots until the client leaves."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.pieces = ["Hel", "lo", "!"]
        self.is_endless = False
        self.error: tuple[int, str] | None = None
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.client_left = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: ScriptedServer

    def do_GET(self) -> None:
        self._json(200, {"data": [{"id": "first"}, {"id": "second"}]})

    def do_POST(self) -> None:
        self.server.bodies.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        self.server.keys.append(self.headers["authorization"])
        if self.server.error:
            status, message = self.server.error
            self._json(status, {"error": {"message": message, "type": "t", "param": None, "code": None}})
            return
        self.send_response(200)
        self.end_headers()
        self._event({"role": "assistant", "content": ""})
        for piece in self.server.pieces:
            self._event({"content": piece})
        try:
            while self.server.is_endless:
                self._event({"content": "."})
                time.sleep(0.01)
        except OSError:
            self.server.client_left.set()
            return
        self._event({})
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _event(self, delta: dict[str, str]) -> None:
        self.wfile.write(f"data: {json.dumps({'choices': [{'index': 0, 'delta': delta}]})}\n\n".encode())
        self.wfile.flush()

    def _json(self, status: int, body: dict[str, Any]) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())


class Terminal:
    """`nibble chat` with a terminal of its own, so that Ctrl-C and Ctrl-D are what they are for a person."""

    def __init__(self, *arguments: str, **variables: str) -> None:
        self._master, slave = os.openpty()
        command = ["setsid", "--ctty", "--wait", sys.executable, "-m", "nibble.cli", "chat", *arguments]
        environment = {**os.environ, "TERM": "dumb", **variables}
        self.process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=environment)
        os.close(slave)
        self._unread = ""

    def type(self, text: str) -> None:
        self.press(text.encode() + b"\n")

    def press(self, keys: bytes) -> None:
        os.write(self._master, keys)

    def read_until(self, pattern: str) -> str:
        """What was shown up to and with the first match."""
        end_s = time.monotonic() + TIMEOUT_S
        while (match := re.search(pattern, self._unread)) is None:
            assert select.select([self._master], [], [], max(0.0, end_s - time.monotonic()))[0], (
                f"no {pattern!r} in {self._unread!r}"
            )
            self._unread += os.read(self._master, 4096).decode().replace("\r", "")
        shown, self._unread = self._unread[: match.end()], self._unread[match.end() :]
        return shown

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.is_endless = False
        server.shutdown()
        thread.join()


@pytest.fixture
def chat(server: ScriptedServer) -> Iterator[Terminal]:
    terminal = Terminal("--url", server.url, "--temperature", "0", "--max-tokens", "7", "--system", "Be brief.")
    terminal.read_until("> ")
    yield terminal
    terminal.close()


def roles_and_texts(body: dict[str, Any]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in body["messages"]]


def test_answers_are_streamed_and_remembered(server: ScriptedServer, chat: Terminal) -> None:
    chat.type("Hi")
    chat.read_until("Hello!\n\n> ")
    chat.type("Again")
    chat.read_until("Hello!\n\n> ")
    first, second = server.bodies
    assert first["model"] == "first"
    assert (first["temperature"], first["max_tokens"], first["stream"]) == (0, 7, True)
    assert roles_and_texts(first) == [("system", "Be brief."), ("user", "Hi")]
    assert roles_and_texts(second)[1:] == [("user", "Hi"), ("assistant", "Hello!"), ("user", "Again")]


def test_ctrl_c_stops_the_answer_and_keeps_what_arrived(server: ScriptedServer, chat: Terminal) -> None:
    server.is_endless = True
    chat.type("Count")
    chat.read_until(r"Hello!\.\.\.")
    chat.press(CTRL_C)
    chat.read_until(r"\(stopped\)\n\n> ")
    assert server.client_left.wait(TIMEOUT_S), "the connection stayed open"
    server.is_endless = False
    chat.type("Go on")
    chat.read_until("Hello!\n\n> ")
    assert roles_and_texts(server.bodies[1])[2][1].startswith("Hello!...")


def test_reset_forgets_the_conversation_but_not_the_system_message(server: ScriptedServer, chat: Terminal) -> None:
    chat.type("Hi")
    chat.read_until("Hello!\n\n> ")
    chat.type("/reset")
    chat.read_until("> ")
    chat.type("New")
    chat.read_until("Hello!\n\n> ")
    assert roles_and_texts(server.bodies[1]) == [("system", "Be brief."), ("user", "New")]


def test_system_command_begins_a_new_conversation(server: ScriptedServer, chat: Terminal) -> None:
    chat.type("/system Speak French.")
    chat.read_until("> ")
    chat.type("Hi")
    chat.read_until("Hello!\n\n> ")
    assert roles_and_texts(server.bodies[0]) == [("system", "Speak French."), ("user", "Hi")]


def test_refused_question_is_explained_and_forgotten(server: ScriptedServer, chat: Terminal) -> None:
    server.error = (400, "the prompt is too long")
    chat.type("Too long")
    chat.read_until("error: the prompt is too long\n\n> ")
    server.error = None
    chat.type("Shorter")
    chat.read_until("Hello!\n\n> ")
    assert roles_and_texts(server.bodies[1])[1:] == [("user", "Shorter")]


@pytest.mark.parametrize("keys", [CTRL_C, CTRL_D, b"/exit\n"])
def test_leaving_at_the_prompt(chat: Terminal, keys: bytes) -> None:
    """A signal that comes while readline sets up its prompt waits for the next key, as it does for a person."""
    for _ in range(20):
        chat.press(keys)
        try:
            assert chat.process.wait(0.5) == 0
            return
        except subprocess.TimeoutExpired:
            assert keys == CTRL_C, "the chat goes on"
    raise AssertionError("the chat goes on")


def test_help_and_unknown_commands_list_the_commands(server: ScriptedServer, chat: Terminal) -> None:
    chat.type("/help")
    assert "/reset" in chat.read_until("> ")
    chat.type("/bogus")
    assert "/bogus is no command\n/reset" in chat.read_until("> ")
    assert not server.bodies


def test_key_comes_from_the_services_own_variable(server: ScriptedServer) -> None:
    terminal = Terminal("--url", server.url, "--model", "second", NIBBLE_API_KEYS="one, two")
    terminal.read_until("> ")
    terminal.type("Hi")
    terminal.read_until("Hello!")
    assert server.keys == ["Bearer one"]
    assert server.bodies[0]["model"] == "second"
    terminal.close()


def test_absent_service_is_one_clear_line(server: ScriptedServer) -> None:
    url = "http://127.0.0.1:1"
    result = subprocess.run(
        [sys.executable, "-m", "nibble.cli", "chat", "--url", url], capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert result.stderr == f"nibble: no service answers at {url}; start one with `nibble serve`\n"
