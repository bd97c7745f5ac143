"""Starts whole services with the demo model."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from running_service import STOP_TIMEOUT_S, RunningService, free_ports


@pytest.fixture(scope="session")
def run_service(demo_checkpoint: Path, cache_dir: Path) -> Callable[..., object]:
    """`with run_service(num_workers=2) as service:` starts one and waits until it is ready."""

    @contextmanager
    def run(num_workers: int = 1, **variables: str) -> Iterator[RunningService]:
        port = free_ports(1 + num_workers)
        command = [sys.executable, "-m", "nibble.cli", "serve", "--port", str(port), "--model-name", "demo"]
        if "TEST_DEMO_CHECKPOINT" in os.environ:
            command += ["--model", str(demo_checkpoint)]
        environment = {
            **os.environ,
            "NIBBLE_METRICS_PORT": str(port + 1),
            "NIBBLE_NUM_WORKERS": str(num_workers),
            "NIBBLE_CACHE_DIR": str(cache_dir),
            "NIBBLE_KV_CACHE_BYTES": "64MiB",
            "PYTHONUNBUFFERED": "1",
            **variables,
        }
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        service = RunningService(process, port, port + 1)
        try:
            service.wait_for_line("Ctrl-C stops the service")
            yield service
        finally:
            children = service.descendants() if process.poll() is None else []
            if process.poll() is None:
                service.signal(signal.SIGTERM)
            _, alive = psutil.wait_procs(children, timeout=STOP_TIMEOUT_S)
            for child in alive:
                child.kill()
            assert process.stdout is not None
            service._reader.join(STOP_TIMEOUT_S)
            process.stdout.close()
            sys.stdout.write("\n".join(service.lines) + "\n")  # pytest shows it where a test failed
            assert not alive, f"left running: {alive}"

    return run
