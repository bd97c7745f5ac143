"""Batch -> device arrays -> forward -> sampled ids. Owns the model, the KV cache and all buffers on the device.

`launch` starts a step and `collect` reads its ids; on an asynchronous backend the device computes in between. A sampled
id goes into `latest` on the device, at the row that the step gave its sequence, and the step after that takes it from
there: it is launched before the host has read anything. No row outlives that: by the step after next the host knows the
id, so rows are numbered anew in every step.

Passes of few tokens are captured graphs, the smallest that has a row for each token; the rows left over use the idle
block alone, which no sequence owns. There are graphs for each `PassKind`. Long chunks of prompts are
launched op by op, which takes no longer than the device computes them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median

import numpy as np

from nibble.engine.adjustments import NUM_HOST_BUFFERS, Adjustments
from nibble.engine.batch import Batch, Chunk
from nibble.engine.block_manager import num_blocks_for
from nibble.engine.logprob_records import PromptPart, keep_logprobs, keep_prompt_logprobs, prompt_parts
from nibble.engine.model import DecoderModel, ForwardBatch
from nibble.engine.pass_inputs import PassInputs, cut, fill, fill_idle, shape_of
from nibble.engine.pass_shapes import NOTHING, PassKind, PassShape, captured_shapes, holds, kind_of, max_input_bytes
from nibble.engine.sequence import Sequence
from nibble.engine.speculative import verify
from nibble.engine.swap_buffers import SwapBuffers
from nibble.kernels.interface import Array, HostCopy, Kernels, Mode
from nibble.kernels.layout import BLOCK_SIZE
from nibble.kernels.sampling import LOGPROB_WORDS

# With `PassShape.adjusts`, of what there are graphs for.
_KINDS = [(kind, adjusts) for kind in PassKind for adjusts in (False, True) if kind.samples or not adjusts]

_NUM_MEASURED_STEPS = 5


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
    """The pass of a kind for one number of tokens. Its inputs are the front of its mode's part of the buffers."""

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
        self.swap_buffers = SwapBuffers(kernels, self.kv_cache, num_swap_blocks)
        self._max_blocks = num_blocks_for(config.max_context_tokens)
        self._max_sequences, max_samples = max_sequences, max_sequences + max_verified
        self._latest = kernels.zeros((max_samples,), np.int32)
        self._logprobs = kernels.zeros((max_samples, LOGPROB_WORDS), np.int32)
        self._prompt_logprobs = kernels.zeros((max_tokens, LOGPROB_WORDS), np.int32)
        self._adjustments = Adjustments(kernels, max_sequences, config.vocab_size, max_samples)
        self._shapes = captured_shapes(max_sequences, max_tokens, max_verified, self._max_blocks)
        self._captured: dict[tuple[PassKind, bool], list[CapturedPass]] = {}  # by kind and PassShape.adjusts, if any
        size = max_input_bytes(max_sequences, max_tokens, max_verified, self._max_blocks)
        self._parts = {Mode.DECODE: slice(0, size), Mode.PREFILL: slice(size, 2 * size)}  # of the buffers
        self._host = [kernels.host_buffer((2 * size,), np.uint8) for _ in range(NUM_HOST_BUFFERS)]
        self.wait_s = 0.0  # for the device, in all steps together
        self._turn = 0  # which host buffer is the present step's
        self._inputs = kernels.zeros((2 * size,), np.uint8)

    def capture(self) -> None:
        """Capture the pass for every bucket. Without it (on a synchronous backend) all passes run op by op."""
        for kind, adjusts in _KINDS:
            shapes = [replace(shape, adjusts=adjusts) for shape in self._shapes[kind]]
            self._captured[kind, adjusts] = [self._capture_pass(kind, shape) for shape in shapes]

    def capture_largest(self) -> list[CapturedPass]:
        """One graph of each kind, for as many rows as there can be: none takes more memory."""
        return [
            self._capture_pass(kind, replace(self._shapes[kind][-1], adjusts=adjusts))
            for kind, adjusts in _KINDS
            if self._shapes[kind]
        ]

    def measure_step(self) -> float:
        """Seconds that the device takes for the smallest captured pass: the median of a few."""
        (captured, *_), seconds = self._captured[PassKind.SINGLE_TOKENS, False], []
        fill_idle(captured.host[self._turn], captured.shape, NOTHING, self._idle_block)
        self._upload(self._parts[Mode.DECODE], captured.shape)
        for _ in range(_NUM_MEASURED_STEPS):
            started_s = time.perf_counter()
            captured.replay()
            self.kernels.start_to_host(self._latest).wait()
            seconds.append(time.perf_counter() - started_s)
        return median(seconds)

    def reset_counters(self) -> None:
        """What was computed up to now was for nobody."""
        if self.model.num_saturated is not None:
            zero = self.kernels.host_buffer((1,), np.int64)
            self.kernels.copy_to_device(zero, self.model.num_saturated)
            self.kernels.to_host(self.model.num_saturated)  # `zero` stays until it has arrived

    @property
    def num_graphs(self) -> int:
        """That `capture` makes."""
        return sum(len(self._shapes[kind]) for kind, _ in _KINDS)

    def launch(self, batch: Batch) -> PendingStep:
        """Start to compute a batch, behind those that were started before."""
        launched_s = time.perf_counter()
        self._turn = (self._turn + 1) % NUM_HOST_BUFFERS
        self._adjustments.begin(self._turn)
        passes: list[Callable[[], None]] = []
        num_samples = 0
        for mode, chunks in ((Mode.DECODE, batch.decode), (Mode.PREFILL, batch.prefill)):
            if chunks:
                passes.append(self._prepare(chunks, mode, num_samples))
                num_samples += sum(chunk.num_samples for chunk in chunks)
        self.swap_buffers.move(batch.moves, self._turn)
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
        part = self._parts[mode]
        fill_idle(cut(self._host[self._turn][part], shape), shape, NOTHING, self._idle_block)
        self._upload(part, shape)
        self._compute(cut(self._inputs[part], shape), mode)
        self.kernels.start_to_host(self._latest).wait()

    def _prepare(self, chunks: list[Chunk], mode: Mode, first_sample_row: int) -> Callable[[], None]:
        """Fill the mode's part of the host buffer; -> what computes the pass."""
        shape, part = shape_of(chunks), self._parts[mode]
        captured = self._captured_for(shape, mode)
        if captured is not None:
            fill(captured.host[self._turn], chunks, first_sample_row, self._adjustments)
            fill_idle(captured.host[self._turn], captured.shape, shape, self._idle_block)
            self._upload(part, captured.shape)
            return captured.replay
        fill(cut(self._host[self._turn][part], shape), chunks, first_sample_row, self._adjustments)
        self._upload(part, shape)
        return partial(self._compute, cut(self._inputs[part], shape), mode)

    def _captured_for(self, shape: PassShape, mode: Mode) -> CapturedPass | None:
        """The smallest that holds a pass of this shape."""
        passes = self._captured.get((kind_of(shape, mode), shape.adjusts), [])
        return next((captured for captured in passes if holds(captured.shape, shape)), None)

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

    def _capture_pass(self, kind: PassKind, shape: PassShape) -> CapturedPass:
        mode = Mode.PREFILL if kind is PassKind.PROMPTS else Mode.DECODE
        part = self._parts[mode]
        host = [cut(buffer[part], shape) for buffer in self._host]
        fill_idle(host[self._turn], shape, NOTHING, self._idle_block)
        self._upload(part, shape)
        replay = self.kernels.capture(partial(self._compute, cut(self._inputs[part], shape), mode))
        self.kernels.start_to_host(self._latest).wait()  # the host buffer is free again
        return CapturedPass(shape, host, replay)

    def _upload(self, part: slice, shape: PassShape) -> None:
        # Later than all kernels of the step before, which read the same device buffer: one stream does both.
        used = slice(part.start, part.start + shape.num_bytes)
        self.kernels.copy_to_device(self._host[self._turn][used], self._inputs[used])

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
