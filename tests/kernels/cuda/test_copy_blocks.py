"""Blocks go to the host's memory and come back to others, bit for bit, and nothing else is touched."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from nibble.kernels.cpu.copy_blocks import copy_blocks

if TYPE_CHECKING:
    from nibble.kernels.cuda.backend import CUDAKernels

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    ("num_layers", "num_heads", "head_block_bytes"), [(1, 1, 16), (2, 3, 4096 + 512), (3, 1, 32768), (2, 8, 16896)]
)
@pytest.mark.parametrize("num_pairs", [0, 1, 5])
def test_blocks_go_and_come_back(
    kernels: CUDAKernels,
    rng: np.random.Generator,
    num_layers: int,
    num_heads: int,
    head_block_bytes: int,
    num_pairs: int,
) -> None:
    cache = rng.integers(0, 256, (num_layers, 9, num_heads, head_block_bytes), dtype=np.uint8)
    swapped = kernels.host_buffer((7, num_layers, num_heads, head_block_bytes), np.uint8)
    swapped[...] = 0xAA
    expected = swapped.copy()
    pairs = kernels.host_buffer((2, num_pairs, 2), np.int32)
    on_device = kernels.to_device(cache)
    for turn, to_host in enumerate((True, False)):
        pairs[turn, :, 0], pairs[turn, :, 1] = rng.permutation(9)[:num_pairs], rng.permutation(7)[:num_pairs]
        kernels.copy_blocks(on_device, swapped, pairs[turn], to_host=to_host)
        copy_blocks(cache, expected, pairs[turn], to_host)
    np.testing.assert_array_equal(kernels.to_host(on_device), cache)
    np.testing.assert_array_equal(swapped, expected)
