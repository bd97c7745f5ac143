"""Starting and stopping the whole service: what a user sees, and that nothing is left running."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import psutil
import pytest
from running_service import STOP_TIMEOUT_S, RunningService

Run = Callable[..., AbstractContextManager[RunningService]]


def serve(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """`nibble serve` where it is expected to fail."""
    return subprocess.run(
        [sys.executable, "-m", "nibble.cli", "serve", *arguments],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stop_leaves_no_process(run_service: Run, number: signal.Signals) -> None:
    """With an answer under way: it may end within the drain time, and then it is cut off."""
    with run_service() as service, service.client() as client:
        children = service.descendants()
        assert len(children) == 3
        stream = client.chat.completions.create(
            model="demo", messages=[{"role": "user", "content": "Count to 1000."}], max_tokens=1500, stream=True
        )
        next(stream)
        assert service.signal(number) < STOP_TIMEOUT_S
        assert service.process.returncode == 0
        assert not [child for child in children if child.is_running()]
        stream.close()


def test_killed_launcher_leaves_no_process(run_service: Run) -> None:
    with run_service() as service:
        children = service.descendants()
        service.signal(signal.SIGKILL)
        _, alive = psutil.wait_procs(children, timeout=STOP_TIMEOUT_S)
        assert not alive


def test_banner_says_what_runs_where_and_how_to_call_it(run_service: Run) -> None:
    with run_service() as service:
        pids = {str(child.pid) for child in service.descendants()}
        rows = [
            line for line in service.lines if re.match(r"  (gateway|worker-1|valkey) +\S+.* pid \d+ +\d+ MiB", line)
        ]
        assert {match[1] for line in rows if (match := re.search(r"pid (\d+)", line))} == pids
        assert any("cpu: " in line for line in rows if "worker-1" in line)
        start = next(index for index, line in enumerate(service.lines) if line.startswith("  curl "))
        command = "\n".join(service.lines[start : start + 2])
        result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=True)
        assert '"finish_reason"' in result.stdout


def test_worker_that_cannot_start_ends_the_launch_with_its_reason(demo_checkpoint: Path, cache_dir: Path) -> None:
    result = serve("--port", "0", NIBBLE_KV_CACHE_BYTES="1", NIBBLE_CACHE_DIR=str(cache_dir))
    assert result.returncode == 1
    last_line = result.stderr.splitlines()[-1]
    assert re.match(r"nibble: worker-1 ended with exit code \d+ before the service was ready: .*KV", last_line)
    assert "Traceback" not in result.stderr
