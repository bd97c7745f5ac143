"""How fast the CPU backend is on this machine: `python -m nibble.kernels.bench_cpu`.

Times every op at the shapes of a 135M Llama (SmolLM2), each layer with weights of its own so that caches are as cold as
in a model, and adds the ops up to a decode step and a prefill. What it leaves out is the engine's own time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from nibble.kernels.cpu.backend import CPUKernels
from nibble.kernels.interface import Array, AttentionBatch, Int4Weight, Int8Weight, Mode
from nibble.kernels.layout import BLOCK_SIZE, KVLayout, int4_num_bytes
from nibble.kernels.sampling import SamplingBatch

HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE, VOCAB, GROUP = 576, 30, 9, 3, 64, 1536, 49152, 32
QKV = (HEADS + 2 * KV_HEADS) * HEAD_DIM
LINEARS = {
    "qkv": (QKV, HIDDEN),
    "o": (HIDDEN, HIDDEN),
    "gate_up": (2 * INTERMEDIATE, HIDDEN),
    "down": (HIDDEN, INTERMEDIATE),
}


@dataclass
class Row:
    op: str
    microseconds: float  # of one call
    num_bytes: int  # read at least
    flops: int
    calls: int  # in a forward pass

    def __str__(self) -> str:
        seconds = self.microseconds / 1e6
        total = self.microseconds * self.calls / 1000
        return (
            f"{self.op:<28}{self.microseconds:>10.1f} us{self.num_bytes / seconds / 1e9:>9.1f} GB/s"
            f"{self.flops / seconds / 1e9:>9.0f} GFLOP/s{total:>9.2f} ms in all"
        )


def best_microseconds(functions: Sequence[Callable[[], object]], repeats: int) -> float:
    """Of one function: the fastest round through all of them. The fastest, because other processes only add time."""
    rounds = []
    for _ in range(repeats):
        start = time.perf_counter()
        for function in functions:
            function()
        rounds.append(time.perf_counter() - start)
    return min(rounds) / len(functions) * 1e6


class Bench:
    """The model's arrays, and rows of timings of them."""

    def __init__(self, kernels: CPUKernels, repeats: int) -> None:
        self.kernels = kernels
        self.repeats = repeats
        self.rng = np.random.default_rng(0)
        self.layout = KVLayout(KV_HEADS, HEAD_DIM)
        self.weights = {name: [self._int4(*shape) for _ in range(LAYERS)] for name, shape in LINEARS.items()}
        values = self.rng.integers(-127, 128, (VOCAB, HIDDEN)).astype(np.int8)
        self.head = Int8Weight(values, np.full((VOCAB, HIDDEN // GROUP), 0.01, np.float16), GROUP)
        self.norm = np.ones(HIDDEN, np.float32)

    def _int4(self, rows: int, columns: int) -> Int4Weight:
        # 0x3B in every byte of a scale is a number below 1, whatever the other bits.
        packed = self.rng.integers(0, 256, int4_num_bytes(rows, columns, GROUP), dtype=np.uint8) & np.uint8(0x3B)
        return Int4Weight(packed, rows, columns, GROUP)

    def _random(self, *shape: int) -> Array:
        return self.rng.standard_normal(shape).astype(np.float32)

    def linears(self, num_tokens: int, mode: Mode) -> list[Row]:
        rows = []
        for name, weights in self.weights.items():
            x = self._random(num_tokens, weights[0].in_features)
            calls = [partial(self.kernels.int4_linear, x, w, mode=mode) for w in weights]
            flops = 2 * num_tokens * weights[0].in_features * weights[0].out_features
            microseconds = best_microseconds(calls, self.repeats)
            rows.append(Row(f"int4_linear {name}", microseconds, weights[0].packed.nbytes, flops, LAYERS))
        return rows

    def lm_head(self, num_rows: int) -> Row:
        x = self._random(num_rows, HIDDEN)
        call = [lambda: self.kernels.int8_linear(x, self.head, mode=Mode.DECODE)]
        num_bytes = self.head.values.nbytes + self.head.scales.nbytes
        flops = 2 * num_rows * HIDDEN * VOCAB
        return Row("int8_linear lm_head", best_microseconds(call, self.repeats), num_bytes, flops, 1)

    def attention(self, num_sequences: int, num_queries: int, context_len: int, mode: Mode) -> list[Row]:
        """append_kv and paged_attention of sequences that end with num_queries new tokens."""
        blocks = -(-context_len // BLOCK_SIZE)
        tables = self.rng.permutation(num_sequences * blocks).astype(np.int32).reshape(num_sequences, blocks)
        caches = []
        for _ in range(LAYERS):
            cache = self.kernels.zeros((num_sequences * blocks, KV_HEADS, self.layout.head_block_bytes), np.uint8)
            slots = np.arange(num_sequences * blocks * BLOCK_SIZE)
            self.kernels.append_kv(self._random(len(slots), QKV), slots, cache, self.layout)
            caches.append(cache)
        starts = np.arange(num_sequences + 1, dtype=np.int32) * num_queries
        batch = AttentionBatch(starts, np.full(num_sequences, context_len, np.int32), tables)
        qkv = self._random(num_sequences * num_queries, QKV)
        slots = self.rng.permutation(num_sequences * blocks * BLOCK_SIZE)[: len(qkv)].astype(np.int64)
        attend = [partial(self.kernels.paged_attention, qkv, c, batch, self.layout, mode=mode) for c in caches]
        append = [partial(self.kernels.append_kv, qkv, slots, c, self.layout) for c in caches]
        pairs = num_sequences * num_queries * (2 * context_len - num_queries + 1) // 2
        kv_bytes = num_sequences * context_len * self.layout.block_bytes // BLOCK_SIZE
        flops = 4 * pairs * HEADS * HEAD_DIM
        return [
            Row(f"paged_attention ctx {context_len}", best_microseconds(attend, self.repeats), kv_bytes, flops, LAYERS),
            Row(
                "append_kv", best_microseconds(append, self.repeats), len(qkv) * 2 * KV_HEADS * HEAD_DIM * 4, 0, LAYERS
            ),
        ]

    def small_ops(self, num_tokens: int, num_rows: int) -> list[Row]:
        kernels = self.kernels
        x, qkv, gate_up = (self._random(num_tokens, n) for n in (HIDDEN, QKV, 2 * INTERMEDIATE))
        positions = np.arange(num_tokens, dtype=np.int32)
        table = kernels.rope_table([10000.0 ** (-i / 32) for i in range(HEAD_DIM // 2)], num_tokens, 1.0)
        logits = self._random(num_rows, VOCAB)
        greedy, random = self._sampling(num_rows, 0.0), self._sampling(num_rows, 1.0)
        timed: list[tuple[str, Callable[[], object], int, int]] = [
            ("embedding", lambda: kernels.embedding(positions, self.head), x.nbytes, 1),
            ("rms_norm", lambda: kernels.rms_norm(x, self.norm, 1e-5), 2 * x.nbytes, 2 * LAYERS + 1),
            ("rope", lambda: kernels.rope(qkv, positions, table, self.layout), 2 * qkv.nbytes, LAYERS),
            ("silu_and_mul", lambda: kernels.silu_and_mul(gate_up), gate_up.nbytes * 3 // 2, LAYERS),
            ("sample (greedy)", lambda: kernels.sample(logits, greedy), logits.nbytes, 1),
            ("sample (top_p 0.95)", lambda: kernels.sample(logits, random), logits.nbytes, 0),
        ]
        return [Row(name, best_microseconds([call] * 20, self.repeats), size, 0, n) for name, call, size, n in timed]

    def _sampling(self, rows: int, temperature: float) -> SamplingBatch:
        return SamplingBatch(
            np.full(rows, temperature, np.float32),
            np.zeros(rows, np.int32),
            np.full(rows, 0.95, np.float32),
            np.zeros(rows, np.float32),
            np.arange(rows, dtype=np.uint64),
            np.zeros(rows, np.int64),
        )

    def decode(self, batch_size: int, context_len: int) -> list[Row]:
        attention = self.attention(batch_size, 1, context_len, Mode.DECODE)
        linears = [*self.linears(batch_size, Mode.DECODE), self.lm_head(batch_size)]
        return [*linears, *attention, *self.small_ops(batch_size, batch_size)]

    def prefill(self, num_tokens: int) -> list[Row]:
        attention = self.attention(1, num_tokens, num_tokens, Mode.PREFILL)
        return [*self.linears(num_tokens, Mode.PREFILL), self.lm_head(1), *attention, *self.small_ops(num_tokens, 1)]


def report(title: str, rows: list[Row], num_tokens: int) -> None:
    milliseconds = sum(row.microseconds * row.calls for row in rows) / 1000
    print(f"\n{title}", *rows, sep="\n")  # noqa: T201  # a command
    print(f"{'sum':<28}{milliseconds:>10.2f} ms = {num_tokens / milliseconds * 1000:.0f} tokens/s")  # noqa: T201  # a command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, help="default: the CPUs this process may use")
    parser.add_argument("--context", type=int, default=256, help="tokens of each decoding sequence")
    parser.add_argument("--repeats", type=int, default=10, help="rounds of which the fastest counts")
    arguments = parser.parse_args()
    kernels = CPUKernels(arguments.threads)
    start = time.perf_counter()
    kernels.warm_up()
    print(f"{kernels.device_name}; warm_up {time.perf_counter() - start:.2f} s")  # noqa: T201  # a command
    print(f"memory read: {kernels.read_bandwidth() / 1e9:.1f} GB/s")  # noqa: T201  # a command
    bench = Bench(kernels, arguments.repeats)
    for batch_size in (1, 8):
        rows = bench.decode(batch_size, arguments.context)
        report(f"decode, batch {batch_size}, context {arguments.context}", rows, batch_size)
    for num_tokens in (512, 2048):
        report(f"prefill, {num_tokens} tokens", bench.prefill(num_tokens), num_tokens)


if __name__ == "__main__":
    main()
