"""Batch -> device arrays -> forward -> sampled ids. Owns the model, the KV cache and all buffers on the device.

`launch` starts a step and `collect` reads its ids; on an asynchronous backend the device computes in between. A sampled
id goes into `latest` on the device, at the row that the step gave its sequence, and the step after that takes it from
there: it is launched before the host has read anything. No row outlives that: by the step after next the host knows the
id, so rows are numbered anew in every step.

One token per sequence is computed by a captured graph, the smallest that has a row for each; the rows left over write
the idle block, which no sequence owns. Everything else (prompts, tokens computed anew) is launched op by op.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from nibble.engine.batch import Batch, Chunk
from nibble.engine.block_manager import num_blocks_for
from nibble.engine.model import DecoderModel, ForwardBatch
from nibble.engine.pass_inputs import MAX_STOP_TOKEN_IDS, PassInputs, PassShape, cut, fill, fill_idle, shape_of
from nibble.engine.sequence import Sequence
from nibble.kernels.interface import HostCopy, Kernels, Mode
from nibble.kernels.layout import BLOCK_SIZE

NUM_HOST_BUFFERS = 2  # one is filled while the copy of the other may still be under way
BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)  # rows that steps are captured for


@dataclass(frozen=True)
class PendingStep:
    """A launched step whose ids nobody has read."""

    batch: Batch
    sequences: list[Sequence]  # that sampled, in the order of their rows
    latest: HostCopy
    num_bytes: int  # that any implementation must read for it: all weights, each sequence's keys and values
    launched_s: float  # time.perf_counter()


@dataclass(frozen=True)
class CapturedPass:
    """The decode pass for one number of rows. Its inputs are the front of the buffers."""

    shape: PassShape
    host: list[PassInputs]  # in each host buffer
    replay: Callable[[], None]


class ModelRunner:
    """Runs steps on one device, at most two of them at a time."""

    def __init__(
        self, kernels: Kernels, model: DecoderModel, *, num_blocks: int, max_sequences: int, max_tokens: int
    ) -> None:
        """Steps have at most max_sequences sequences and max_tokens tokens."""
        self.kernels = kernels
        self.model = model
        self.num_blocks = num_blocks
        layout, config = model.kv_layout, model.config
        kv_shape = (config.num_layers, num_blocks + 1, layout.num_kv_heads, layout.head_block_bytes)
        self.kv_cache = kernels.zeros(kv_shape, np.uint8)
        self._idle_block = num_blocks
        self._max_blocks = num_blocks_for(config.max_context_tokens)
        self._latest = kernels.zeros((max_sequences,), np.int32)
        # In one step some sequences may be in a captured pass and some in another one, all of them together are
        # max_sequences: two passes of that size are more than enough.
        size = (
            2
            * PassShape(
                max_tokens, max_sequences, self._max_blocks, max_sequences, max_sequences * MAX_STOP_TOKEN_IDS
            ).num_bytes
        )
        self._host = [kernels.host_buffer((size,), np.uint8) for _ in range(NUM_HOST_BUFFERS)]
        self._turn = 0  # which host buffer is the present step's
        self._inputs = kernels.zeros((size,), np.uint8)
        self._buckets = [b for b in BUCKETS if b < max_sequences] + [max_sequences]
        self._captured: list[CapturedPass] = []  # one per bucket, if there are any

    def capture(self) -> None:
        """Capture the decode pass for every bucket. Without it (on a synchronous backend) all passes run op by op."""
        for num_rows in self._buckets:
            shape = PassShape(num_rows, num_rows, self._max_blocks, num_rows)
            host = [cut(buffer, shape) for buffer in self._host]
            fill_idle(host[self._turn], shape, 0, self._idle_block)
            self._upload(shape.num_bytes)
            replay = self.kernels.capture(partial(self._compute, cut(self._inputs, shape), Mode.DECODE))
            self.kernels.start_to_host(self._latest).wait()  # the host buffer is free again
            self._captured.append(CapturedPass(shape, host, replay))

    def launch(self, batch: Batch) -> PendingStep:
        """Start to compute a batch, behind those that were started before."""
        launched_s = time.perf_counter()
        self._turn = (self._turn + 1) % NUM_HOST_BUFFERS
        passes: list[Callable[[], None]] = []
        sequences: list[Sequence] = []
        start = 0
        for mode, chunks in ((Mode.DECODE, batch.decode), (Mode.PREFILL, batch.prefill)):
            if chunks:
                num_bytes, compute = self._prepare(chunks, mode, start, len(sequences))
                start += num_bytes
                passes.append(compute)
                sequences += [chunk.sequence for chunk in chunks if chunk.samples]
        self._upload(start)
        for compute in passes:
            compute()
        latest = self.kernels.start_to_host(self._latest)
        self._advance(batch)
        return PendingStep(batch, sequences, latest, self._step_bytes(batch), launched_s)

    def collect(self, step: PendingStep) -> list[tuple[Sequence, int]]:
        """Wait for a step; the new token of each chunk that samples, -1 where its logits are not finite."""
        return list(zip(step.sequences, step.latest.wait()[: len(step.sequences)].tolist(), strict=True))

    def compute_idle(self, shape: PassShape, mode: Mode) -> None:
        """Compute a pass of this shape that touches nobody's blocks and samples for nobody."""
        fill_idle(cut(self._host[self._turn], shape), shape, 0, self._idle_block)
        self._upload(shape.num_bytes)
        self._compute(cut(self._inputs, shape), mode)
        self.kernels.start_to_host(self._latest).wait()

    def _prepare(
        self, chunks: list[Chunk], mode: Mode, start: int, first_sample_row: int
    ) -> tuple[int, Callable[[], None]]:
        """Fill the host buffer from `start` on; (bytes filled, what computes the pass once they are uploaded)."""
        shape = shape_of(chunks)
        if mode is Mode.DECODE and self._captured and shape.num_tokens == len(chunks) and not shape.num_bans:
            assert start == 0, "captured passes read the front of the inputs"
            captured = self._captured[bisect_left(self._buckets, len(chunks))]
            fill(captured.host[self._turn], chunks, first_sample_row)
            if len(chunks) < captured.shape.num_sequences:
                fill_idle(captured.host[self._turn], captured.shape, len(chunks), self._idle_block)
            return captured.shape.num_bytes, captured.replay
        fill(cut(self._host[self._turn][start:], shape), chunks, first_sample_row)
        return shape.num_bytes, partial(self._compute, cut(self._inputs[start:], shape), mode)

    def _compute(self, inputs: PassInputs, mode: Mode) -> None:
        """One pass: from ids and positions to sampled ids in `latest`. Device work only; may be captured."""
        kernels = self.kernels
        with kernels.temporaries():
            ids = kernels.gather_ids(inputs.ids, self._latest)
            batch = ForwardBatch(ids, inputs.positions, inputs.slots, inputs.attention, mode)
            hidden = self.model.forward(batch, self.kv_cache)
            if len(inputs.last_rows) == 0:
                return
            logits = self.model.logits(hidden, inputs.last_rows)
            if len(inputs.ban_rows):
                kernels.add_to_logits(logits, inputs.ban_rows, inputs.ban_ids, inputs.ban_values)
            kernels.scatter_ids(kernels.sample(logits, inputs.sampling), inputs.sample_rows, self._latest)

    def _upload(self, num_bytes: int) -> None:
        # Later than all kernels of the step before, which read the same device buffer: one stream does both.
        self.kernels.copy_to_device(self._host[self._turn][:num_bytes], self._inputs[:num_bytes])

    def _advance(self, batch: Batch) -> None:
        row = 0
        for chunk in batch.chunks:
            chunk.sequence.launched(chunk.num_tokens, row if chunk.samples else None)
            row += chunk.samples

    def _step_bytes(self, batch: Batch) -> int:
        config, layout = self.model.config, self.model.kv_layout
        kv_token_bytes = config.num_layers * layout.block_bytes // BLOCK_SIZE
        context_tokens = sum(chunk.sequence.num_computed_tokens for chunk in batch.chunks)
        return self.model.weight_bytes + context_tokens * kv_token_bytes
