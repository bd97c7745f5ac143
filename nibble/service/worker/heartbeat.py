"""Keeps the worker's lease while a step takes long: a large prefill on a slow machine is not a lost worker.

The loop's exchange renews the lease at every step. This thread renews it in between, but for max_step_s after the last
sign of life at most: the lease of a worker that hangs must expire, so that others take its requests over. (Where a step
hangs, `watchdog.py` does not even wait for that.)
"""

from __future__ import annotations

import logging
import threading
import time

from nibble.service.broker.errors import BrokerError
from nibble.service.broker.worker_side import WorkerBroker

logger = logging.getLogger(__name__)


class Heartbeat:
    """Renews the lease of `broker` every interval_s in which `beat` was not called."""

    def __init__(self, broker: WorkerBroker, interval_s: float, max_step_s: float) -> None:
        self._broker = broker
        self._interval_s = interval_s
        self._max_step_s = max_step_s
        self._beat_s = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="nibble-heartbeat", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def beat(self) -> None:
        """The loop lives: it has just renewed the lease itself."""
        self._beat_s = time.monotonic()

    def stop(self) -> None:
        """End the thread; the lease is not renewed afterwards."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self._interval_s):
            silent_s = time.monotonic() - self._beat_s
            if self._interval_s <= silent_s <= self._max_step_s:
                try:
                    self._broker.renew()
                except BrokerError as error:  # the loop's next exchange sees it too, and handles it
                    logger.warning("event=renew_failed error=%r", str(error))
