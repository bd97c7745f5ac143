"""Settings of the worker process."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Annotated, Literal

from pydantic import ByteSize, Field

from nibble.engine.limits import MAX_DRAFTS
from nibble.service.settings import ProcessSettings


def _default_worker_id() -> str:
    return f"{socket.gethostname()}-{os.getpid()}"


class WorkerSettings(ProcessSettings):
    """Read once from NIBBLE_ variables in `__main__`.

    kv_cache_bytes takes units (`2GiB`); without it the KV cache gets a share of the free memory, on a GPU all that is
    left of gpu_memory_utilization, the share of its memory that may be in use. swap_bytes is page-locked memory of the
    machine, taken at start, for the blocks of preempted sequences; a CPU worker takes none. What max_num_sequences,
    max_num_batched_tokens and speculation are by default depends on the device, and so does step_timeout_s: a step that
    takes longer hangs, and the worker ends. num_drafts: tokens of a request that are guessed in one step, at most.
    draft_model_dir: a native directory, where speculation is draft_model. metrics_port 0 turns the endpoint of metrics
    and health off.
    """

    model_dir: Path
    model_name: str | None = None
    worker_id: str = Field(default_factory=_default_worker_id)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    num_threads: Annotated[int, Field(ge=1)] | None = None
    max_num_sequences: Annotated[int, Field(ge=1)] | None = None
    max_num_batched_tokens: Annotated[int, Field(ge=1)] | None = None
    kv_cache_bytes: ByteSize | None = None
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    kernel_cache_dir: Path | None = None
    kv_dtype: Literal["int8", "fp16"] = "int8"
    prefix_cache: bool = True
    speculation: Literal["off", "ngram", "draft_model"] | None = None
    num_drafts: Annotated[int, Field(ge=1, le=MAX_DRAFTS)] = MAX_DRAFTS
    swap_bytes: ByteSize = ByteSize(0)
    draft_model_dir: Path | None = None
    lease_s: Annotated[float, Field(gt=0)] = 10.0
    step_timeout_s: Annotated[float, Field(gt=0)] | None = None
    metrics_host: str = "127.0.0.1"
    metrics_port: Annotated[int, Field(ge=0, le=65535)] = 8001
    vllm_metric_names: bool = True
