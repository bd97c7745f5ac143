"""Settings of the worker process."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Annotated, Literal

from pydantic import ByteSize, Field

from nibble.service.settings import ProcessSettings


def _default_worker_id() -> str:
    return f"{socket.gethostname()}-{os.getpid()}"


class WorkerSettings(ProcessSettings):
    """Read once from NIBBLE_ variables in `__main__`.

    kv_cache_bytes takes units (`2GiB`); without it a share of the free memory is used. metrics_port 0 turns the
    metrics endpoint off.
    """

    model_dir: Path
    model_name: str | None = None
    worker_id: str = Field(default_factory=_default_worker_id)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    num_threads: Annotated[int, Field(ge=1)] | None = None
    max_num_sequences: Annotated[int, Field(ge=1)] = 64
    max_num_batched_tokens: Annotated[int, Field(ge=1)] = 512
    kv_cache_bytes: ByteSize | None = None
    kv_dtype: Literal["int8", "fp16"] = "int8"
    lease_s: Annotated[float, Field(gt=0)] = 10.0
    metrics_host: str = "127.0.0.1"
    metrics_port: Annotated[int, Field(ge=0, le=65535)] = 8001
    vllm_metric_names: bool = True
