"""Models of real shapes with random weights, in memory: for measuring where nothing can be downloaded.

The tensors of a layer are made once and given for every layer; the engine copies them to as many places on the device.
Weights have about unit gain, so that activations stay finite and of a usual size.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nibble.engine.checkpoint.native import Checkpoint, write_checkpoint
from nibble.engine.checkpoint.schema import FORMAT_VERSION, Description, LinearFormat, linear_sizes, tensor_specs
from nibble.engine.model_config import ModelConfig, RopeConfig
from nibble.kernels.layout import TILE_ROWS
from nibble.kernels.pack import pack_int4

RANDOM_ROW_TILES = 4  # of each matrix; the others repeat them
RANDOM_INT8_BYTES = 16 << 20


@dataclass(frozen=True)
class ModelShape:
    config: ModelConfig
    group_size: int


def _llama(**numbers: Any) -> ModelConfig:
    return ModelConfig(architecture="llama", rms_norm_eps=1e-5, **numbers)


SHAPES = {
    "llama-3-8b": ModelShape(
        _llama(
            vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_layers=32, num_heads=32, num_kv_heads=8,
            head_dim=128, max_context_tokens=8192, rope=RopeConfig(theta=500000.0),
        ),
        group_size=128,
    ),
    "qwen2.5-7b": ModelShape(
        _llama(
            vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_layers=28, num_heads=28, num_kv_heads=4,
            head_dim=128, max_context_tokens=32768, rope=RopeConfig(theta=1000000.0), attention_bias=True,
        ),
        group_size=128,
    ),
    "llama-3.2-1b": ModelShape(
        _llama(
            vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_layers=16, num_heads=32, num_kv_heads=8,
            head_dim=64, max_context_tokens=131072, rope=RopeConfig(theta=500000.0), tie_word_embeddings=True,
        ),
        group_size=128,
    ),
    "smollm2-135m": ModelShape(
        _llama(
            vocab_size=49152, hidden_size=576, intermediate_size=1536, num_layers=30, num_heads=9, num_kv_heads=3,
            head_dim=64, max_context_tokens=8192, rope=RopeConfig(theta=100000.0), tie_word_embeddings=True,
        ),
        group_size=32,
    ),
}  # fmt: skip


class RandomCheckpoint(Checkpoint):
    """Every linear INT4 but the embedding and the head, which are INT8 with one scale per row."""

    def __init__(self, shape: ModelShape, seed: int = 0) -> None:
        self.config = shape.config
        sizes = linear_sizes(shape.config)
        int8 = {name: LinearFormat(*sizes[name], sizes[name][1]) for name in sizes if "." not in name}
        int4 = {name: LinearFormat(*size, shape.group_size) for name, size in sizes.items() if name not in int8}
        self.description = Description(format_version=FORMAT_VERSION, config=shape.config, int4=int4, int8=int8)
        self._specs = tensor_specs(self.description)
        self._rng = np.random.default_rng(seed)
        self._packed: dict[LinearFormat, npt.NDArray[np.uint8]] = {}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._specs)

    def has(self, name: str) -> bool:
        return name in self._specs

    def array(self, name: str) -> npt.NDArray[Any]:
        if name in self.description.int4:
            return self._int4(self.description.int4[name])
        shape = self._specs[name].shape
        if name.endswith(".values"):
            pool = np.frombuffer(self._rng.bytes(RANDOM_INT8_BYTES), np.int8)
            return np.resize(pool, shape)
        if name.endswith(".scales"):
            gain = 1.0 if name.startswith("embedding") else self.config.hidden_size**-0.5
            return (self._rng.uniform(0.5, 1.5, shape) * gain / 74).astype(np.float16)  # 74: a random byte's deviation
        if name.endswith("norm"):
            return self._rng.uniform(0.7, 1.3, shape).astype(np.float32)
        return self._rng.normal(0, 0.3, shape).astype(np.float32)

    def write(self, directory: Path) -> None:
        """As `model.safetensors` of a native checkpoint directory, which exists."""
        arrays = ((name, self.array(name)) for name in self.names)
        write_checkpoint(directory, self.config, arrays, int4=self.description.int4, int8=self.description.int8)

    def _int4(self, linear: LinearFormat) -> npt.NDArray[np.uint8]:
        if linear not in self._packed:
            rows, columns = RANDOM_ROW_TILES * TILE_ROWS, linear.in_features
            q = np.frombuffer(self._rng.bytes(rows * columns), np.uint8).reshape(rows, columns) & np.uint8(15)
            scale = self._rng.uniform(0.5, 1.5, (rows, columns // linear.group_size)) * 0.2 / np.sqrt(columns)
            minimum = -7.5 * scale * self._rng.uniform(0.9, 1.1, scale.shape)
            tiles = pack_int4(q, scale.astype(np.float16), minimum.astype(np.float16))
            num_bytes = -(-linear.out_features // TILE_ROWS) * (len(tiles) // RANDOM_ROW_TILES)
            self._packed[linear] = np.resize(tiles, (num_bytes,))
        return self._packed[linear]
