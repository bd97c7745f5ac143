"""Attention over the paged cache: one kernel per layer for decoding, two for prompts, planned once per step."""

from __future__ import annotations

import cupy
import numpy as np

from nibble.kernels.cuda.append_kv import rope_append_kv
from nibble.kernels.cuda.attention_decode import attention_decode
from nibble.kernels.cuda.attention_plan import plan_attention
from nibble.kernels.cuda.attention_prefill import attention_prefill
from nibble.kernels.cuda.device import Device
from nibble.kernels.cuda.rope import check_table
from nibble.kernels.interface import AttentionBatch, AttentionStep, KVChannels, Mode
from nibble.kernels.layout import KVDtype, KVLayout

__all__ = ["attention", "paged_attention", "plan_attention"]

# Bytes of a cached row. The fused kernel puts the new token's value into the ring of shared memory before it has used
# those before it, so the ring must hold all values of a group. It cannot with longer rows: fp16, head_dim 256.
MAX_FUSED_ROW_BYTES = 256


def attention(
    device: Device,
    qkv: cupy.ndarray,
    kv_cache: cupy.ndarray,
    step: AttentionStep,
    layout: KVLayout,
    channels: KVChannels | None,
    mode: Mode,
) -> cupy.ndarray:
    """See `Kernels.attention`. One kernel where each sequence has one query and decodes, otherwise two.

    That one kernel reads what was cached before `step.plan` was made without waiting for the kernels in between: none
    of them may write to blocks of the batch's sequences (their layers have caches of their own).
    """
    assert step.plan is not None, "attention needs the plan of plan_attention"
    row_bytes = layout.head_dim * (2 if layout.dtype is KVDtype.FP16 else 1)
    is_fused = mode is Mode.DECODE and row_bytes <= MAX_FUSED_ROW_BYTES
    if is_fused and len(qkv) == len(step.batch.context_lens):
        assert (step.slots.shape, step.slots.dtype) == ((len(qkv),), np.int64), "slots must be int64 (T,)"
        assert (step.positions.shape, step.positions.dtype) == ((len(qkv),), np.int32), "positions must be int32 (T,)"
        check_table(step.rope_table, layout)
        return attention_decode(
            device, qkv, kv_cache, step.batch, step.plan, layout, channels, step.rope_table, step.positions
        )
    rope_append_kv(device, qkv, step.positions, step.slots, step.rope_table, kv_cache, layout, channels)
    attend = attention_decode if mode is Mode.DECODE else attention_prefill
    return attend(device, qkv, kv_cache, step.batch, step.plan, layout, channels)


def paged_attention(
    device: Device,
    qkv: cupy.ndarray,
    kv_cache: cupy.ndarray,
    batch: AttentionBatch,
    layout: KVLayout,
    channels: KVChannels | None,
    mode: Mode,
) -> cupy.ndarray:
    """See `Kernels.paged_attention`."""
    plan = plan_attention(device, batch, layout, len(qkv), mode)
    attend = attention_decode if mode is Mode.DECODE else attention_prefill
    return attend(device, qkv, kv_cache, batch, plan, layout, channels)
