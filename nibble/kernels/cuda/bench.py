"""What the benchmarks of kernels share: this GPU's roof, one kernel's time beside it, and how a step is timed."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import cupy
import numpy as np

from nibble.kernels.cuda import gemm
from nibble.kernels.cuda.backend import CUDAKernels

REPLAYS = 9
RUNS = 5  # of what cannot be captured, and is long
PRODUCT_SIZE = 8192


@dataclass(frozen=True)
class Roof:
    """What this GPU was just seen to do: bytes a second read, operations a second of an fp16 product by cuBLASLt."""

    bandwidth: float
    flops: float


@dataclass(frozen=True)
class Timing:
    """One kernel on one shape. num_bytes: that memory must be read for; flops: of its products. Both 0: no roof."""

    kernel: str
    shape: str
    us: float
    num_bytes: float
    flops: float

    @property
    def bandwidth(self) -> float:
        return self.num_bytes / self.us * 1e6

    @property
    def flops_per_s(self) -> float:
        return self.flops / self.us * 1e6

    def roof_share(self, roof: Roof) -> float | None:
        """The least time that the roof allows, of the time it took."""
        share = max(self.bandwidth / roof.bandwidth, self.flops_per_s / roof.flops)
        return share or None

    def line(self, roof: Roof) -> str:
        start, share = f"{self.kernel:18} {self.shape:36} {self.us:10.2f} us", self.roof_share(roof)
        if share is None:
            return start
        return (
            f"{start} {self.bandwidth / 1e12:6.3f} TB/s {self.flops_per_s / 1e12:6.1f} TFLOP/s {share:6.1%} of the roof"
        )


def measure_roof(kernels: CUDAKernels) -> Roof:
    rng = np.random.default_rng(0)
    part = rng.standard_normal((512, PRODUCT_SIZE), np.float32).astype(np.float16)
    x, matrix = (kernels.to_device(np.tile(part, (PRODUCT_SIZE // len(part), 1))) for _ in range(2))
    out = kernels.zeros(x.shape, np.float16)
    us = median_us(kernels, lambda: gemm.multiply(x, matrix, out, 0, False), captures=False)
    return Roof(kernels.read_bandwidth(), 2 * PRODUCT_SIZE**3 / us * 1e6)


def median_us(kernels: CUDAKernels, step: Callable[[], object], captures: bool = True) -> float:
    """Of a step, as a graph if it `captures` (prompts run op by op), after two to warm up."""
    stream = kernels.device.stream

    def run() -> None:
        step()

    graph = kernels.capture(run) if captures else run
    events = [cupy.cuda.Event() for _ in range((REPLAYS if captures else RUNS) + 3)]
    for event in events:
        event.record(stream)
        graph()
    stream.synchronize()
    times = [cupy.cuda.get_elapsed_time(first, second) for first, second in itertools.pairwise(events[2:])]
    return float(np.median(times)) * 1e3


def print_timings(kernels: CUDAKernels, timings: Iterable[Timing]) -> None:
    roof = measure_roof(kernels)
    sys.stdout.write(
        f"{kernels.device_name}, roof: {roof.bandwidth / 1e12:.3f} TB/s read, "
        f"{roof.flops / 1e12:.0f} TFLOP/s of fp16 {PRODUCT_SIZE}^3\n"
    )
    for timing in timings:
        sys.stdout.write(timing.line(roof) + "\n")
        sys.stdout.flush()
