"""SIGTERM to a gateway or worker that still loads: as process 1 of a container it has no default that would end it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

TIMEOUT_S = 60.0


@pytest.mark.parametrize(
    ("module", "file"), [("nibble.service.gateway", "config.json"), ("nibble.service.worker", "model.safetensors")]
)
def test_a_process_that_loads_ends_at_once(module: str, file: str, tmp_path: Path) -> None:
    """It blocks in reading a pipe; to open that for writing succeeds as soon as it does. A handler's exit, no kill."""
    os.mkfifo(tmp_path / file)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("NIBBLE_")}
    environment |= {"NIBBLE_MODEL_DIR": str(tmp_path), "NIBBLE_DEVICE": "cpu"}
    with subprocess.Popen([sys.executable, "-m", module], env=environment) as process:
        pipe = open_when_read(tmp_path / file, process)
        process.send_signal(signal.SIGTERM)
        try:
            assert process.wait(TIMEOUT_S) == 128 + signal.SIGTERM
        finally:
            process.kill()
            os.close(pipe)


def open_when_read(path: Path, process: subprocess.Popen[bytes]) -> int:
    deadline_s = time.monotonic() + TIMEOUT_S
    while True:
        try:
            return os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:  # nobody reads it yet
            assert process.poll() is None, "it ended by itself"
            assert time.monotonic() < deadline_s
            time.sleep(0.02)
