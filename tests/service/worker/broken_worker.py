"""A worker process whose device breaks: `broken_worker.py URL NAMESPACE HOW [MARKER]`.

HOW: hang (in a call that Python cannot interrupt), freeze (the same, and it keeps the interpreter) or fail. A file
MARKER is made at the first breakdown; where it is there already, the worker is sound.
"""

from __future__ import annotations

import ctypes
import logging
import sys
from pathlib import Path

from counting import CountingEngine

from nibble.engine.protocol import TokenEvent
from nibble.service.broker.wire import WorkerInfo
from nibble.service.broker.worker_side import WorkerBroker
from nibble.service.worker import watchdog as watchdog_module
from nibble.service.worker.__main__ import _run
from nibble.service.worker.loop import WorkerLoop
from nibble.service.worker.metrics import WorkerMetrics
from nibble.service.worker.watchdog import StepWatchdog

LEASE_S = 120.0  # longer than any test: nobody takes anything over because of it
TIMEOUT_S = 0.5
NUM_SOUND_STEPS = 3


class BreakingEngine(CountingEngine):
    """Computes some steps; then it does not come back from one."""

    def __init__(self, how: str, marker: Path | None) -> None:
        super().__init__()
        self._how = how
        self._marker = marker
        self._num_left = NUM_SOUND_STEPS

    def step(self) -> list[TokenEvent]:
        if self._num_left == 0 and not (self._marker and self._marker.exists()):
            if self._marker:
                self._marker.touch()
            self._break()
        self._num_left -= 1
        return super().step()

    def _break(self) -> None:
        if self._how == "fail":
            raise RuntimeError("the device is lost")
        library: ctypes.CDLL = ctypes.PyDLL(None) if self._how == "freeze" else ctypes.CDLL(None)
        while True:
            library.pause()


def main(url: str, namespace: str, how: str, marker: str | None = None) -> None:
    logging.basicConfig(level=logging.INFO)
    watchdog_module.FROZEN_S = 0.5
    info = WorkerInfo(worker_id="broken", model="m", device="d", state="ready", max_num_sequences=4)
    broker = WorkerBroker(url, "broken", namespace=namespace, lease_s=LEASE_S)
    engine = BreakingEngine(how, Path(marker) if marker else None)
    watchdog = StepWatchdog(broker, TIMEOUT_S)
    _run(WorkerLoop(engine, broker, WorkerMetrics("m", 1e9, False), info, 0.1, TIMEOUT_S, watchdog), watchdog)


if __name__ == "__main__":
    main(*sys.argv[1:])
