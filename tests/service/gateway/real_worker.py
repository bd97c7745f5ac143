"""The real engine on the CPU, in the real worker loop, behind a gateway that runs without a worker."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from conftest import RunningGateway

from nibble.engine.llm_engine import LLMEngine
from nibble.service.broker.wire import WorkerInfo
from nibble.service.broker.worker_side import WorkerBroker
from nibble.service.worker.loop import WorkerLoop
from nibble.service.worker.metrics import WorkerMetrics


@contextmanager
def real_worker(running: RunningGateway, engine: LLMEngine, model: str) -> Iterator[WorkerMetrics]:
    settings = running.gateway.settings
    broker = WorkerBroker(settings.redis_url, "real", namespace=settings.namespace)
    info = WorkerInfo(worker_id="real", model=model, device="cpu", state="ready")
    metrics = WorkerMetrics(model, 1e9, with_vllm_names=False)
    loop = WorkerLoop(engine, broker, metrics, info, idle_wait_s=1.0)
    thread = threading.Thread(target=loop.run)
    thread.start()
    yield metrics
    loop.stop()
    thread.join(10)
    assert not thread.is_alive()
    engine.scheduler.block_manager.check_integrity([])
