"""`python -m nibble.kernels.cuda.bench_head`: time of the lm_head (INT8 rows) and of sampling on this GPU.

Random data; matrices rotate through more memory than the L2 cache has; a graph of several launches is replayed, so that
kernels overlap as in a decode step; medians. Logits are read as the lm_head leaves them: from L2 where they fit.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from functools import partial

import cupy
import numpy as np

from nibble.kernels.cuda.backend import CUDAKernels
from nibble.kernels.interface import Int8Weight, Mode, SamplingBatch

COLD_BYTES = 200 << 20
REPLAYS = 15
WORKSPACE_BYTES = 1 << 30
# (name, rows, columns, group size)
HEADS = (
    ("Llama-3 head", 128_256, 4096, 4096),
    ("Qwen2.5-7B head", 152_064, 3584, 3584),
    ("SmolLM2 head", 49_152, 576, 32),
    ("gate_up, group 32", 28_672, 4096, 32),
    ("o, group 32", 4096, 4096, 32),
)
# name: (temperature, top_k, top_p, min_p)
SAMPLERS = {
    "greedy": (0.0, 0, 1.0, 0.0),
    "temperature": (1.0, 0, 1.0, 0.0),
    "top_p": (0.7, 0, 0.9, 0.0),
    "top_k, top_p, min_p": (0.8, 50, 0.95, 0.05),
    "temperature 3": (3.0, 0, 1.0, 0.0),
}


def seconds(kernels: CUDAKernels, steps: Sequence[Callable[[], object]]) -> float:
    """Of one step, the steps being replayed in turn as one graph."""

    def all_steps() -> None:
        for step in steps:
            with kernels.temporaries():
                step()

    graph, stream = kernels.capture(all_steps), kernels.device.stream
    times = []
    for _ in range(REPLAYS):
        start, end = cupy.cuda.Event(), cupy.cuda.Event()
        start.record(stream)
        graph()
        end.record(stream)
        end.synchronize()
        times.append(cupy.cuda.get_elapsed_time(start, end) / 1e3 / len(steps))
    return float(statistics.median(times))


def random_matrix(kernels: CUDAKernels, rows: int, columns: int, group_size: int, seed: int) -> Int8Weight:
    rng = np.random.default_rng(seed)
    block = rng.integers(-127, 128, (1024, columns), dtype=np.int8)
    values = np.tile(block, (-(-rows // 1024), 1))[:rows]
    scales = (rng.random((rows, columns // group_size)) * 1e-2).astype(np.float16)
    return Int8Weight(kernels.to_device(values), kernels.to_device(scales), group_size)


def bench_linear(kernels: CUDAKernels, bandwidth: float, tokens: list[int], names: list[str]) -> None:
    for name, rows, columns, group_size in HEADS:
        if names and not any(part in name for part in names):
            continue
        num_bytes = rows * (columns + columns // group_size * 2)
        copies = max(2, -(-COLD_BYTES // num_bytes))
        weights = [random_matrix(kernels, rows, columns, group_size, 0)]
        for _ in range(copies - 1):
            weights.append(Int8Weight(weights[0].values.copy(), weights[0].scales.copy(), group_size))
        roof_us = num_bytes / bandwidth * 1e6
        _print(f"{name} {rows} x {columns}, group {group_size}: roof {roof_us:.1f} us")
        for num_tokens in tokens:
            x = kernels.to_device(np.random.default_rng(1).standard_normal((num_tokens, columns)).astype(np.float16))
            op = kernels.logits if "head" in name else partial(kernels.int8_linear, mode=Mode.DECODE)
            steps = [partial(op, x, weight) for weight in weights]
            us = seconds(kernels, steps) * 1e6
            tflops = 2e-6 * num_tokens * rows * columns / us
            _print(f"  {num_tokens:4d} tokens {us:8.1f} us  {roof_us / us:6.1%} of the roof  {tflops:6.1f} TFLOP/s")


def sampling_batch(kernels: CUDAKernels, rows: int, settings: list[tuple[float, int, float, float]]) -> SamplingBatch:
    picked = [settings[row % len(settings)] for row in range(rows)]
    columns = [np.array([row[i] for row in picked]) for i in range(4)]
    dtypes = (np.float32, np.int32, np.float32, np.float32)
    arrays = [kernels.to_device(column.astype(dtype)) for column, dtype in zip(columns, dtypes, strict=True)]
    seeds = kernels.to_device(np.arange(rows, dtype=np.uint64))
    positions = kernels.to_device(np.arange(rows, dtype=np.int64))
    return SamplingBatch(arrays[0], arrays[1], arrays[2], arrays[3], seeds, positions)


def bench_sample(kernels: CUDAKernels, vocabulary: int, rows: list[int]) -> None:
    settings: dict[str, list[tuple[float, int, float, float]]] = {name: [row] for name, row in SAMPLERS.items()}
    settings["all of them"] = list(SAMPLERS.values())
    for spread in (1.0, 4.0):
        _print(f"sample, {vocabulary} logits of standard deviation {spread}, us by rows {rows}")
        for name, choices in settings.items():
            line = []
            for num_rows in rows:
                rng = np.random.default_rng(2)
                values = (rng.standard_normal((num_rows, vocabulary), dtype=np.float32) * spread).astype(np.float32)
                logits = kernels.to_device(values)
                batch = sampling_batch(kernels, num_rows, choices)
                line.append(seconds(kernels, [partial(kernels.sample, logits, batch)] * 10) * 1e6)
            _print(f"  {name:24s}" + "".join(f"{us:9.1f}" for us in line))


def _print(line: str) -> None:
    print(line, flush=True)  # noqa: T201  # a command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128, 256])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--vocabulary", type=int, default=128_256)
    parser.add_argument("--bandwidth", type=float, default=3.02e12, help="bytes per second that make the roof")
    parser.add_argument("--only", nargs="*", default=[], help="parts of names of matrices")
    parser.add_argument("--skip", choices=("linear", "sample"))
    options = parser.parse_args()
    kernels = CUDAKernels(workspace_bytes=WORKSPACE_BYTES)
    _print(kernels.device_name)
    if options.skip != "linear":
        bench_linear(kernels, options.bandwidth, options.tokens, options.only)
    if options.skip != "sample":
        bench_sample(kernels, options.vocabulary, options.rows)


if __name__ == "__main__":
    main()
