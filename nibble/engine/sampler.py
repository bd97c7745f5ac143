"""Sampling parameters of a step's sequences as the arrays that `Kernels.sample` takes."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from nibble.engine.sequence import Sequence
from nibble.kernels.interface import Array, Kernels, SamplingBatch


def sample(kernels: Kernels, logits: Array, sequences: list[Sequence]) -> list[int]:
    """One token id per sequence from logits (S, vocab_size); -1 where a row is not finite.

    The random number is a function of (seed, index of the token in its request) alone.
    """
    _forbid_stop_tokens(kernels, logits, sequences)
    params = [sequence.request.sampling for sequence in sequences]

    def column(values: Iterable[float], dtype: type[np.generic]) -> Array:
        return kernels.to_device(np.array(list(values), dtype=dtype))

    batch = SamplingBatch(
        temperature=column((p.temperature for p in params), np.float32),
        top_k=column((p.top_k for p in params), np.int32),
        top_p=column((p.top_p for p in params), np.float32),
        min_p=column((p.min_p for p in params), np.float32),
        seeds=column((p.seed for p in params), np.uint64),
        positions=column((sequence.num_generated_tokens for sequence in sequences), np.int64),
    )
    token_ids: list[int] = kernels.to_host(kernels.sample(logits, batch)).tolist()
    return token_ids


def _forbid_stop_tokens(kernels: Kernels, logits: Array, sequences: list[Sequence]) -> None:
    """Until min_tokens were generated, a stop token must not be drawn."""
    rows: list[int] = []
    ids: list[int] = []
    for row, sequence in enumerate(sequences):
        sampling = sequence.request.sampling
        if sequence.num_generated_tokens < sampling.min_tokens:
            rows += [row] * len(sampling.stop_token_ids)
            ids += sampling.stop_token_ids
    if rows:
        to_device = kernels.to_device
        values = np.full(len(rows), -np.inf, dtype=np.float32)
        kernels.add_to_logits(
            logits, to_device(np.array(rows, np.int32)), to_device(np.array(ids, np.int32)), to_device(values)
        )
