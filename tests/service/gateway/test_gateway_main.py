"""The gateway as a process: what it says when it cannot start, and how it stops."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import wait_for
from synthetic_worker import SyntheticWorker

from nibble.service.broker.embedded import EmbeddedValkey

ROOT = Path(__file__).parents[3]
BODY = {"model": "small", "messages": [{"role": "user", "content": "x"}], "stream": True}


def command(**variables: object) -> dict[str, Any]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("NIBBLE_")}
    environment |= {f"NIBBLE_{name.upper()}": str(value) for name, value in variables.items()}
    return {
        "args": [sys.executable, "-m", "nibble.service.gateway"],
        "env": environment,
        "cwd": ROOT,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
        "text": True,
    }


def start_fails(**variables: object) -> str:
    done = subprocess.run(**command(**variables), timeout=30, check=False)
    assert done.returncode == 1
    assert len(done.stdout.splitlines()) == 1, "one clear line"
    return str(done.stdout)


def test_taken_port_is_one_clear_line(model_dir: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = start_fails(model_dir=model_dir, port=port)
    assert line == f"nibble gateway: cannot listen on 127.0.0.1:{port}: Address already in use\n"


def test_unknown_host_is_one_clear_line(model_dir: Path) -> None:
    assert "cannot listen on no-such-host.invalid:8000" in start_fails(
        model_dir=model_dir, host="no-such-host.invalid", port=8000
    )


def test_missing_model_is_named(tmp_path: Path) -> None:
    assert str(tmp_path / "config.json") in start_fails(model_dir=tmp_path)


def test_setting_out_of_range_is_named(model_dir: Path) -> None:
    assert "NIBBLE_DRAIN_S" in start_fails(model_dir=model_dir, drain_s=-1)


def test_misspelt_setting_is_refused(model_dir: Path) -> None:
    assert "NIBBLE_PROT" in start_fails(model_dir=model_dir, prot=1)


class Process:
    """A gateway process on a free port."""

    def __init__(self, **variables: object) -> None:
        self.process = subprocess.Popen(**command(port=0, **variables))
        self.lines: list[str] = []
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if match := re.search(r"listening on (http://\S+)", line):
                self.url = match[1]
                return
        raise AssertionError(f"it did not start: {self.lines}")

    def wait(self) -> int:
        output, _ = self.process.communicate(timeout=20)
        self.lines += output.splitlines()
        return self.process.returncode


@pytest.fixture
def worker(valkey: EmbeddedValkey, namespace: str) -> Iterator[SyntheticWorker]:
    worker = SyntheticWorker(valkey.url, namespace, lambda request: [5])
    worker.start()
    assert worker.is_ready.wait(10)
    yield worker
    worker.stop()


@contextlib.contextmanager
def streaming(url: str) -> Iterator[Iterator[str]]:
    """A stream whose first chunk has come."""
    with httpx.Client(timeout=20) as client:
        wait_for(lambda: answers(client, url))
        with client.stream("POST", f"{url}/v1/chat/completions", json=BODY) as response:
            lines = response.iter_lines()
            next(lines)
            yield lines


def answers(client: httpx.Client, url: str) -> bool:
    try:
        return client.get(f"{url}/ready").status_code == 200
    except httpx.TransportError:
        return False


def test_running_answer_may_end_after_sigterm(
    valkey: EmbeddedValkey, namespace: str, model_dir: Path, worker: SyntheticWorker
) -> None:
    gateway = Process(redis_url=valkey.url, namespace=namespace, model_dir=model_dir, drain_s=15)
    worker.gate.clear()
    with streaming(gateway.url) as lines:
        gateway.process.send_signal(signal.SIGTERM)
        host, port = gateway.url.removeprefix("http://").split(":")
        wait_for(lambda: not accepts(host, int(port)))
        worker.gate.set()
        rest = list(lines)
    assert rest[-2:] == ["data: [DONE]", ""]
    assert any('"finish_reason":"length"' in line for line in rest)
    assert gateway.wait() == 0


def test_answer_that_outlasts_the_drain_ends_with_an_error_event(
    valkey: EmbeddedValkey, namespace: str, model_dir: Path, worker: SyntheticWorker
) -> None:
    gateway = Process(redis_url=valkey.url, namespace=namespace, model_dir=model_dir, drain_s=0.3)
    worker.gate.clear()
    with concurrent.futures.ThreadPoolExecutor(1) as threads, streaming(gateway.url) as lines:
        whole = threads.submit(httpx.post, f"{gateway.url}/v1/chat/completions", json={**BODY, "stream": False})
        wait_for(lambda: len(worker.seen) == 2)
        gateway.process.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]
    assert (whole.result().status_code, whole.result().headers["retry-after"]) == (503, "1")
    error = json.loads(rest[-2].removeprefix("data: "))["error"]
    assert (error["code"], rest[-1]) == ("shutting_down", "data: [DONE]")
    assert gateway.wait() == 0
    request_id = worker.seen[-1].request_id
    wait_for(lambda: request_id in worker.dropped)


def accepts(host: str, port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=1):
        return True
    return False
