"""Runs the launcher's children in one thread: their log lines, their ends, and their restarts with backoff.

One selector waits for output, for signals (through a wakeup descriptor) and for the next restart. Everything happens in
the main thread, which lives as long as the launcher: PR_SET_PDEATHSIG is tied to the thread that starts a child.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from nibble.service.launcher.process import ChildProcess, ProcessSpec

FIRST_RESTART_S = 0.5
MAX_RESTART_S = 30.0
HEALTHY_RUN_S = 60.0  # a process that ran this long starts again without having its earlier ends held against it
_TICK_S = 0.2  # ends are noticed by SIGCHLD; this bounds the wait if one is missed


@dataclass
class _Restart:
    """When an ended process starts again."""

    spec: ProcessSpec
    at_s: float


class Supervisor:
    """Owns the children. `log(name, line)` gets each of their lines, and the supervisor's own under `nibble`."""

    def __init__(self, log: Callable[[str, str], None]) -> None:
        self.stop_requested = False
        self.children: list[ChildProcess] = []
        self.log = log
        self._num_interrupts = 0
        self._selector = selectors.DefaultSelector()
        self._wakeup_read, self._wakeup_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._selector.register(self._wakeup_read, selectors.EVENT_READ)
        self._restarts: list[_Restart] = []
        self._num_failures: dict[str, int] = {}
        self._started_s: dict[str, float] = {}

    @contextlib.contextmanager
    def handling_signals(self) -> Iterator[None]:
        """SIGINT, SIGTERM and SIGHUP set `stop_requested`; SIGCHLD ends a wait at once."""
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD)
        old = {number: signal.signal(number, self._on_signal) for number in numbers}
        old_fd = signal.set_wakeup_fd(self._wakeup_write, warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(old_fd)
            for number, handler in old.items():
                signal.signal(number, handler)

    def start(self, spec: ProcessSpec) -> ChildProcess:
        child = ChildProcess(spec)
        self.children.append(child)
        self._started_s[spec.name] = time.monotonic()
        self._selector.register(child.output_fd, selectors.EVENT_READ, child)
        return child

    def run_once(self, timeout_s: float = _TICK_S) -> list[ChildProcess]:
        """Wait for something, pass on log lines, and return the children that have ended (they are forgotten)."""
        for key, _ in self._selector.select(timeout_s):
            if key.data is None:
                with contextlib.suppress(BlockingIOError):
                    os.read(self._wakeup_read, 4096)
            else:
                self._pass_on_lines(key.data)
        ended = [child for child in self.children if child.exit_code is not None]
        for child in ended:
            self._forget(child)
        return ended

    def supervise(self, on_tick: Callable[[], None] = lambda: None) -> None:
        """Keep every process running until a stop is requested. on_tick is called several times a second."""
        while not self.stop_requested:
            on_tick()
            for child in self.run_once():
                self._schedule_restart(child)
            now_s = time.monotonic()
            for restart in [r for r in self._restarts if r.at_s <= now_s]:
                self._restarts.remove(restart)
                child = self.start(restart.spec)
                self.log("nibble", f"{child.name} started again (pid {child.pid})")

    def stop(self, children: Iterable[ChildProcess], grace_s: float) -> None:
        """SIGTERM, and SIGKILL for those still there after grace_s or a second Ctrl-C. Returns when all have ended."""
        waiting = [child for child in children if child in self.children]
        for child in waiting:
            child.send(signal.SIGTERM)
        deadline_s = time.monotonic() + grace_s
        while any(child in self.children for child in waiting):
            left_s = deadline_s - time.monotonic()
            if left_s <= 0 or self._num_interrupts > 1:
                self._kill([child for child in waiting if child in self.children])
                return
            self.run_once(min(left_s, _TICK_S))

    def close(self) -> None:
        """Kill what is left and release the descriptors."""
        self._kill(self.children)
        self._selector.close()
        os.close(self._wakeup_read)
        os.close(self._wakeup_write)

    def _kill(self, children: Iterable[ChildProcess]) -> None:
        remaining = list(children)
        for child in remaining:
            self.log("nibble", f"{child.name} (pid {child.pid}) did not stop in time and is killed")
            child.send(signal.SIGKILL)
        while any(child in self.children for child in remaining):
            self.run_once()

    def _on_signal(self, number: int, _frame: object) -> None:
        if number != signal.SIGCHLD:
            self.stop_requested = True
        if number == signal.SIGINT:
            self._num_interrupts += 1

    def _pass_on_lines(self, child: ChildProcess) -> None:
        for line in child.read_lines():
            self.log(child.name, line)
        if child.is_output_closed:
            self._selector.unregister(child.output_fd)

    def _forget(self, child: ChildProcess) -> None:
        for _ in range(2):  # a full pipe, then its end; a process of the child's own may hold it open
            if not child.is_output_closed:
                self._pass_on_lines(child)
        if not child.is_output_closed:
            self._selector.unregister(child.output_fd)
        child.close()
        self.children.remove(child)

    def _schedule_restart(self, child: ChildProcess) -> None:
        name = child.name
        if time.monotonic() - self._started_s[name] > HEALTHY_RUN_S:
            self._num_failures[name] = 0
        delay_s = min(MAX_RESTART_S, FIRST_RESTART_S * 2 ** self._num_failures.get(name, 0))
        self._num_failures[name] = self._num_failures.get(name, 0) + 1
        self._restarts.append(_Restart(child.spec, time.monotonic() + delay_s))
        self.log("nibble", f"{name} (pid {child.pid}) {child.describe_end()}; it starts again in {delay_s:g} s")
