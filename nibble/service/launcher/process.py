"""One child process of the launcher: started so that it cannot outlive it, its output read line by line.

Linux only: `prctl(PR_SET_PDEATHSIG)` has the kernel kill the child when the *thread* that started it ends, so children
are started from the main thread. Each child leads its own session: a Ctrl-C in the terminal reaches the launcher
alone, which then stops its children in order.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

NUM_KEPT_LINES = 20  # shown when a process fails: enough for an error with the end of its traceback
_PIPE_BYTES = 1 << 16  # a pipe holds no more, so one read empties that of an ended process
_PR_SET_PDEATHSIG = 1  # <sys/prctl.h>
_libc = ctypes.CDLL(None, use_errno=True)  # loaded here: nothing may be loaded between fork and exec


@dataclass(frozen=True)
class ProcessSpec:
    """What to run. `environment` is the child's whole environment."""

    name: str  # shown before its log lines: gateway, worker-1
    argv: tuple[str, ...]
    environment: Mapping[str, str]


class ChildProcess:
    """A running child; stdout and stderr arrive together on `output_fd`, which never blocks."""

    def __init__(self, spec: ProcessSpec) -> None:
        self.spec = spec
        self.last_lines: deque[str] = deque(maxlen=NUM_KEPT_LINES)
        self.is_output_closed = False
        self._rest = b""  # an unfinished line
        launcher_pid = os.getpid()

        def before_exec() -> None:
            _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != launcher_pid:  # the launcher died before prctl took effect
                os._exit(1)

        self._popen = subprocess.Popen(
            spec.argv,
            env=dict(spec.environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=before_exec,
        )
        assert self._popen.stdout is not None
        self.output_fd = self._popen.stdout.fileno()
        os.set_blocking(self.output_fd, False)

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs; minus the signal's number if one killed it."""
        return self._popen.poll()

    def read_lines(self) -> list[str]:
        """The complete lines that have arrived; at the end of the output the incomplete last one too."""
        try:
            data = os.read(self.output_fd, _PIPE_BYTES)
        except BlockingIOError:
            return []
        if not data:
            self.is_output_closed = True
        *pieces, self._rest = (self._rest + data).split(b"\n")
        if self.is_output_closed and self._rest:
            pieces.append(self._rest)
            self._rest = b""
        lines = [piece.decode(errors="replace").rstrip() for piece in pieces]
        self.last_lines.extend(lines)
        return lines

    def send(self, signal_number: signal.Signals) -> None:
        """Does nothing to a process that has ended."""
        self._popen.send_signal(signal_number)

    def close(self) -> None:
        """Release the pipe of a process that has ended."""
        assert self._popen.stdout is not None
        self._popen.stdout.close()

    def describe_end(self) -> str:
        """`ended with exit code 1` or `was killed by SIGKILL`."""
        code = self.exit_code
        assert code is not None, f"{self.name} is still running"
        if code >= 0:
            return f"ended with exit code {code}"
        return f"was killed by {signal.Signals(-code).name}"
