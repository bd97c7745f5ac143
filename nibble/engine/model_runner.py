"""Batch -> device arrays -> forward -> sampled ids. Owns the model and the KV cache on the device."""

from __future__ import annotations

from itertools import accumulate

import numpy as np

from nibble.engine.batch import Batch, Chunk
from nibble.engine.model import DecoderModel, ForwardBatch
from nibble.engine.sampler import sample
from nibble.engine.sequence import Sequence
from nibble.kernels.interface import AttentionBatch, Kernels, Mode
from nibble.kernels.layout import BLOCK_SIZE


class ModelRunner:
    """Runs one step's batch on one device."""

    def __init__(self, kernels: Kernels, model: DecoderModel, num_blocks: int) -> None:
        self.kernels = kernels
        self.model = model
        layout = model.kv_layout
        self.kv_cache = kernels.zeros(
            (model.config.num_layers, num_blocks, layout.num_kv_heads, layout.head_block_bytes), np.uint8
        )

    def run(self, batch: Batch) -> list[tuple[Sequence, int]]:
        """Compute the batch; returns the new token of each chunk that samples, -1 where its logits are not finite."""
        sampled: list[tuple[Sequence, int]] = []
        for mode, chunks in ((Mode.DECODE, batch.decode), (Mode.PREFILL, batch.prefill)):
            if not chunks:
                continue
            logits = self.model.forward(self._forward_batch(chunks, mode), self.kv_cache)
            sequences = [chunk.sequence for chunk in chunks if chunk.samples]
            if sequences:
                sampled += zip(sequences, sample(self.kernels, logits, sequences), strict=True)
        for chunk in batch.chunks:
            chunk.sequence.num_computed_tokens += chunk.num_tokens
        return sampled

    def step_bytes(self, batch: Batch) -> int:
        """Bytes that any implementation must read for this batch: all weights once, each sequence's keys and values."""
        config, layout = self.model.config, self.model.kv_layout
        kv_token_bytes = config.num_layers * layout.block_bytes // BLOCK_SIZE
        context_tokens = sum(chunk.sequence.num_computed_tokens for chunk in batch.chunks)
        return self.model.weight_bytes + context_tokens * kv_token_bytes

    def _forward_batch(self, chunks: list[Chunk], mode: Mode) -> ForwardBatch:
        to_device = self.kernels.to_device
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        for chunk in chunks:
            sequence, start = chunk.sequence, chunk.sequence.num_computed_tokens
            span = range(start, start + chunk.num_tokens)
            table = sequence.block_table
            ids += sequence.token_ids[span.start : span.stop]
            positions += span
            slots += [table[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in span]
        ends = list(accumulate(chunk.num_tokens for chunk in chunks))
        last_rows = [end - 1 for end, chunk in zip(ends, chunks, strict=True) if chunk.samples]
        return ForwardBatch(
            ids=to_device(np.array(ids, np.int32)),
            positions=to_device(np.array(positions, np.int32)),
            slots=to_device(np.array(slots, np.int64)),
            last_rows=to_device(np.array(last_rows, np.int32)),
            attention=self._attention_batch(chunks, ends),
            mode=mode,
        )

    def _attention_batch(self, chunks: list[Chunk], ends: list[int]) -> AttentionBatch:
        to_device = self.kernels.to_device
        tables = [chunk.sequence.block_table for chunk in chunks]
        block_tables = np.zeros((len(tables), max(map(len, tables))), np.int32)
        for row, table in zip(block_tables, tables, strict=True):
            row[: len(table)] = table
        context_lens = [chunk.sequence.num_computed_tokens + chunk.num_tokens for chunk in chunks]
        return AttentionBatch(
            query_starts=to_device(np.array([0, *ends], np.int32)),
            context_lens=to_device(np.array(context_lens, np.int32)),
            block_tables=to_device(block_tables),
        )
