"""Launches logprobs.cu."""

from __future__ import annotations

import cupy
import numpy as np

from nibble.kernels.cuda.compile import Defines
from nibble.kernels.cuda.device import Device
from nibble.kernels.sampling import LOGPROB_WORDS

VARIANTS: tuple[Defines, ...] = ((),)

BLOCK = 1024  # threads, and the most cells of a row
RUN = 128  # logits that a warp loads at once; a cell is a multiple of it


def logprobs(
    device: Device,
    logits: cupy.ndarray,
    ids: cupy.ndarray,
    num_logprobs: cupy.ndarray,
    out: cupy.ndarray,
    out_rows: cupy.ndarray,
) -> None:
    """See `SamplingKernels.logprobs`."""
    num_rows, vocabulary = logits.shape
    assert logits.dtype == np.float32, f"logits are {logits.dtype}, expected float32"
    for column in (ids, num_logprobs, out_rows):
        assert column.dtype == np.int32, f"a column is {column.dtype}, expected int32"
        assert column.shape == (num_rows,), f"a column is {column.shape}, expected ({num_rows},)"
    assert out.dtype == np.int32, f"out is {out.dtype}, expected int32"
    assert out.shape[1] == LOGPROB_WORDS, f"out has {out.shape[1]} columns, expected {LOGPROB_WORDS}"
    cell_size = RUN * -(-vocabulary // (RUN * BLOCK))
    device.kernel("logprobs", "logprobs").launch(
        (num_rows, 1, 1),
        BLOCK,
        logits,
        ids,
        num_logprobs,
        out_rows,
        out,
        np.int32(vocabulary),
        np.int32(cell_size),
    )
