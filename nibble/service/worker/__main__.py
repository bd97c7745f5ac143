"""`python -m nibble.service.worker`: read the settings, load the model, serve until SIGTERM or SIGINT."""

from __future__ import annotations

import logging
import signal
import sys
import time
from typing import TYPE_CHECKING, NoReturn

from nibble.engine.checkpoint.errors import CheckpointError
from nibble.engine.errors import EngineError
from nibble.engine.llm_engine import LLMEngine
from nibble.service.broker.errors import BrokerError
from nibble.service.broker.wire import WorkerInfo
from nibble.service.broker.worker_side import WorkerBroker
from nibble.service.settings import SettingsError
from nibble.service.worker.device import engine_limits, make_kernels, step_timeout_s, uses_cuda
from nibble.service.worker.http import serve_http
from nibble.service.worker.loop import WorkerLoop
from nibble.service.worker.metrics import WorkerMetrics
from nibble.service.worker.settings import WorkerSettings
from nibble.service.worker.watchdog import StepWatchdog, limit_exit

if TYPE_CHECKING:
    from nibble.service.worker.tracing import RequestSpans

logger = logging.getLogger(__name__)


def main() -> None:
    # As process 1 of a container there is no default that would end it, and loading may take minutes.
    signal.signal(signal.SIGTERM, _end_while_loading)
    try:
        settings = WorkerSettings.from_environment()
        logging.basicConfig(level=settings.log_level, format="%(asctime)s %(levelname)s %(name)s %(message)s")
        _serve(settings)
    except (SettingsError, CheckpointError, EngineError, BrokerError, OSError) as error:
        sys.exit(f"nibble worker: {error}")


def _end_while_loading(number: int, _frame: object) -> NoReturn:
    sys.exit(128 + number)


def _serve(settings: WorkerSettings) -> None:
    start_s = time.perf_counter()
    model_name = settings.model_name or settings.model_dir.resolve().name
    spans = _request_spans(settings, model_name)  # before minutes of loading: it refuses what it does not support
    is_cuda = uses_cuda(settings)
    kernels, limits = make_kernels(settings, is_cuda), engine_limits(settings, is_cuda)
    engine = LLMEngine.from_checkpoint(settings.model_dir, kernels, limits)
    if engine.constraints is not None:
        engine.constraints.warm_up()
    kernels.warm_up([engine.runner.model.kv_layout])
    metrics = WorkerMetrics(model_name, kernels.read_bandwidth(), settings.vllm_metric_names)
    metrics.weight_bytes, metrics.kv_cache_bytes = engine.weight_bytes, engine.kv_cache_bytes
    broker = WorkerBroker(
        settings.redis_url, settings.worker_id, namespace=settings.namespace, lease_s=settings.lease_s
    )
    timeout_s = step_timeout_s(settings, is_cuda)
    watchdog = StepWatchdog(broker, timeout_s)
    if settings.metrics_port:
        serve_http(settings.metrics_host, settings.metrics_port, metrics.registry, watchdog.health)
    info = WorkerInfo(
        worker_id=settings.worker_id,
        model=model_name,
        device=kernels.device_name,
        state="ready",
        num_running=0,
        num_waiting=0,
        kv_cache_usage=0.0,
        max_num_sequences=limits.max_num_sequences,
        tokens_per_s=0.0,
        max_context_tokens=engine.max_context_tokens,
    )
    metrics.info = info
    metrics.observe_step(engine.stats)
    loop = WorkerLoop(engine, broker, metrics, info, settings.lease_s / 3, timeout_s, watchdog, spans)
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
    _run(loop, watchdog)
    logger.info("event=worker_stopped worker_id=%s", settings.worker_id)


def _request_spans(settings: WorkerSettings, model_name: str) -> RequestSpans | None:
    """Raises SettingsError."""
    if not settings.tracing:
        return None
    from nibble.service.tracing import make_tracer
    from nibble.service.worker.tracing import RequestSpans

    return RequestSpans(make_tracer("worker", settings.worker_id), model_name)


def _run(loop: WorkerLoop, watchdog: StepWatchdog) -> None:
    watchdog.start()
    try:
        loop.run()
    except Exception:
        watchdog.stop()
        limit_exit()  # to release what a broken device holds may take for ever
        raise
    watchdog.stop()


if __name__ == "__main__":
    main()
