"""One child process of the launcher: started so that it cannot outlive it, its output read line by line.

Linux only: `prctl(PR_SET_PDEATHSIG)` has the kernel kill the child when the *thread* that started it ends, so children
are started from the main thread. Each child leads its own session: a Ctrl-C in the terminal reaches the launcher
alone, which then stops its children in order.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass

_PIPE_BYTES = 1 << 16  # a pipe holds no more, so one read empties that of an ended process

# Runs in a bare interpreter (10 ms) that then becomes the program: a preexec_fn would run Python between fork and exec
# of a process that has threads. PR_SET_PDEATHSIG is 1; a parent that died before prctl is noticed by getppid.
_EXEC_WITH_PARENT = f"""
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, {signal.SIGKILL.value})
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""


@dataclass(frozen=True)
class ProcessSpec:
    """What to run. `environment` is the child's whole environment."""

    name: str  # shown before its log lines: gateway, worker-1
    argv: tuple[str, ...]  # argv[0] is a path
    environment: Mapping[str, str]


class ChildProcess:
    """A running child; stdout and stderr arrive together on `output_fd`, which never blocks."""

    def __init__(self, spec: ProcessSpec) -> None:
        self.spec = spec
        self.last_line = ""  # not blank: where a process fails, this mostly says why
        self.is_output_closed = False
        self._rest = b""  # an unfinished line
        self._popen = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _EXEC_WITH_PARENT, str(os.getpid()), *spec.argv],
            env=dict(spec.environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
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
        self.last_line = next((line for line in reversed(lines) if line), self.last_line)
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
