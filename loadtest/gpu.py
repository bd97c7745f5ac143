"""Which GPU a measurement ran on, and its roof as measured just before."""

from __future__ import annotations

import subprocess

import msgspec

PACKAGES = ("numpy", "cupy-cuda13x", "cuda-bindings", "nvidia-cuda-nvrtc", "nvidia-cublas")  # versions that matter


class GPU(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    driver: str
    memory_mib: int
    read_bandwidth: float  # bytes per second
    product_flops: float | None = None  # operations per second of cuBLAS, fp16, 8192^3


def this_gpu(read_bandwidth: float, product_flops: float | None = None) -> GPU:
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader,nounits", "--id=0"]
    output = subprocess.run(query, capture_output=True, text=True, check=False).stdout
    name, driver, memory = (field.strip() for field in (output.strip() or "unknown,unknown,0").split(","))
    return GPU(
        name=name,
        driver=driver,
        memory_mib=int(memory),
        read_bandwidth=read_bandwidth,
        product_flops=product_flops,
    )
