"""Ends a worker whose device hangs. A call into a driver cannot be interrupted, so the process has to go.

A thread looks at how long the running step has taken. Past the limit it does by itself what the main thread no longer
can: give the requests up, so that others take them over at once, say where every thread stands, and end the process
for its supervisor to start it again.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import threading
import time

from nibble.service.broker.errors import BrokerError
from nibble.service.broker.worker_side import WorkerBroker

logger = logging.getLogger(__name__)

STALLED_EXIT_CODE = 70  # EX_SOFTWARE of sysexits.h
MAX_LOOK_INTERVAL_S = 1.0
END_S = 10.0  # a broker that is away, a full pipe: nothing may keep the process longer than that
# A call that never lets go of the interpreter stops this thread too. A timer that needs no interpreter then ends the
# process so long after the limit, with exit code 1; the lease has run out by itself by then.
FROZEN_S = 30.0


class StepWatchdog:
    """`with watchdog:` around each step; started once, from the process's `__main__` alone: it ends the process."""

    def __init__(self, broker: WorkerBroker, timeout_s: float) -> None:
        self._broker = broker
        self._timeout_s = timeout_s
        self._started_s: float | None = None  # of the running step
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="nibble-watchdog", daemon=True)

    def __enter__(self) -> None:
        self._started_s = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._started_s = None

    @property
    def step_s(self) -> float:
        """How long the running step has taken so far; 0 between two steps."""
        started_s = self._started_s
        return 0.0 if started_s is None else time.monotonic() - started_s

    @property
    def is_stalled(self) -> bool:
        """Whether a step has not finished within the limit."""
        return self.step_s > self._timeout_s

    def health(self) -> tuple[bool, dict[str, float]]:
        """As `serve_http` wants it."""
        return not self.is_stalled, {"step_s": round(self.step_s, 3), "step_limit_s": self._timeout_s}

    def start(self) -> None:
        self._defer_exit()
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def _run(self) -> None:
        interval_s = min(MAX_LOOK_INTERVAL_S, self._timeout_s / 4)
        while not self._stop.wait(interval_s):
            if self.is_stalled:
                self._end()
            self._defer_exit()

    def _defer_exit(self) -> None:
        faulthandler.dump_traceback_later(self._timeout_s + FROZEN_S, exit=True)

    def _end(self) -> None:
        limit_exit()
        step_s = self.step_s
        try:
            num_requests = self._broker.give_up()
        except BrokerError as error:
            logger.critical("event=give_up_failed error=%r: the lease will expire", str(error))
        else:
            logger.critical("event=gave_up num_requests=%d", num_requests)
        logger.critical("event=step_stalled step_s=%.1f limit_s=%g", step_s, self._timeout_s)
        faulthandler.dump_traceback()
        os._exit(STALLED_EXIT_CODE)


def limit_exit() -> None:
    """The process ends within END_S from now, whatever its other threads or a broken device's driver do."""
    faulthandler.dump_traceback_later(END_S, exit=True)
