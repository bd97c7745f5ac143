"""Launches norm_heads.cu."""

from __future__ import annotations

import cupy
import numpy as np

from nibble.kernels.cuda.compile import Defines
from nibble.kernels.cuda.device import Device
from nibble.kernels.cuda.rope import BLOCK, HEAD_DIMS, defines, num_query_heads
from nibble.kernels.layout import KVDtype, KVLayout

VARIANTS: tuple[Defines, ...] = tuple((("HEAD_DIM", d), ("KV_TYPE", 0)) for d in HEAD_DIMS)


def norm_heads(
    device: Device, qkv: cupy.ndarray, q_weight: cupy.ndarray, k_weight: cupy.ndarray, eps: float, layout: KVLayout
) -> None:
    """See `Kernels.norm_heads`; qkv is float16."""
    num_heads = num_query_heads(qkv, layout)
    for weight in (q_weight, k_weight):
        assert (weight.shape, weight.dtype) == ((layout.head_dim,), np.float32), "weights must be float32 (D,)"
    variant = defines(KVLayout(layout.num_kv_heads, layout.head_dim, KVDtype.INT8))
    device.kernel("norm_heads", "norm_heads", variant).launch(
        (len(qkv), 1, 1),
        BLOCK,
        qkv,
        q_weight,
        k_weight,
        np.float32(eps),
        np.int32(qkv.shape[1]),
        np.int32(num_heads),
        np.int32(num_heads + layout.num_kv_heads),
    )
