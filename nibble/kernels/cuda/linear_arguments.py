"""What the launchers of the linears check alike: the arguments of `Kernels.int4_linear` and `int8_linear`."""

from __future__ import annotations

import cupy
import numpy as np

from nibble.kernels.layout import GATE_UP_INTERLEAVE


def check_arguments(
    x: cupy.ndarray,
    num_rows: int,
    num_columns: int,
    bias: cupy.ndarray | None,
    residual: cupy.ndarray | None,
    gated: bool,
) -> None:
    """num_rows and num_columns: of the matrix."""
    assert x.dtype == np.float16, f"x is {x.dtype}, expected float16"
    assert x.shape[1] == num_columns, f"x has {x.shape[1]} columns, the matrix {num_columns}"
    assert bias is None or (bias.shape, bias.dtype) == ((num_rows,), np.float32), "bias must be float32 (N,)"
    if residual is not None:
        assert not gated, "a gated product has no residual"
        found, expected = (residual.shape, residual.dtype), ((x.shape[0], num_rows), np.float32)
        assert found == expected, f"residual is {found}, expected {expected}"
    assert not gated or num_rows % (2 * GATE_UP_INTERLEAVE) == 0, f"{num_rows} rows are not interleaved runs"
