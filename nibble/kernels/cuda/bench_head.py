"""`python -m nibble.kernels.cuda.bench_head`: time of the lm_head (INT8 rows) and of sampling on this GPU.

Random data; matrices rotate through more memory than the L2 cache has; a graph of several launches is replayed, so that
kernels overlap as in a decode step; medians. Logits are read as the lm_head leaves them: from L2 where they fit, so
that sampling has no roof here.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np

from nibble.kernels.cuda.backend import CUDAKernels
from nibble.kernels.cuda.bench import Timing, median_us, print_timings
from nibble.kernels.interface import Int8Weight, Mode
from nibble.kernels.sampling import SamplingBatch

COLD_BYTES = 200 << 20
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


def repeated_us(kernels: CUDAKernels, steps: Sequence[Callable[[], object]]) -> float:
    """Of one step, the steps being replayed in turn as one graph."""

    def all_steps() -> None:
        for step in steps:
            with kernels.temporaries():
                step()

    return median_us(kernels, all_steps) / len(steps)


def random_matrix(kernels: CUDAKernels, rows: int, columns: int, group_size: int, seed: int) -> Int8Weight:
    rng = np.random.default_rng(seed)
    block = rng.integers(-127, 128, (1024, columns), dtype=np.int8)
    values = np.tile(block, (-(-rows // 1024), 1))[:rows]
    scales = (rng.random((rows, columns // group_size)) * 1e-2).astype(np.float16)
    return Int8Weight(kernels.to_device(values), kernels.to_device(scales), group_size)


def linear_timings(kernels: CUDAKernels, tokens: list[int], names: list[str]) -> Iterator[Timing]:
    """Of the matrices whose name has one of `names` in it, all without."""
    for name, rows, columns, group_size in HEADS:
        if names and not any(part in name for part in names):
            continue
        num_bytes = rows * (columns + columns // group_size * 2)
        copies = max(2, -(-COLD_BYTES // num_bytes))
        weights = [random_matrix(kernels, rows, columns, group_size, 0)]
        for _ in range(copies - 1):
            weights.append(Int8Weight(weights[0].values.copy(), weights[0].scales.copy(), group_size))
        for num_tokens in tokens:
            x = kernels.to_device(np.random.default_rng(1).standard_normal((num_tokens, columns)).astype(np.float16))
            op = kernels.logits if "head" in name else partial(kernels.int8_linear, mode=Mode.DECODE)
            us = repeated_us(kernels, [partial(op, x, weight) for weight in weights])
            yield Timing("int8_linear", f"{name}, {num_tokens} tokens", us, num_bytes, 2 * num_tokens * rows * columns)


def sampling_batch(kernels: CUDAKernels, rows: int, settings: list[tuple[float, int, float, float]]) -> SamplingBatch:
    picked = [settings[row % len(settings)] for row in range(rows)]
    columns = [np.array([row[i] for row in picked]) for i in range(4)]
    dtypes = (np.float32, np.int32, np.float32, np.float32)
    arrays = [kernels.to_device(column.astype(dtype)) for column, dtype in zip(columns, dtypes, strict=True)]
    seeds = kernels.to_device(np.arange(rows, dtype=np.uint64))
    positions = kernels.to_device(np.arange(rows, dtype=np.int64))
    return SamplingBatch(arrays[0], arrays[1], arrays[2], arrays[3], seeds, positions)


def sample_timings(
    kernels: CUDAKernels, vocabulary: int, rows: list[int], spreads: Sequence[float] = (1.0, 4.0)
) -> Iterator[Timing]:
    """spreads: standard deviations of the logits."""
    settings: dict[str, list[tuple[float, int, float, float]]] = {name: [row] for name, row in SAMPLERS.items()}
    settings["all of them"] = list(SAMPLERS.values())
    for spread, num_rows in itertools.product(spreads, rows):
        values = np.random.default_rng(2).standard_normal((num_rows, vocabulary), dtype=np.float32) * spread
        logits = kernels.to_device(values.astype(np.float32))
        for name, choices in settings.items():
            step = partial(kernels.sample, logits, sampling_batch(kernels, num_rows, choices))
            us = repeated_us(kernels, [step] * 10)
            yield Timing("sample", f"{name}, logits of spread {spread:g}, {num_rows} rows", us, 0, 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128, 256])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--vocabulary", type=int, default=128_256)
    parser.add_argument("--only", nargs="*", default=[], help="parts of names of matrices")
    parser.add_argument("--skip", choices=("linear", "sample"))
    options = parser.parse_args()
    kernels = CUDAKernels(workspace_bytes=WORKSPACE_BYTES)
    if options.skip != "linear":
        print_timings(kernels, linear_timings(kernels, options.tokens, options.only))
    if options.skip != "sample":
        print_timings(kernels, sample_timings(kernels, options.vocabulary, options.rows))


if __name__ == "__main__":
    main()
