"""A worker whose device hangs or fails, in a process of its own, over real Valkey: who notices, and what follows."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from broken_worker import NUM_SOUND_STEPS, TIMEOUT_S
from counting import collect, make_request, running_worker
from prometheus_client import CollectorRegistry

from nibble.engine.protocol import FinishReason, TokenEvent
from nibble.service.broker.gateway_side import GatewayBroker
from nibble.service.broker.worker_side import WorkerBroker
from nibble.service.launcher import supervisor as supervisor_module
from nibble.service.launcher.process import ProcessSpec
from nibble.service.launcher.supervisor import Supervisor
from nibble.service.worker.http import serve_http
from nibble.service.worker.watchdog import STALLED_EXIT_CODE, StepWatchdog

SCRIPT = Path(__file__).with_name("broken_worker.py")
END_S = 20.0  # for a process to end, on a machine with other things to do


@pytest.fixture
async def gateway(redis_url: str, namespace: str) -> AsyncIterator[GatewayBroker]:
    broker = GatewayBroker(redis_url, "g", namespace=namespace, needs_worker=False)
    await broker.start()
    yield broker
    await broker.close()


def start_worker(redis_url: str, namespace: str, how: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(SCRIPT), redis_url, namespace, how]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def output_of(process: subprocess.Popen[str]) -> str:
    try:
        process.wait(END_S)
    finally:
        process.kill()
        output = process.communicate()[0]
    return output


@pytest.mark.parametrize(("how", "exit_code"), [("hang", STALLED_EXIT_CODE), ("fail", 1)])
async def test_a_broken_workers_requests_are_taken_over_at_once(
    redis_url: str, namespace: str, gateway: GatewayBroker, how: str, exit_code: int
) -> None:
    """Its lease has two minutes to go."""
    stream = aiter(await gateway.submit(make_request("r", max_tokens=40)))
    process = start_worker(redis_url, namespace, how)
    events: list[TokenEvent] = [await anext(stream) for _ in range(NUM_SOUND_STEPS)]
    begin_s = time.monotonic()
    with running_worker(redis_url, namespace, "sound") as sound:
        events += [event async for event in stream]
        took_s = time.monotonic() - begin_s
        assert sound.started_at == {"r": NUM_SOUND_STEPS}
    assert [token for event in events for token in event.token_ids] == [10 + i for i in range(40)]
    assert events[-1].finish_reason is FinishReason.LENGTH
    assert took_s < 10
    output = await asyncio.to_thread(output_of, process)
    assert process.returncode == exit_code, output
    assert "event=gave_up num_requests=1" in output
    assert {"hang": "event=step_stalled", "fail": "RuntimeError: the device is lost"}[how] in output
    assert 'broken_worker.py", line' in output  # where it stood


async def test_a_worker_whose_step_keeps_the_interpreter_ends_too(
    redis_url: str, namespace: str, gateway: GatewayBroker
) -> None:
    stream = aiter(await gateway.submit(make_request("r", max_tokens=40)))
    process = start_worker(redis_url, namespace, "freeze")
    await anext(stream)
    output = await asyncio.to_thread(output_of, process)
    assert process.returncode == 1, output
    assert "in _break" in output


async def test_what_hangs_every_worker_is_given_up(redis_url: str, namespace: str, gateway: GatewayBroker) -> None:
    stream = await gateway.submit(make_request("poison", max_tokens=40))
    for _ in range(3):
        process = start_worker(redis_url, namespace, "hang")
        await asyncio.to_thread(output_of, process)
        assert process.returncode == STALLED_EXIT_CODE
    _, last = await collect(stream)
    assert last.finish_reason is FinishReason.ERROR
    assert last.error == "given up: 3 workers in a row were lost while serving this request"


def test_the_launcher_starts_a_stalled_worker_again_and_its_request_goes_on(
    redis_url: str, namespace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor_module, "FIRST_RESTART_S", 0.01)
    lines: list[str] = []
    supervisor = Supervisor(lambda _, line: lines.append(line))
    argv = (sys.executable, str(SCRIPT), redis_url, namespace, "hang", str(tmp_path / "marker"))
    supervisor.start(ProcessSpec("worker-1", argv, dict(os.environ)))

    async def ask() -> list[int]:
        broker = GatewayBroker(redis_url, "g", namespace=namespace, needs_worker=False)
        await broker.start()
        token_ids, _ = await collect(await broker.submit(make_request("r", max_tokens=40)))
        await broker.close()
        return token_ids

    def look() -> None:
        supervisor.stop_requested = answer.done()

    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(asyncio.run, ask())
        supervisor.supervise(look)
    supervisor.close()
    assert answer.result() == [10 + i for i in range(40)]
    assert any(f"ended with exit code {STALLED_EXIT_CODE}; it starts again" in line for line in lines)


def test_health_is_503_while_a_step_is_over_its_limit(redis_url: str, namespace: str) -> None:
    watchdog = StepWatchdog(WorkerBroker(redis_url, "w", namespace=namespace), timeout_s=0.05)
    server = serve_http("127.0.0.1", 0, CollectorRegistry(), watchdog.health)
    url = f"http://127.0.0.1:{server.server_port}"
    try:
        assert httpx.get(f"{url}/health").json() == {"status": "ok", "step_s": 0.0, "step_limit_s": 0.05}
        with watchdog:
            threading.Event().wait(0.1)
            answer = httpx.get(f"{url}/health")
            assert (answer.status_code, answer.json()["status"]) == (503, "stalled")
            assert httpx.get(f"{url}/metrics").status_code == 200
        assert httpx.get(f"{url}/health").status_code == 200
    finally:
        server.shutdown()
        server.server_close()


def test_short_steps_never_count_together(redis_url: str, namespace: str) -> None:
    watchdog = StepWatchdog(WorkerBroker(redis_url, "w", namespace=namespace), timeout_s=0.2)
    for _ in range(4):
        with watchdog:
            threading.Event().wait(0.1)
        assert not watchdog.is_stalled
    assert TIMEOUT_S > watchdog.step_s == 0.0
