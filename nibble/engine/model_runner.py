"""Batch -> device arrays -> forward -> sampled ids. Owns the model, the KV cache and all buffers on the device.

`launch` starts a step and `collect` reads its ids; on an asynchronous backend the device computes in between. A sampled
id goes into `latest` on the device, at the row that the step gave its sequence, and the step after that takes it from
there: it is launched before the host has read anything. No row outlives that: by the step after next the host knows the
id, so rows are numbered anew in every step.

One token per sequence is computed by a captured graph, the smallest that has a row for each; the rows left over write
the idle block, which no sequence owns. Steps that verify drafts have graphs of their own. Everything else (prompts,
tokens computed anew) is launched op by op.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from operator import attrgetter

import numpy as np

from nibble.engine.adjustments import NUM_HOST_BUFFERS, Adjustments
from nibble.engine.batch import Batch, Chunk
from nibble.engine.block_manager import num_blocks_for
from nibble.engine.logprob_records import PromptPart, keep_logprobs, keep_prompt_logprobs, prompt_parts
from nibble.engine.model import DecoderModel, ForwardBatch
from nibble.engine.pass_inputs import (
    NOTHING,
    PassInputs,
    PassShape,
    captured_shapes,
    cut,
    fill,
    fill_idle,
    shape_of,
)
from nibble.engine.sequence import Sequence
from nibble.engine.speculative import verify
from nibble.engine.swap_space import BlockMove
from nibble.kernels.interface import Array, HostCopy, Kernels, Mode
from nibble.kernels.layout import BLOCK_SIZE
from nibble.kernels.sampling import LOGPROB_WORDS


@dataclass(frozen=True)
class PendingStep:
    """A launched step whose ids nobody has read."""

    batch: Batch
    latest: HostCopy  # a row for each token that was sampled, chunk by chunk
    num_bytes: int  # that any implementation must read for it: all weights, each sequence's keys and values
    launched_s: float  # time.perf_counter()
    logprobs: HostCopy | None = None  # rows as of `latest`, if anybody wants them
    prompt_logprobs: HostCopy | None = None  # of prompt_parts, one after another
    prompt_parts: list[PromptPart] = field(default_factory=list)
    num_saturated: HostCopy | None = None  # of `DecoderModel`, after the step


@dataclass(frozen=True)
class CapturedPass:
    """The decode pass for one number of tokens. Its inputs are the front of the buffers."""

    shape: PassShape
    host: list[PassInputs]  # in each host buffer
    replay: Callable[[], None]


class ModelRunner:
    """Runs steps on one device, at most two of them at a time."""

    def __init__(
        self,
        kernels: Kernels,
        model: DecoderModel,
        *,
        num_blocks: int,
        max_sequences: int,
        max_tokens: int,
        max_verified: int = 0,
        num_swap_blocks: int = 0,
    ) -> None:
        """Steps have at most max_sequences sequences and max_tokens tokens, of which max_verified may be newest tokens
        and drafts where there are drafts. num_swap_blocks: in the host's memory."""
        self.kernels = kernels
        self.model = model
        self.num_blocks = num_blocks
        layout, config = model.kv_layout, model.config
        kv_shape = (config.num_layers, num_blocks + 1, layout.num_kv_heads, layout.head_block_bytes)
        self.kv_cache = kernels.zeros(kv_shape, np.uint8)
        self._idle_block = num_blocks
        self.num_swap_blocks = num_swap_blocks
        host_buffer = kernels.host_buffer if num_swap_blocks else np.zeros  # a backend need not have empty ones
        self._swapped = host_buffer((num_swap_blocks, config.num_layers, *kv_shape[2:]), np.uint8)
        # In one step, each block leaves once at most, and each swapped one comes back once.
        self._moves = host_buffer((NUM_HOST_BUFFERS, num_blocks + num_swap_blocks, 2), np.int32)
        self._max_blocks = num_blocks_for(config.max_context_tokens)
        self._max_sequences, max_samples = max_sequences, max_sequences + max_verified
        self._latest = kernels.zeros((max_samples,), np.int32)
        self._logprobs = kernels.zeros((max_samples, LOGPROB_WORDS), np.int32)
        self._prompt_logprobs = kernels.zeros((max_tokens, LOGPROB_WORDS), np.int32)
        self._adjustments = Adjustments(kernels, max_sequences, config.vocab_size, max_samples)
        # In one step some sequences may be in a captured pass and some in another one, all of them together are
        # max_sequences: two passes of that size are more than enough.
        max_rows = max(max_tokens, max_verified)
        shape = PassShape(max_rows, max_samples, self._max_blocks, max_samples, True, max_tokens)
        size = 2 * shape.num_bytes
        self._host = [kernels.host_buffer((size,), np.uint8) for _ in range(NUM_HOST_BUFFERS)]
        self.wait_s = 0.0  # for the device, in all steps together
        self._turn = 0  # which host buffer is the present step's
        self._inputs = kernels.zeros((size,), np.uint8)
        self._shapes = captured_shapes(max_sequences, max_verified, self._max_blocks)
        self._captured: dict[tuple[bool, bool], list[CapturedPass]] = {}  # by has_drafts and PassShape.adjusts, if any

    def capture(self) -> None:
        """Capture the decode pass for every bucket. Without it (on a synchronous backend) all passes run op by op."""
        for has_drafts, shapes in self._shapes.items():
            for adjusts in (False, True):
                passes = [self._capture_pass(replace(shape, adjusts=adjusts)) for shape in shapes]
                self._captured[has_drafts, adjusts] = passes

    def capture_largest(self) -> list[CapturedPass]:
        """One graph of each kind, for as many rows as there can be: none takes more memory."""
        largest = [shapes[-1] for shapes in self._shapes.values() if shapes]
        return [self._capture_pass(replace(shape, adjusts=adjusts)) for shape in largest for adjusts in (False, True)]

    def reset_counters(self) -> None:
        """What was computed up to now was for nobody."""
        if self.model.num_saturated is not None:
            zero = self.kernels.host_buffer((1,), np.int64)
            self.kernels.copy_to_device(zero, self.model.num_saturated)
            self.kernels.to_host(self.model.num_saturated)  # `zero` stays until it has arrived

    @property
    def num_graphs(self) -> int:
        """That `capture` makes."""
        return 2 * sum(map(len, self._shapes.values()))

    def launch(self, batch: Batch) -> PendingStep:
        """Start to compute a batch, behind those that were started before."""
        launched_s = time.perf_counter()
        self._turn = (self._turn + 1) % NUM_HOST_BUFFERS
        self._adjustments.begin(self._turn)
        passes: list[Callable[[], None]] = []
        start = num_samples = 0
        for mode, chunks in ((Mode.DECODE, batch.decode), (Mode.PREFILL, batch.prefill)):
            if chunks:
                num_bytes, compute = self._prepare(chunks, mode, start, num_samples)
                start += num_bytes
                passes.append(compute)
                num_samples += sum(chunk.num_samples for chunk in chunks)
        self._move_blocks(batch.moves)
        self._upload(start)
        self._adjustments.upload()
        for compute in passes:
            compute()
        start_to_host = self.kernels.start_to_host
        parts = prompt_parts(batch)
        num_parts_tokens = sum(part.num_tokens for part in parts)
        num_saturated = self.model.num_saturated
        step = PendingStep(
            batch,
            start_to_host(self._latest),
            self._step_bytes(batch),
            launched_s,
            start_to_host(self._logprobs) if self._adjustments.wants_logprobs else None,
            start_to_host(self._prompt_logprobs[:num_parts_tokens]) if parts else None,
            parts,
            None if num_saturated is None else start_to_host(num_saturated),
        )
        self._advance(batch)
        return step

    def collect(self, step: PendingStep) -> list[tuple[Sequence, list[int]]]:
        """Wait for a step; the new tokens of each chunk that samples, several where drafts were right, none where
        nothing could be drawn.

        Records of their log probabilities are left in the sequences.
        """
        started_s = time.perf_counter()
        latest = step.latest.wait().tolist()
        self.wait_s += time.perf_counter() - started_s
        if step.prompt_logprobs is not None:
            keep_prompt_logprobs(step.prompt_parts, step.prompt_logprobs.wait())
        logprobs = None if step.logprobs is None else step.logprobs.wait()
        sampled, row = [], 0
        for sequence, _, num_samples, _ in step.batch.chunks:
            if not num_samples:
                continue
            token_ids = verify(sequence.drafts, latest[row : row + num_samples])
            if logprobs is not None:
                keep_logprobs(sequence, logprobs[row : row + len(token_ids)])
            sampled.append((sequence, token_ids))
            row += num_samples
        return sampled

    def compute_idle(self, shape: PassShape, mode: Mode) -> None:
        """Compute a pass of this shape that touches nobody's blocks and samples for nobody."""
        fill_idle(cut(self._host[self._turn], shape), shape, NOTHING, self._idle_block)
        self._upload(shape.num_bytes)
        self._compute(cut(self._inputs, shape), mode)
        self.kernels.start_to_host(self._latest).wait()

    def _prepare(
        self, chunks: list[Chunk], mode: Mode, start: int, first_sample_row: int
    ) -> tuple[int, Callable[[], None]]:
        """Fill the host buffer from `start` on; (bytes filled, what computes the pass once they are uploaded)."""
        shape = shape_of(chunks)
        captured = self._captured_for(shape) if mode is Mode.DECODE else None
        if captured is not None:
            assert start == 0, "captured passes read the front of the inputs"
            fill(captured.host[self._turn], chunks, first_sample_row, self._adjustments)
            fill_idle(captured.host[self._turn], captured.shape, shape, self._idle_block)
            return captured.shape.num_bytes, captured.replay
        fill(cut(self._host[self._turn][start:], shape), chunks, first_sample_row, self._adjustments)
        return shape.num_bytes, partial(self._compute, cut(self._inputs[start:], shape), mode)

    def _captured_for(self, shape: PassShape) -> CapturedPass | None:
        has_drafts = shape.num_tokens > shape.num_sequences
        if has_drafts and shape.num_samples < shape.num_tokens:
            return None  # tokens computed anew
        passes = self._captured.get((has_drafts, shape.adjusts), [])
        index = bisect_left(passes, shape.num_tokens, key=lambda captured: captured.shape.num_tokens)
        return passes[index] if index < len(passes) else None

    def _compute(self, inputs: PassInputs, mode: Mode) -> None:
        """One pass: from ids and positions to sampled ids in `latest`. Device work only; may be captured."""
        kernels = self.kernels
        with kernels.temporaries():
            ids = kernels.gather_ids(inputs.ids, self._latest)
            batch = ForwardBatch(ids, inputs.positions, inputs.slots, inputs.attention, mode)
            hidden = self.model.forward(batch, self.kv_cache)
            self._compute_prompt_logprobs(hidden, inputs)
            if len(inputs.last_rows) == 0:
                return
            logits = self.model.logits(hidden, inputs.last_rows)
            if len(inputs.adjustment_slots):
                self._sample_adjusted(logits, ids, inputs)
            else:
                kernels.scatter_ids(kernels.sample(logits, inputs.sampling), inputs.sample_rows, self._latest)

    def _sample_adjusted(self, logits: Array, ids: Array, inputs: PassInputs) -> None:
        """Log probabilities are those of the model, so its logits are kept for the rows that want some."""
        kernels, adjustments = self.kernels, self._adjustments
        raw = kernels.copy_rows(logits, inputs.num_logprobs)
        kernels.adjust_logits(logits, adjustments.slots, inputs.adjustment(ids))
        kernels.mask_logits(logits, adjustments.masks, inputs.mask_rows)
        sampled = kernels.sample(logits, inputs.sampling)
        kernels.scatter_ids(sampled, inputs.sample_rows, self._latest)
        kernels.logprobs(raw, sampled, inputs.num_logprobs, self._logprobs, inputs.sample_rows)

    def _compute_prompt_logprobs(self, hidden: Array, inputs: PassInputs) -> None:
        """So many tokens at once as prompts can sample: logits take more memory than all else."""
        for start in range(0, len(inputs.prompt_rows), self._max_sequences):
            rows = slice(start, start + self._max_sequences)
            with self.kernels.temporaries():
                self.kernels.logprobs(
                    self.model.logits(hidden, inputs.prompt_rows[rows]),
                    inputs.prompt_targets[rows],
                    inputs.prompt_num_logprobs[rows],
                    self._prompt_logprobs,
                    inputs.prompt_out_rows[rows],
                )

    def _capture_pass(self, shape: PassShape) -> CapturedPass:
        host = [cut(buffer, shape) for buffer in self._host]
        fill_idle(host[self._turn], shape, NOTHING, self._idle_block)
        self._upload(shape.num_bytes)
        replay = self.kernels.capture(partial(self._compute, cut(self._inputs, shape), Mode.DECODE))
        self.kernels.start_to_host(self._latest).wait()  # the host buffer is free again
        return CapturedPass(shape, host, replay)

    def _move_blocks(self, moves: list[BlockMove]) -> None:
        """Behind the steps launched before, which still use the blocks that leave."""
        start, pairs = 0, self._moves[self._turn]
        for to_host, run in groupby(moves, key=attrgetter("to_host")):
            ids = [(move.block_id, move.host_block) for move in run]
            stop = start + len(ids)
            pairs[start:stop] = ids
            self.kernels.copy_blocks(self.kv_cache, self._swapped, pairs[start:stop], to_host=to_host)
            start = stop

    def _upload(self, num_bytes: int) -> None:
        # Later than all kernels of the step before, which read the same device buffer: one stream does both.
        self.kernels.copy_to_device(self._host[self._turn][:num_bytes], self._inputs[:num_bytes])

    def _advance(self, batch: Batch) -> None:
        row = 0
        for chunk in batch.chunks:
            num_drafts = chunk.num_drafts
            chunk.sequence.launched(chunk.num_tokens - num_drafts, row if chunk.num_samples else None, num_drafts)
            row += chunk.num_samples

    def _step_bytes(self, batch: Batch) -> int:
        config, layout = self.model.config, self.model.kv_layout
        kv_token_bytes = config.num_layers * layout.block_bytes // BLOCK_SIZE
        context_tokens = sum(chunk.sequence.num_computed_tokens for chunk in batch.chunks)
        return self.model.weight_bytes + context_tokens * kv_token_bytes
