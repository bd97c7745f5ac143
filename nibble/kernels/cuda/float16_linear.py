"""x @ w.T for weights in fp16, by cuBLASLt: it serves comparisons, where speed is not what counts.

A token's result is the same alone and among others, in DECODE mode and in PREFILL mode: see `cublas_lt.py`.
"""

from __future__ import annotations

import cupy
import numpy as np

from nibble.kernels.cuda import gemm
from nibble.kernels.cuda.device import Device
from nibble.kernels.cuda.linear_arguments import check_arguments
from nibble.kernels.interface import Float16Weight


def float16_linear(
    device: Device,
    x: cupy.ndarray,
    weight: Float16Weight,
    bias: cupy.ndarray | None,
    residual: cupy.ndarray | None,
    gated: bool,
) -> cupy.ndarray:
    """See `Kernels.float16_linear`; x and the result are float16, residual and bias float32."""
    num_rows = weight.out_features
    _check(x, weight, bias, residual, gated)
    if not len(x):
        return residual if residual is not None else device.empty((0, num_rows // (2 if gated else 1)), np.float16)
    return gemm.linear(
        device, x, lambda first, count: weight.values[first : first + count], num_rows, bias, residual, gated
    )


def logits(device: Device, x: cupy.ndarray, weight: Float16Weight) -> cupy.ndarray:
    """See `Kernels.logits`; x float16."""
    _check(x, weight, None, None, False)
    out = device.empty((len(x), weight.out_features), np.float32)
    if len(x):
        gemm.multiply(x, weight.values, out, 0, False)
    return out


def _check(
    x: cupy.ndarray,
    weight: Float16Weight,
    bias: cupy.ndarray | None,
    residual: cupy.ndarray | None,
    gated: bool,
) -> None:
    check_arguments(x, weight.out_features, weight.in_features, bias, residual, gated)
    assert weight.values.dtype == np.float16, f"values are {weight.values.dtype}, expected float16"
    assert weight.in_features % 16 == 0, f"{weight.in_features} columns, not a multiple of 16"
