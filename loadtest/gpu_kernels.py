"""`python -m loadtest.gpu_kernels`: the time of every kernel that matters, beside this GPU's roof.

The roof is measured first. Random data from memory, not from L2, but where it says so; medians of replayed graphs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import msgspec
import numpy as np

from loadtest.gpu import GPU, this_gpu
from loadtest.gpu_report import KernelSpeed
from nibble.kernels.cuda import bench_attention, bench_head, bench_int4
from nibble.kernels.cuda.backend import CUDAKernels
from nibble.kernels.cuda.bench import Roof, Timing, measure_roof
from nibble.kernels.cuda.bench_attention import Case

WORKSPACE_BYTES = 2 << 30
DECODE_TOKENS = [1, 8, 16, 32, 64, 128, 256]
NUM_LAYERS = {"llama-3-8b": 32, "qwen2.5-7b": 28, "llama-3.2-1b": 16, "smollm2-135m": 30}
HEAD_TOKENS = [1, 8, 64, 256]
SAMPLE_ROWS = [1, 64]
ATTENTION = (
    *(Case(batch, context) for context in (1024, 4096) for batch in (1, 8, 32, 64, 128)),
    Case(32, 1024, num_heads=28, num_kv_heads=4),
    Case(32, 1024, head_dim=64),
    *(Case(1, context, context) for context in (512, 2048, 8192)),
)
SMALL_ROWS = (1, 64)
SMALL_SIZE = 4096


class Report(msgspec.Struct, frozen=True, kw_only=True):
    gpu: GPU
    kernels: list[KernelSpeed]


def all_timings(kernels: CUDAKernels) -> Iterator[Timing]:
    for model, num_layers in NUM_LAYERS.items():
        is_first = model == "llama-3-8b"
        alone, prefill = ([1, 8, 64], [512, 2048, 8192]) if is_first else ([1, 64], [2048])
        yield from bench_int4.timings(kernels, model, num_layers, DECODE_TOKENS, alone, prefill)
    yield from bench_head.linear_timings(kernels, HEAD_TOKENS, [])
    yield from attention_timings(kernels)
    yield from bench_head.sample_timings(kernels, 128_256, SAMPLE_ROWS, [4.0])
    yield from small_timings(kernels)


def attention_timings(kernels: CUDAKernels) -> Iterator[Timing]:
    memory = bench_attention.random_memory(ATTENTION)
    for case in ATTENTION:
        with kernels.temporaries():
            bench = bench_attention.Bench(kernels.device, case, memory)
            us = bench.layers()
        shape = f"{case.num_heads}/{case.num_kv_heads} heads of {case.head_dim}, {case.dtype}, "
        if case.queries == 1:
            shape += f"batch {case.batch}, context {case.context}"
            yield Timing("attention_decode", shape, us, case.kv_bytes, case.flops)
        else:
            yield Timing("attention_prefill", f"{shape}{case.queries} tokens", us, case.kv_bytes, case.flops)


def small_timings(kernels: CUDAKernels) -> Iterator[Timing]:
    """What is between the large ones; their data lie in L2, as in a step."""
    for rows in SMALL_ROWS:
        rng = np.random.default_rng(0)
        x = kernels.to_device(rng.standard_normal((rows, SMALL_SIZE), np.float32))
        weight = kernels.to_device(rng.random(SMALL_SIZE, np.float32))
        gate_up = kernels.to_device(rng.standard_normal((rows, 2 * SMALL_SIZE), np.float32).astype(np.float16))
        ids = kernels.to_device(np.arange(rows, dtype=np.int32))
        table = bench_head.random_matrix(kernels, 1024, SMALL_SIZE, SMALL_SIZE, 0)
        for name, step in (
            ("rms_norm", partial(kernels.rms_norm, x, weight, 1e-5)),
            ("silu_and_mul", partial(kernels.silu_and_mul, gate_up)),
            ("embedding", partial(kernels.embedding, ids, table)),
        ):
            yield Timing(name, f"{SMALL_SIZE} wide, {rows} rows", bench_head.repeated_us(kernels, [step] * 10), 0, 0)


def measure() -> Report:
    kernels = CUDAKernels(workspace_bytes=WORKSPACE_BYTES)
    kernels.warm_up()
    roof = measure_roof(kernels)
    speeds = []
    for timing in all_timings(kernels):
        sys.stderr.write(timing.line(roof) + "\n")
        speeds.append(speed(timing, roof))
    return Report(gpu=this_gpu(roof.bandwidth, roof.flops), kernels=speeds)


def speed(timing: Timing, roof: Roof) -> KernelSpeed:
    share = timing.roof_share(roof)
    return KernelSpeed(
        kernel=timing.kernel,
        shape=timing.shape,
        us=round(timing.us, 2),
        read_tb_per_s=round(timing.bandwidth / 1e12, 3),
        tflop_per_s=round(timing.flops_per_s / 1e12, 1),
        roof_share=None if share is None else round(share, 3),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the report there")
    options = parser.parse_args()
    report = measure()
    if options.json is not None:
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(report)) + b"\n")


if __name__ == "__main__":
    main()
