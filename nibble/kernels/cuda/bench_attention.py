"""How fast attention is on this GPU: `python -m nibble.kernels.cuda.bench_attention [decode | prefill | quick]`.

Random data, each measurement over enough caches that none of it is left in L2, all in one CUDA graph; the median of a
few replays. GB/s counts what must be read once: the keys and values (with their scales) of all tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cupy
import numpy as np
import numpy.typing as npt

from nibble.kernels.cuda import attention
from nibble.kernels.cuda.append_kv import rope_append_kv
from nibble.kernels.cuda.capture import capture
from nibble.kernels.cuda.device import Device
from nibble.kernels.cuda.rope import rope_table
from nibble.kernels.interface import AttentionBatch, AttentionStep, KVChannels, Mode
from nibble.kernels.layout import BLOCK_SIZE, KVDtype, KVLayout

COLD_BYTES = 200 << 20  # four times the L2 of an H100
MAX_CACHES = 256  # the smallest case has 0.5 MB
MIN_LAUNCHES = 8  # in a graph: the time from the event before it to its first kernel is not attention's
REPLAYS = 7
WORKSPACE_BYTES = 2 << 30


@dataclass(frozen=True)
class Case:
    """One step's attention: `queries` tokens of each of `batch` sequences, the last of `context` tokens."""

    batch: int
    context: int
    queries: int = 1
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    dtype: KVDtype = KVDtype.INT8
    shortest: int = 0  # where contexts differ: from this to `context`, evenly on a logarithmic scale

    @property
    def layout(self) -> KVLayout:
        return KVLayout(self.num_kv_heads, self.head_dim, self.dtype)

    @property
    def lengths(self) -> npt.NDArray[np.int32]:
        """(batch,), in no order"""
        lengths = np.rint(np.geomspace(self.shortest or self.context, self.context, self.batch)).astype(np.int32)
        return np.random.default_rng(0).permutation(lengths)

    @property
    def kv_bytes(self) -> float:
        """Of all tokens' keys and values."""
        return float(self.lengths.sum()) * self.layout.block_bytes / BLOCK_SIZE

    @property
    def cache_bytes(self) -> int:
        """Of all blocks: as many for each sequence as for the longest."""
        return self.batch * -(-self.context // BLOCK_SIZE) * self.layout.block_bytes

    @property
    def flops(self) -> float:
        visible = self.queries * (2 * self.context - self.queries + 1) / 2
        return 4.0 * self.batch * visible * self.num_heads * self.head_dim


class Bench:
    """Arrays for one case, and its timings."""

    def __init__(self, device: Device, case: Case, memory: cupy.ndarray) -> None:
        self.device, self.case = device, case
        self.mode = Mode.DECODE if case.queries == 1 else Mode.PREFILL
        blocks = -(-case.context // BLOCK_SIZE)
        num_blocks = blocks * case.batch
        size = case.cache_bytes
        count = min(MAX_CACHES, len(memory) // size, max(1, -(-COLD_BYTES // size)))
        shape = (num_blocks, case.num_kv_heads, case.layout.head_block_bytes)
        self.caches = [memory[i * size : (i + 1) * size].reshape(shape) for i in range(count)]
        tables = np.random.default_rng(0).permutation(num_blocks).astype(np.int32).reshape(case.batch, blocks)
        starts = np.arange(case.batch + 1, dtype=np.int32) * case.queries
        lengths = case.lengths
        self.arrays = AttentionBatch(cupy.asarray(starts), cupy.asarray(lengths), cupy.asarray(tables))
        self.num_tokens = case.batch * case.queries
        position = (lengths[:, None] + np.arange(-case.queries, 0)).reshape(-1)
        slots = tables.repeat(case.queries, axis=0)[np.arange(self.num_tokens), position // BLOCK_SIZE]
        self.positions = cupy.asarray(position.astype(np.int32))
        self.slots = cupy.asarray(slots.astype(np.int64) * BLOCK_SIZE + position % BLOCK_SIZE)
        columns = (case.num_heads + 2 * case.num_kv_heads) * case.head_dim
        normal = np.random.default_rng(0).standard_normal(1 << 20, np.float32).astype(np.float16)
        self.qkv = cupy.asarray(np.resize(normal, (self.num_tokens, columns)))
        frequencies = [10000.0 ** (-2 * i / case.head_dim) for i in range(case.head_dim // 2)]
        self.channels = None
        if case.dtype is KVDtype.INT8_CHANNEL:
            parameters = np.full(case.layout.channels_shape, 0.02, np.float32)
            self.channels = KVChannels(cupy.asarray(parameters), cupy.asarray(np.zeros(1, np.int64)))
        self.table = rope_table(device, frequencies, case.context, 1.0)

    def layers(self) -> float:
        """Microseconds of one layer's attention."""

        caches = self.caches * -(-MIN_LAUNCHES // len(self.caches))

        def run() -> None:
            step = self._step()
            for cache in caches:
                with self.device.arena.scope():
                    attention.attention(self.device, self.qkv, cache, step, self.case.layout, self.channels, self.mode)

        return (self._time(run) - self.plan()) / len(caches)

    def plan(self) -> float:
        """Microseconds of planning a step."""

        def run() -> None:
            for _ in range(8):
                self._step()

        return self._time(run) / 8

    def append(self) -> float:
        """Microseconds of rotating and appending all tokens."""
        step = self._step()
        layout = self.case.layout

        def run() -> None:
            for cache in self.caches:
                rope_append_kv(
                    self.device, self.qkv, step.positions, step.slots, step.rope_table, cache, layout, self.channels
                )

        return self._time(run) / len(self.caches)

    def _step(self) -> AttentionStep:
        plan = attention.plan_attention(self.device, self.arrays, self.case.layout, self.num_tokens, self.mode)
        return AttentionStep(self.arrays, self.positions, self.slots, self.table, plan)

    def _time(self, run: Callable[[], None]) -> float:
        with self.device.arena.scope():
            graph = capture(self.device, run)
            times = []
            for _ in range(REPLAYS):
                start, stop = cupy.cuda.Event(), cupy.cuda.Event()
                start.record(self.device.stream)
                graph()
                stop.record(self.device.stream)
                stop.synchronize()
                times.append(cupy.cuda.get_elapsed_time(start, stop) * 1e3)
        return float(np.median(times))


def random_memory(chosen: Sequence[Case]) -> cupy.ndarray:
    """For the caches of any of the cases, made by copies alone: kernels of CuPy's own need a CUDA toolkit."""
    num_bytes = max(max(case.cache_bytes for case in chosen), 2 * COLD_BYTES)
    # Random bytes, but no NaN among the scales: fp16 of exponents below 16
    part = cupy.asarray(np.random.default_rng(0).integers(0, 1 << 16, 8 << 20, np.uint16) & np.uint16(0xBBFF))
    memory = cupy.empty(num_bytes, np.uint8)
    for start in range(0, num_bytes, part.nbytes):
        stop = min(start + part.nbytes, num_bytes)
        memory[start:stop].data.copy_from_device(part.data, stop - start)
    return memory


def report(device: Device, case: Case, memory: cupy.ndarray) -> None:
    with device.arena.scope():
        bench = Bench(device, case, memory)
        us, plan_us = bench.layers(), bench.plan()
        name = f"{case.num_heads}/{case.num_kv_heads} d{case.head_dim} {case.dtype:12} batch {case.batch:3}"
        if case.queries == 1:
            speed = f"{case.kv_bytes / us / 1e3:6.0f} GB/s"
        else:
            append_us = bench.append()
            speed = f"{case.flops / (us - append_us) / 1e6:6.1f} TFLOP/s, append {append_us:.1f} us"
        context = f"{case.shortest}-{case.context}" if case.shortest else f"{case.context}"
        line = f"{name} ctx {context:>8} new {case.queries:4}: {us:8.2f} us {speed}, plan {plan_us:.1f} us"
        print(line, flush=True)  # noqa: T201  # a command


def cases(which: str) -> list[Case]:
    decode = [Case(b, c) for c in (256, 640, 1024, 4096) for b in (1, 8, 32, 64, 128, 256)]
    decode += [Case(40, 4096), Case(64, 8192, shortest=128), Case(200, 4096, shortest=64)]
    prefill = [Case(1, 2048, 2048), Case(1, 8192, 8192), Case(8, 1024, 1024), Case(1, 8192, 1024)]
    prefill += [Case(1, 8192, 8192, dtype=dtype) for dtype in (KVDtype.FP16, KVDtype.INT8_CHANNEL)]
    if which == "quick":
        keep = [(1, 256), (1, 1024), (1, 4096), (8, 1024), (32, 4096), (64, 640), (128, 1024), (256, 640), (64, 8192)]
        return [case for case in decode if (case.batch, case.context) in keep] + prefill[:2]
    decode += [Case(b, 1024, dtype=dtype) for dtype in (KVDtype.FP16, KVDtype.INT8_CHANNEL) for b in (1, 32, 128)]
    decode += [Case(b, 1024, num_heads=28, num_kv_heads=4) for b in (1, 64)]
    decode += [Case(b, 1024, num_heads=32, num_kv_heads=8, head_dim=64) for b in (1, 64)]
    decode += [Case(40, 1024), Case(1, 8192), Case(64, 1024, head_dim=256, num_heads=8, num_kv_heads=4)]
    return {"decode": decode, "prefill": prefill, "all": decode + prefill}[which]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("which", nargs="?", default="all", choices=["decode", "prefill", "quick", "all"])
    chosen = cases(parser.parse_args().which)
    device = Device(0, WORKSPACE_BYTES)
    print(device.name)  # noqa: T201  # a command
    memory = random_memory(chosen)
    for case in chosen:
        report(device, case, memory)


if __name__ == "__main__":
    main()
