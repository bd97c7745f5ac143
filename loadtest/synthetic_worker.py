"""A worker process around the synthetic engine: the real loop, the real broker connection, a clock for an engine.

Started by `token_latency`; on SIGTERM it stops and writes the time of each token to `--output`.
"""

from __future__ import annotations

import argparse
import signal
import time
from pathlib import Path

import msgspec

from loadtest.synthetic_engine import SyntheticEngine
from nibble.service.broker.wire import WorkerInfo
from nibble.service.broker.worker_side import WorkerBroker
from nibble.service.worker.loop import WorkerLoop
from nibble.service.worker.metrics import WorkerMetrics

MAX_NUM_SEQUENCES = 4096
_LEASE_S = 10.0
_ANY_BANDWIDTH = 1.0  # bytes per s; the synthetic engine reads nothing


class EmitTimes(msgspec.Struct):
    """tokens: request id to the CLOCK_MONOTONIC seconds of each of its tokens."""

    tokens: dict[str, list[float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--redis-url", required=True)
    parser.add_argument("--token-id", type=int, required=True)
    parser.add_argument("--tokens-per-s", type=float, required=True)
    parser.add_argument("--groups", type=int, required=True)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()

    engine = SyntheticEngine(options.token_id, options.tokens_per_s, options.groups, MAX_NUM_SEQUENCES)
    broker = WorkerBroker(options.redis_url, "synthetic", lease_s=_LEASE_S)
    info = WorkerInfo(
        worker_id="synthetic", model="synthetic", device="clock", state="ready", max_num_sequences=MAX_NUM_SEQUENCES
    )
    metrics = WorkerMetrics("synthetic", _ANY_BANDWIDTH, with_vllm_names=False)
    loop = WorkerLoop(engine, broker, metrics, info, idle_wait_s=_LEASE_S / 3)
    signal.signal(signal.SIGTERM, lambda *_: loop.stop())
    loop.run()
    tokens = {request_id: times.tolist() for request_id, times in engine.emit_times.items()}
    options.output.write_bytes(msgspec.msgpack.encode(EmitTimes(tokens)))


if __name__ == "__main__":
    assert time.get_clock_info("monotonic").implementation == "clock_gettime(CLOCK_MONOTONIC)"
    main()
