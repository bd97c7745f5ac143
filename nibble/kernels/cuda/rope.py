"""Launches rope.cu and makes its table."""

from __future__ import annotations

import cupy
import numpy as np

from nibble.kernels.cuda.compile import Defines
from nibble.kernels.cuda.device import Device
from nibble.kernels.layout import KVDtype, KVLayout

HEAD_DIMS = (64, 96, 128, 256)
KV_TYPES = {KVDtype.INT8: 0, KVDtype.FP16: 1, KVDtype.INT8_CHANNEL: 2}  # as attention.cuh has them
MAX_GROUP_SIZE = 16  # query heads per kv head
BLOCK = 256

# What the kernels over heads are compiled for; the rotation is the same for both formats
VARIANTS: tuple[Defines, ...] = tuple((("HEAD_DIM", d), ("KV_TYPE", 0)) for d in HEAD_DIMS)


def defines(layout: KVLayout) -> Defines:
    """The constants of a kernel that reads or writes KV blocks."""
    assert layout.head_dim in HEAD_DIMS, f"head_dim is {layout.head_dim}, the kernels have {HEAD_DIMS}"
    return (("HEAD_DIM", layout.head_dim), ("KV_TYPE", KV_TYPES[layout.dtype]))


def num_query_heads(qkv: cupy.ndarray, layout: KVLayout) -> int:
    """Checks qkv float16 (T, (num_heads + 2 * num_kv_heads) * D) and returns num_heads."""
    assert qkv.dtype == np.float16, f"qkv is {qkv.dtype}, expected float16"
    columns, remainder = divmod(qkv.shape[1], layout.head_dim)
    num_heads: int = columns - 2 * layout.num_kv_heads
    assert remainder == 0, f"qkv has {qkv.shape[1]} columns, head_dim is {layout.head_dim}"
    assert num_heads > 0, f"qkv has {columns} heads, {layout.num_kv_heads} kv heads"
    group_size, remainder = divmod(num_heads, layout.num_kv_heads)
    assert remainder == 0, f"{num_heads} heads, {layout.num_kv_heads} kv heads"
    assert group_size <= MAX_GROUP_SIZE, f"{group_size} heads per kv head, the limit is {MAX_GROUP_SIZE}"
    return num_heads


def check_table(table: cupy.ndarray, layout: KVLayout) -> None:
    """A table as `rope_table` makes it."""
    assert table.dtype == np.float32, f"the rope table is {table.dtype}, expected float32"
    assert table.shape[1:] == (2, layout.head_dim // 2), f"the rope table has shape {table.shape}"


def rope_table(
    device: Device, inverse_frequencies: list[float], num_positions: int, attention_factor: float
) -> cupy.ndarray:
    """See `Kernels.rope_table`. Made on the host: angles need float64."""
    angles = np.arange(num_positions, dtype=np.float64)[:, None] * np.array(inverse_frequencies, np.float64)
    table = np.stack((np.cos(angles), np.sin(angles)), axis=1) * attention_factor
    return cupy.asarray(np.ascontiguousarray(table, np.float32))


def rope(device: Device, qkv: cupy.ndarray, positions: cupy.ndarray, table: cupy.ndarray, layout: KVLayout) -> None:
    """See `Kernels.rope`; qkv is float16."""
    num_heads = num_query_heads(qkv, layout)
    check_table(table, layout)
    assert (positions.shape, positions.dtype) == ((len(qkv),), np.int32), "positions must be int32 (T,)"
    variant = defines(KVLayout(layout.num_kv_heads, layout.head_dim, KVDtype.INT8))
    device.kernel("rope", "rope", variant).launch(
        (len(qkv), 1, 1),
        BLOCK,
        qkv,
        positions,
        table,
        np.int32(qkv.shape[1]),
        np.int32(num_heads + layout.num_kv_heads),
    )
