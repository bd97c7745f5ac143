"""Penalties, biases and bans: sparse additions to the logits."""

from __future__ import annotations

from nibble.kernels.cpu.jit import kernel_jit


@kernel_jit
def add_to_logits(logits, rows, ids, values):
    """logits[rows[i], ids[i]] += values[i], in place; a pair that occurs twice is added twice."""
    for i in range(len(values)):
        logits[rows[i], ids[i]] += values[i]
