"""Launches int8_linear.cu; PREFILL mode with many tokens multiplies with a dequantised copy instead."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from enum import IntEnum

import cupy
import numpy as np

from nibble.kernels.cuda import gemm
from nibble.kernels.cuda.compile import Defines
from nibble.kernels.cuda.device import Device
from nibble.kernels.cuda.int8_dequantize import int8_dequantize
from nibble.kernels.cuda.linear_arguments import check_arguments
from nibble.kernels.interface import Int8Weight, Mode

# CHUNK: columns whose sum is scaled at once. A group of 48 needs 16, of 96 needs 32.
WHOLE_ROW: Defines = (("CHUNK", 64), ("WHOLE_ROW", 1))
GROUPS_OF_32: Defines = (("CHUNK", 32), ("WHOLE_ROW", 0))
GROUPS_OF_16: Defines = (("CHUNK", 16), ("WHOLE_ROW", 0))
VARIANTS: tuple[Defines, ...] = (WHOLE_ROW, GROUPS_OF_32, GROUPS_OF_16)

WARPS = 8
THREADS = 32 * WARPS
MAX_STAGES = 4
TALL_ROWS = 32768  # enough for every warp of a large GPU to own rows


class Output(IntEnum):
    """What becomes of a sum; as in int8_linear.cu."""

    LOGITS = 0
    HALF = 1
    RESIDUAL = 2
    GATED = 3


@dataclass(frozen=True)
class Shape:
    """One function of int8_linear.cu: what a thread block computes at once."""

    name: str
    rows: int  # of a warp
    tokens: int
    k_warps: int  # warps among which K is cut; decides the order of additions, so a matrix has one of them only
    blocks: int  # per multiprocessor

    @property
    def stage_bytes(self) -> int:
        columns = 128 if self.k_warps == 1 else 64
        return WARPS * self.rows * columns + self.tokens * columns * self.k_warps * 2

    @property
    def partial_bytes(self) -> int:
        """The warps' sums, which are added up where K is cut."""
        return WARPS * self.rows * self.tokens * 4 if self.k_warps > 1 else 0


TALL = tuple(Shape(f"tall_{tokens}", 32, tokens, 1, 1) for tokens in (8, 16, 32, 64))
SHORT = (Shape("short_8", 16, 8, WARPS, 2), Shape("short_32", 32, 32, WARPS, 1))


def int8_linear(
    device: Device,
    x: cupy.ndarray,
    weight: Int8Weight,
    bias: cupy.ndarray | None,
    residual: cupy.ndarray | None,
    mode: Mode,
    gated: bool,
) -> cupy.ndarray:
    """See `Kernels.int8_linear`; x and the result are float16, residual and bias float32."""
    num_tokens, num_rows = x.shape[0], weight.out_features
    check_arguments(x, num_rows, weight.in_features, bias, residual, gated)
    _check(weight)
    if mode is Mode.PREFILL and num_tokens:
        rows = functools.partial(int8_dequantize, device, weight)
        return gemm.linear(device, x, rows, num_rows, bias, residual, gated)
    if residual is not None:
        out, output = residual, Output.RESIDUAL
    elif gated:
        out, output = device.empty((num_tokens, num_rows // 2), np.float16), Output.GATED
    else:
        out, output = device.empty((num_tokens, num_rows), np.float16), Output.HALF
    _launch(device, x, weight, bias, out, output)
    return out


def logits(device: Device, x: cupy.ndarray, weight: Int8Weight) -> cupy.ndarray:
    """See `Kernels.logits`; x float16."""
    check_arguments(x, weight.out_features, weight.in_features, None, None, False)
    _check(weight)
    out = device.empty((x.shape[0], weight.out_features), np.float32)
    _launch(device, x, weight, None, out, Output.LOGITS)
    return out


def _check(weight: Int8Weight) -> None:
    num_rows, num_columns = weight.values.shape
    assert weight.values.dtype == np.int8, f"values are {weight.values.dtype}, expected int8"
    assert weight.scales.dtype == np.float16, f"scales are {weight.scales.dtype}, expected float16"
    assert weight.group_size % 16 == 0, f"group size {weight.group_size}, expected a multiple of 16"
    assert weight.scales.shape == (num_rows, num_columns // weight.group_size), "scales must be (N, K / group_size)"


def _launch(
    device: Device,
    x: cupy.ndarray,
    weight: Int8Weight,
    bias: cupy.ndarray | None,
    out: cupy.ndarray,
    output: Output,
) -> None:
    num_tokens, num_columns = x.shape
    if num_tokens == 0:
        return
    shapes = TALL if weight.out_features >= TALL_ROWS else SHORT
    shape = next((shape for shape in shapes if num_tokens <= shape.tokens), shapes[-1])
    stages = min(MAX_STAGES, (device.max_shared_bytes - shape.partial_bytes) // shape.stage_bytes)
    assert stages >= 2, f"{shape.name} needs more shared memory than the device has"
    # Thread blocks with the same rows and other tokens are neighbours: they find the rows in the L2 cache.
    chunks = -(-num_tokens // shape.tokens)
    units = -(-weight.out_features // shape.rows)
    ranges = min(max(device.num_multiprocessors * shape.blocks // chunks, 1), units)
    device.kernel("int8_linear", shape.name, _defines(weight)).launch(
        (chunks, ranges, 1),
        THREADS,
        x,
        weight.values,
        weight.scales,
        bias,
        out,
        np.int32(num_tokens),
        np.int32(weight.out_features),
        np.int32(num_columns),
        np.int32(weight.group_size),
        np.int32(stages),
        np.int32(output),
        shared_bytes=stages * shape.stage_bytes + shape.partial_bytes,
    )


def _defines(weight: Int8Weight) -> Defines:
    if weight.group_size == weight.in_features:
        return WHOLE_ROW
    return GROUPS_OF_32 if weight.group_size % 32 == 0 else GROUPS_OF_16
