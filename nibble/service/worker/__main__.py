"""`python -m nibble.service.worker`: read the settings, load the model, serve until SIGTERM or SIGINT."""

from __future__ import annotations

import logging
import signal
import sys
import time

from nibble.engine.checkpoint.errors import CheckpointError
from nibble.engine.errors import EngineError
from nibble.engine.limits import EngineLimits
from nibble.engine.llm_engine import LLMEngine
from nibble.kernels.interface import Kernels
from nibble.kernels.layout import KVDtype
from nibble.service.broker.errors import BrokerError
from nibble.service.broker.wire import WorkerInfo
from nibble.service.broker.worker_side import WorkerBroker
from nibble.service.settings import SettingsError
from nibble.service.worker.loop import WorkerLoop
from nibble.service.worker.metrics import WorkerMetrics
from nibble.service.worker.settings import WorkerSettings

logger = logging.getLogger(__name__)

KV_CACHE_SHARE = 0.25  # of the free memory, where kv_cache_bytes is not set
KV_CACHE_MAX_BYTES = 2 << 30  # ... and at most this: more blocks than the sequences can fill are of no use


def main() -> None:
    try:
        settings = WorkerSettings.from_environment()
        logging.basicConfig(level=settings.log_level, format="%(asctime)s %(levelname)s %(name)s %(message)s")
        _serve(settings)
    except (SettingsError, CheckpointError, EngineError, BrokerError, OSError) as error:
        sys.exit(f"nibble worker: {error}")


def _serve(settings: WorkerSettings) -> None:
    start_s = time.perf_counter()
    kernels = _make_kernels(settings)
    limits = EngineLimits(
        kv_cache_bytes=settings.kv_cache_bytes or _default_kv_cache_bytes(),
        max_num_sequences=settings.max_num_sequences,
        max_num_batched_tokens=max(settings.max_num_batched_tokens, settings.max_num_sequences),
        kv_dtype=KVDtype(settings.kv_dtype),
    )
    engine = LLMEngine.from_checkpoint(settings.model_dir, kernels, limits)
    kernels.warm_up()
    model_name = settings.model_name or settings.model_dir.resolve().name
    metrics = WorkerMetrics(model_name, kernels.read_bandwidth(), settings.vllm_metric_names)
    if settings.metrics_port:
        metrics.serve(settings.metrics_host, settings.metrics_port)
    broker = WorkerBroker(
        settings.redis_url, settings.worker_id, namespace=settings.namespace, lease_s=settings.lease_s
    )
    info = WorkerInfo(
        worker_id=settings.worker_id,
        model=model_name,
        device=kernels.device_name,
        state="ready",
        num_running=0,
        num_waiting=0,
        kv_cache_usage=0.0,
        max_num_sequences=settings.max_num_sequences,
        tokens_per_s=0.0,
    )
    loop = WorkerLoop(engine, broker, metrics, info, idle_wait_s=settings.lease_s / 3)
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signal_number, lambda *_: loop.stop())
    logger.info(
        "event=worker_ready worker_id=%s model=%s device=%r weight_bytes=%d kv_cache_bytes=%d kv_cache_tokens=%d "
        "start_s=%.2f",
        settings.worker_id,
        model_name,
        kernels.device_name,
        engine.weight_bytes,
        engine.kv_cache_bytes,
        engine.kv_cache_tokens,
        time.perf_counter() - start_s,
    )
    loop.run()
    logger.info("event=worker_stopped worker_id=%s", settings.worker_id)


def _make_kernels(settings: WorkerSettings) -> Kernels:
    if settings.device == "cuda":
        raise SettingsError("NIBBLE_DEVICE: this version has no CUDA backend, use cpu or auto (got 'cuda')")
    from nibble.kernels.cpu.backend import CPUKernels  # torch and numba: seconds, and not wanted on a GPU worker

    return CPUKernels(settings.num_threads)


def _default_kv_cache_bytes() -> int:
    with open("/proc/meminfo") as file:
        fields = dict(line.split(":", 1) for line in file)
    free_bytes = int(fields["MemAvailable"].split()[0]) * 1024
    return min(KV_CACHE_MAX_BYTES, int(free_bytes * KV_CACHE_SHARE))


if __name__ == "__main__":
    main()
