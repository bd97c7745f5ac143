"""x @ w.T for weights in fp16, by cuBLAS: it serves comparisons, where speed is not what counts.

What cuBLAS adds up in which order depends on the shape. So in DECODE mode every product has DECODE_TOKENS tokens, of
which some are nobody's: a token's result is then the same alone and among others.
"""

from __future__ import annotations

import cupy
import numpy as np

from nibble.kernels.cuda import gemm
from nibble.kernels.cuda.add_bias import add_bias
from nibble.kernels.cuda.device import Device
from nibble.kernels.cuda.linear_arguments import check_arguments
from nibble.kernels.cuda.silu_and_mul import silu_and_mul
from nibble.kernels.interface import Float16Weight, Mode

DECODE_TOKENS = 64


def float16_linear(
    device: Device,
    x: cupy.ndarray,
    weight: Float16Weight,
    bias: cupy.ndarray | None,
    residual: cupy.ndarray | None,
    mode: Mode,
    gated: bool,
) -> cupy.ndarray:
    """See `Kernels.float16_linear`; x and the result are float16, residual and bias float32."""
    num_rows = weight.out_features
    _check(x, weight, bias, residual, gated)
    if mode is Mode.PREFILL and len(x):
        return gemm.linear(
            device, x, lambda first, count: weight.values[first : first + count], num_rows, bias, residual, gated
        )
    out = residual
    if out is None:
        out = device.empty((len(x), num_rows // (2 if gated else 1)), np.float16)
    _decode(device, x, weight, bias, out, gated)
    return out


def logits(device: Device, x: cupy.ndarray, weight: Float16Weight) -> cupy.ndarray:
    """See `Kernels.logits`; x float16."""
    _check(x, weight, None, None, False)
    out = device.empty((len(x), weight.out_features), np.float32)
    _decode(device, x, weight, None, out, False, accumulates=False)
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


def _decode(
    device: Device,
    x: cupy.ndarray,
    weight: Float16Weight,
    bias: cupy.ndarray | None,
    out: cupy.ndarray,
    gated: bool,
    accumulates: bool = True,
) -> None:
    """out = the product, or += where it is float32 and accumulates."""
    accumulates = accumulates and out.dtype == np.float32
    for start in range(0, len(x), DECODE_TOKENS):
        part = slice(start, min(start + DECODE_TOKENS, len(x)))
        with device.arena.scope():
            tokens = device.empty((DECODE_TOKENS, x.shape[1]), np.float16)
            sums = device.empty((DECODE_TOKENS, weight.out_features), out.dtype)
            _copy(x[part], tokens)
            if accumulates:
                _copy(out[part], sums)
            gemm.multiply(tokens, weight.values, sums, 0, accumulates)
            if bias is not None:
                add_bias(device, sums, bias)
            result = silu_and_mul(device, sums) if gated else sums
            _copy(result[: part.stop - start], out[part])


def _copy(source: cupy.ndarray, target: cupy.ndarray) -> None:
    target.data.copy_from_device_async(source.data, source.nbytes)
