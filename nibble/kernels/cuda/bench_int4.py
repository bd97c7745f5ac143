"""Speed of `int4_linear` on this GPU: `python -m nibble.kernels.cuda.bench_int4 [--model llama-3-8b] [--tokens 1 64]`.

Decode: the four linears of all layers as one graph, each layer with weights of its own, which is what an engine step
runs and is too large for L2; then each shape alone over all its layers. Prefill: each shape alone, T tokens.
Times are medians by GPU events, of graph replays but for prefill, which the engine runs op by op.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import cupy
import numpy as np

from nibble.kernels.cuda.backend import CUDAKernels
from nibble.kernels.cuda.bench import Timing, median_us, print_timings
from nibble.kernels.interface import Int4Weight, Mode
from nibble.kernels.layout import TILE_COLUMNS, TILE_ROWS, int4_num_bytes

NUM_LAYERS = 32
PREFILL_LAYERS = 2  # of which each shape alone is timed
RANDOM_ROWS = 256  # of x; more repeat them


@dataclass(frozen=True)
class Shape:
    """One linear of a layer."""

    name: str
    rows: int
    columns: int
    gated: bool = False
    adds: bool = False  # to the residual
    has_bias: bool = False


def _model(hidden: int, qkv: int, intermediate: int, has_bias: bool = False) -> tuple[Shape, ...]:
    return (
        Shape("qkv", qkv, hidden, has_bias=has_bias),
        Shape("o", hidden, hidden, adds=True),
        Shape("gate_up", 2 * intermediate, hidden, gated=True),
        Shape("down", hidden, intermediate, adds=True),
    )


MODELS = {
    "llama-3-8b": (_model(4096, 6144, 14336), 128),
    "qwen2.5-7b": (_model(3584, 4608, 18944, has_bias=True), 128),
    "llama-3.2-1b": (_model(2048, 3072, 8192), 128),
    "smollm2-135m": (_model(576, 960, 1536), 32),
}


class Layers:
    """Random weights of all layers; one random run of tiles on the host, copied from many places of it."""

    def __init__(self, kernels: CUDAKernels, shapes: Sequence[Shape], group_size: int, num_layers: int) -> None:
        self.kernels = kernels
        rng = np.random.default_rng(0)
        sizes = [int4_num_bytes(shape.rows, shape.columns, group_size) for shape in shapes]
        tile_bytes = int4_num_bytes(TILE_ROWS, TILE_COLUMNS, group_size)
        num_tiles = -(-max(sizes) // tile_bytes) + 97
        source = kernels.to_device(_random_tiles(rng, num_tiles, tile_bytes))
        self.weights: list[list[Int4Weight]] = []
        for _ in range(num_layers):
            layer = []
            for shape, size in zip(shapes, sizes, strict=True):
                packed = kernels.zeros((size,), np.uint8)
                offset = int(rng.integers(97)) * tile_bytes
                cupy.cuda.runtime.memcpyAsync(
                    packed.data.ptr, source.data.ptr + offset, size, 3, kernels.device.stream.ptr
                )
                layer.append(Int4Weight(packed, shape.rows, shape.columns, group_size))
            self.weights.append(layer)
        kernels.device.stream.synchronize()
        self.num_bytes = sizes


def _random_tiles(rng: np.random.Generator, num_tiles: int, tile_bytes: int) -> np.ndarray:
    nibble_bytes = TILE_ROWS * TILE_COLUMNS // 2
    tiles = rng.integers(0, 256, (num_tiles, tile_bytes), dtype=np.uint8)
    scale = rng.random((num_tiles, (tile_bytes - nibble_bytes) // 4)) * 0.004
    pairs = np.stack((scale, -8 * scale), axis=-1).astype(np.float16)
    tiles[:, nibble_bytes:] = pairs.reshape(num_tiles, -1).view(np.uint8)
    return tiles.reshape(-1)


class Bench:
    def __init__(self, kernels: CUDAKernels, model: str, num_layers: int) -> None:
        self.kernels, self.model = kernels, model
        self.shapes, group_size = MODELS[model]
        self.layers = Layers(kernels, self.shapes, group_size, num_layers)
        self.num_layers = num_layers
        self.rng = np.random.default_rng(1)

    def _arrays(self, shape: Shape, num_tokens: int) -> dict[str, Any]:
        """x, bias and residual."""
        rows = self.rng.standard_normal((min(num_tokens, RANDOM_ROWS), shape.columns), np.float32)
        x = np.resize(rows.astype(np.float16), (num_tokens, shape.columns))
        bias = self.rng.standard_normal(shape.rows, np.float32) if shape.has_bias else None
        return {
            "x": self.kernels.to_device(x),
            "bias": None if bias is None else self.kernels.to_device(bias),
            "residual": self.kernels.zeros((num_tokens, shape.rows), np.float32) if shape.adds else None,
            "gated": shape.gated,
        }

    def chain(self, num_tokens: int, mode: Mode) -> Timing:
        """All layers; each linear reads a buffer of its own, but down, which reads what gate_up wrote."""
        arrays = [self._arrays(shape, num_tokens) for shape in self.shapes]

        def step() -> None:
            for layer in self.layers.weights:
                with self.kernels.temporaries():
                    hidden = None
                    for shape, weight, given in zip(self.shapes, layer, arrays, strict=True):
                        options = dict(given)
                        x = options.pop("x")
                        if shape.name == "down":
                            x = hidden
                        hidden = self.kernels.int4_linear(x, weight, mode=mode, **options)

        us = median_us(self.kernels, step, mode is Mode.DECODE)
        return self._timing(f"{self.num_layers} layers", num_tokens, us, self.num_layers, range(len(self.shapes)))

    def alone(self, index: int, num_tokens: int, mode: Mode, num_layers: int) -> Timing:
        options = self._arrays(self.shapes[index], num_tokens)
        x = options.pop("x")

        def step() -> None:
            for layer in self.layers.weights[:num_layers]:
                with self.kernels.temporaries():
                    self.kernels.int4_linear(x, layer[index], mode=mode, **options)

        us = median_us(self.kernels, step, mode is Mode.DECODE) / num_layers
        return self._timing(self.shapes[index].name, num_tokens, us, 1, [index])

    def _timing(self, name: str, num_tokens: int, us: float, repeats: int, indices: Sequence[int]) -> Timing:
        num_bytes = repeats * sum(self.layers.num_bytes[i] for i in indices)
        flops = repeats * sum(2 * num_tokens * self.shapes[i].rows * self.shapes[i].columns for i in indices)
        return Timing("int4_linear", f"{self.model} {name}, {num_tokens} tokens", us, num_bytes, flops)


def timings(
    kernels: CUDAKernels, model: str, num_layers: int, tokens: list[int], alone: list[int], prefill: list[int]
) -> Iterator[Timing]:
    """tokens: of all linears in DECODE mode; alone: of each; prefill: of both in PREFILL mode."""
    bench = Bench(kernels, model, num_layers)
    for num_tokens in tokens:
        yield bench.chain(num_tokens, Mode.DECODE)
    for num_tokens in alone:
        for index in range(len(bench.shapes)):
            yield bench.alone(index, num_tokens, Mode.DECODE, num_layers)
    for num_tokens in prefill:
        for index in range(len(bench.shapes)):
            yield bench.alone(index, num_tokens, Mode.PREFILL, min(PREFILL_LAYERS, num_layers))
        yield bench.chain(num_tokens, Mode.PREFILL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="llama-3-8b")
    parser.add_argument("--tokens", type=int, nargs="*", default=[1, 8, 16, 32, 64, 128, 256], help="of decode")
    parser.add_argument("--prefill", type=int, nargs="*", default=[512, 2048, 8192], help="tokens of prefill")
    parser.add_argument("--alone", type=int, nargs="*", default=[1, 64], help="decode tokens of each shape alone")
    parser.add_argument("--layers", type=int, default=NUM_LAYERS)
    arguments = parser.parse_args()
    kernels = CUDAKernels()
    lists = (arguments.tokens, arguments.alone, arguments.prefill)
    print_timings(kernels, timings(kernels, arguments.model, arguments.layers, *lists))


if __name__ == "__main__":
    main()
