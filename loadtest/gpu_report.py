"""What `make bench-gpu` writes, as `gpu_tables` reads it."""

from __future__ import annotations

import msgspec

from loadtest.gpu import GPU
from loadtest.machine import Machine
from loadtest.step_timing import Decode, Prefill, Workload


class KernelSpeed(msgspec.Struct, frozen=True, kw_only=True):
    """roof_share: the least time that bytes and products allow, of the time it took; None where L2 holds the data."""

    kernel: str
    shape: str
    us: float
    read_tb_per_s: float
    tflop_per_s: float
    roof_share: float | None


class EngineSpeed(msgspec.Struct, frozen=True, kw_only=True):
    """Medians. What does not fit into the KV cache is left out."""

    model: str
    kv_cache_tokens: int
    workloads: list[Workload]
    prefill: list[Prefill]
    decode: list[Decode]


class StartTime(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of one start. stages: in order, each from the end of the one before; together they are total_s."""

    model: str
    weight_bytes: int
    stages: dict[str, float]
    total_s: float


class GPUReport(msgspec.Struct, frozen=True, kw_only=True):
    machine: Machine
    gpu: GPU | None
    kernels: list[KernelSpeed]
    engines: list[EngineSpeed]
    starts: list[StartTime]
