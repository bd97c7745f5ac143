"""Launches sample.cu."""

from __future__ import annotations

import cupy
import numpy as np

from nibble.kernels.cuda.compile import Defines
from nibble.kernels.cuda.device import Device
from nibble.kernels.sampling import SamplingBatch

VARIANTS: tuple[Defines, ...] = ((),)

# A row is a cluster of thread blocks where the device has clusters, one thread block where not: sample_cluster.cuh.
CLUSTER, CLUSTER_THREADS = 8, 512
SINGLE_THREADS = 1024
STATIC_SHARED_BYTES = 32 << 10  # an upper bound of what sample.cu declares


def sample(device: Device, logits: cupy.ndarray, batch: SamplingBatch) -> cupy.ndarray:
    """See `Kernels.sample`; logits are left as they are."""
    num_rows, vocabulary = logits.shape
    assert logits.dtype == np.float32, f"logits are {logits.dtype}, expected float32"
    columns = (batch.temperature, batch.top_k, batch.top_p, batch.min_p, batch.seeds, batch.positions)
    dtypes = (np.float32, np.int32, np.float32, np.float32, np.uint64, np.int64)
    for column, dtype in zip(columns, dtypes, strict=True):
        assert column.dtype == dtype, f"a column of the sampling batch is {column.dtype}, expected {dtype}"
        assert column.shape == (num_rows,), f"a column of the sampling batch is {column.shape}, expected ({num_rows},)"
    out = device.empty((num_rows,), np.int32)
    has_clusters = int(device.architecture.removeprefix("sm_").removesuffix("a")) >= 90
    slice_bytes = (-(-_num_groups(vocabulary) // CLUSTER)) * 16
    keeps = has_clusters and slice_bytes + STATIC_SHARED_BYTES <= device.max_shared_bytes
    device.kernel("sample", "sample").launch(
        (CLUSTER if has_clusters else 1, num_rows, 1),
        CLUSTER_THREADS if has_clusters else SINGLE_THREADS,
        logits,
        *columns,
        out,
        np.int32(vocabulary),
        np.int32(keeps),
        shared_bytes=slice_bytes if keeps else 0,
        cluster=CLUSTER if has_clusters else 1,
    )
    return out


def _num_groups(vocabulary: int) -> int:
    """The most runs of 4 logits, aligned to 16 bytes, that a row lies in."""
    return (vocabulary + 3 + 3) // 4
