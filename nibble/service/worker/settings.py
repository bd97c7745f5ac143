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
    """Read once from NIBBLE_ variables in `__main__`."""

    model_dir: Path
    """A native directory, as `nibble convert` makes one, or the link to one that `nibble prepare` makes."""
    model_name: str | None = None
    """What its metrics call the model. By default the directory's name."""
    worker_id: str = Field(default_factory=_default_worker_id)
    """Its name. A worker that starts under the name of a running one takes its place. By default host name and process
    id."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: the GPU if there is one that can be used. `cuda`: end with the reason where it cannot be used."""
    num_threads: Annotated[int, Field(ge=1)] | None = None
    """Threads of a CPU worker. By default all cores."""
    max_num_sequences: Annotated[int, Field(ge=1)] | None = None
    """Requests in a worker's batch. By default 256 on a GPU, else 64."""
    max_num_batched_tokens: Annotated[int, Field(ge=1)] | None = None
    """Tokens per step, of prompts and decoding together. By default 2048 on a GPU, else 512."""
    kv_cache_bytes: ByteSize | None = None
    """By default all that is left of `NIBBLE_GPU_MEMORY_UTILIZATION`; on a CPU a quarter of the free memory, at most 2
    GiB."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Share of a GPU's memory that may be in use."""
    kernel_cache_dir: Path | None = None
    """Where a GPU worker keeps compiled kernels. By default `~/.cache/nibble/cuda`."""
    kv_dtype: Literal["int8", "fp16"] = "int8"
    """How keys and values are stored. INT8 scales are of each token, or of each channel where `nibble quantize --kv
    channel` made the checkpoint."""
    prefix_cache: bool = True
    """Requests share what was computed of a common prefix."""
    speculation: Literal["off", "ngram", "draft_model"] = "ngram"
    """Guess next tokens and verify several at once; the tokens stay the same. `ngram` guesses where a text repeats
    itself."""
    num_drafts: Annotated[int, Field(ge=1, le=MAX_DRAFTS)] = MAX_DRAFTS
    """Guesses of a request in one step, at most."""
    swap_bytes: ByteSize | None = None
    """Page-locked memory of the machine that keeps what preempted requests had computed; without room they compute it
    again. By default 1 GiB on a GPU; a CPU worker needs none."""
    draft_model_dir: Path | None = None
    """With `NIBBLE_SPECULATION=draft_model`: a native directory of a small model with the same tokenizer, which
    guesses."""
    lease_s: Annotated[float, Field(gt=0)] = 10.0
    """A silent worker's requests go to another one after so long."""
    step_timeout_s: Annotated[float, Field(gt=0)] | None = None
    """A step that takes longer hangs: the worker gives its requests up and ends with exit code 70. By default 60 on a
    GPU, else 300."""
    metrics_host: str = "127.0.0.1"
    """Where `/metrics` and `/health` are (503 while a step hangs)."""
    metrics_port: Annotated[int, Field(ge=0, le=65535)] = 8001
    """0: neither is served. The workers of `nibble serve` take the next free ones."""
    vllm_metric_names: bool = True
    """Also export the metric names that dashboards and autoscalers for vLLM read."""
