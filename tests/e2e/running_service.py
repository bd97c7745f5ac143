"""A whole service as a user starts it: `nibble serve` in a process of its own, its output read by a thread."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import threading
import time

import httpx
import openai
import psutil

START_TIMEOUT_S = 240.0  # the first start on a machine compiles the kernels
STOP_TIMEOUT_S = 5.0  # what the launcher promises


class RunningService:
    """The launcher's process, what it printed, and the processes it started."""

    def __init__(self, process: subprocess.Popen[str], port: int, metrics_port: int) -> None:
        self.process = process
        self.url = f"http://127.0.0.1:{port}"
        self.lines: list[str] = []
        self.metrics_port = metrics_port
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def wait_for_line(self, pattern: str, timeout_s: float = START_TIMEOUT_S) -> str:
        """The first line, of those printed already too, in which the pattern is found."""
        deadline_s = time.monotonic() + timeout_s
        with self._changed:
            while True:
                found = next((line for line in self.lines if re.search(pattern, line)), None)
                if found is not None:
                    return found
                left_s = deadline_s - time.monotonic()
                if left_s <= 0 or not self._reader.is_alive():
                    raise AssertionError(f"no line with {pattern!r}:\n" + "\n".join(self.lines))
                self._changed.wait(min(left_s, 0.5))

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def workers(self) -> list[psutil.Process]:
        return [child for child in self.descendants() if "nibble.service.worker" in child.cmdline()]

    def running_sequences(self, worker: int = 0) -> int:
        """The gauge of one worker."""
        text = httpx.get(f"http://127.0.0.1:{self.metrics_port + worker}/metrics").text
        match = re.search(r"^nibble_running_sequences\{.*\} (\S+)$", text, re.MULTILINE)
        assert match, text
        return int(float(match[1]))

    def signal(self, number: signal.Signals) -> float:
        """Send it to the launcher and wait for its end. The seconds that took."""
        start_s = time.monotonic()
        self.process.send_signal(number)
        self.process.wait(STOP_TIMEOUT_S + 10)
        return time.monotonic() - start_s

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._changed:
                self.lines.append(line.rstrip())
                self._changed.notify_all()


def free_ports(count: int) -> int:
    """The first of `count` neighbouring free ports."""
    for _ in range(100):
        with socket.create_server(("127.0.0.1", 0)) as probe:
            first = int(probe.getsockname()[1])
        if all(_is_free(first + index) for index in range(count)):
            return first
    raise AssertionError("no neighbouring free ports")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0
