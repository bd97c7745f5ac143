"""The arrays that drive one forward pass, as views of one run of bytes, so that one copy brings them to the device.

The host fills the views of a page-locked buffer; the same cut of a device buffer gives the arrays that the kernels
read. Neither is allocated while tokens are generated, and a captured pass finds its arrays where they always were.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeAlias

import numpy as np

from nibble.engine.adjustments import Adjustments
from nibble.engine.batch import Chunk
from nibble.engine.pass_shapes import PassShape, aligned
from nibble.engine.sequence import Sequence
from nibble.kernels.interface import Array, AttentionBatch
from nibble.kernels.layout import BLOCK_SIZE
from nibble.kernels.sampling import AdjustmentBatch, SamplingBatch

Sample: TypeAlias = tuple[Sequence, int]  # the index counts the tokens that a step samples of one sequence


@dataclass(frozen=True)
class PassInputs:
    """Host or device arrays; see `PassShape` for the letters."""

    ids: Array  # int32 (T,), below 0: -1 - row of the step before that sampled the token
    positions: Array  # int32 (T,)
    slots: Array  # int64 (T,), where each token's key and value go: block_id * 64 + offset; below 0: nowhere
    query_starts: Array  # int32 (S + 1,)
    context_lens: Array  # int32 (S,)
    block_tables: Array  # int32 (S, B)
    last_rows: Array  # int32 (N,), the tokens whose logits are sampled
    sample_rows: Array  # int32 (N,), where the step leaves the sampled ids; below 0: nowhere
    temperature: Array  # float32 (N,), and so on as in SamplingBatch
    top_k: Array  # int32 (N,)
    top_p: Array  # float32 (N,)
    min_p: Array  # float32 (N,)
    seeds: Array  # uint64 (N,)
    draw_positions: Array  # int64 (N,)
    adjustment_slots: Array  # int32 (A,), of `Adjustments.slots`; below 0: none
    mask_rows: Array  # int32 (A,), of `Adjustments.masks`; below 0: none
    num_logprobs: Array  # int32 (A,), most probable tokens to be named; below 0: no log probabilities
    prompt_rows: Array  # int32 (P,), the tokens whose logits are those of a token of the prompt
    prompt_targets: Array  # int32 (P,), that token
    prompt_num_logprobs: Array  # int32 (P,)
    prompt_out_rows: Array  # int32 (P,), counted from the first one of the pass

    @property
    def attention(self) -> AttentionBatch:
        return AttentionBatch(self.query_starts, self.context_lens, self.block_tables)

    def adjustment(self, ids: Array) -> AdjustmentBatch:
        """`ids` are those that the device knows all of."""
        return AdjustmentBatch(self.adjustment_slots, ids, self.last_rows, self.draw_positions)

    @property
    def sampling(self) -> SamplingBatch:
        return SamplingBatch(self.temperature, self.top_k, self.top_p, self.min_p, self.seeds, self.draw_positions)


def cut(buffer: Array, shape: PassShape) -> PassInputs:
    """Views of the first shape.num_bytes bytes of a uint8 buffer, on the host or on the device."""
    views: dict[str, Array] = {}
    start = 0
    for name, dimensions, dtype in shape.fields():
        num_bytes = math.prod(dimensions) * dtype.itemsize
        views[name] = buffer[start : start + num_bytes].view(dtype).reshape(dimensions)
        start += aligned(num_bytes)
    return PassInputs(**views)


def shape_of(chunks: list[Chunk]) -> PassShape:
    """The shape that just holds the chunks."""
    special = [chunk for chunk in chunks if not chunk.sequence.is_plain]  # none of hundreds, mostly
    return PassShape(
        num_tokens=sum(chunk.num_tokens for chunk in chunks),
        num_sequences=len(chunks),
        num_blocks=max(len(chunk.sequence.block_table) for chunk in chunks),
        num_samples=sum(chunk.num_samples for chunk in chunks),
        adjusts=any(chunk.num_samples and not chunk.sequence.samples_plainly for chunk in special),
        num_prompt_logprobs=sum(len(prompt_targets(chunk)) for chunk in special if chunk.sequence.prompt_logprobs),
    )


def prompt_targets(chunk: Chunk) -> list[int]:
    """The tokens of the prompt that the logits of the chunk's tokens are for, the first chunk token's first."""
    first = chunk.sequence.num_computed_tokens + 1
    return chunk.sequence.request.prompt_token_ids[first : first + chunk.num_tokens]


def fill(inputs: PassInputs, chunks: list[Chunk], first_sample_row: int, adjustments: Adjustments) -> None:
    """Write the chunks to the front of the host arrays. Samples get rows from first_sample_row on, in order."""
    sequences, rows = [chunk.sequence for chunk in chunks], slice(0, len(chunks))
    stops = list(accumulate(chunk.num_tokens for chunk in chunks))
    inputs.query_starts[0], inputs.query_starts[1 : len(chunks) + 1] = 0, stops
    inputs.context_lens[rows] = [chunk.sequence.num_computed_tokens + chunk.num_tokens for chunk in chunks]
    for row, sequence in zip(inputs.block_tables, sequences, strict=False):
        row[: len(sequence.block_table)] = sequence.block_table
    if stops[-1] == len(chunks):
        _fill_single_tokens(inputs, sequences)
    else:
        for chunk, stop in zip(chunks, stops, strict=True):
            _fill_tokens(inputs, chunk, slice(stop - chunk.num_tokens, stop))
    last_rows = [
        row for chunk, stop in zip(chunks, stops, strict=True) for row in range(stop - chunk.num_samples, stop)
    ]
    inputs.last_rows[: len(last_rows)] = last_rows
    inputs.sample_rows[: len(last_rows)] = range(first_sample_row, first_sample_row + len(last_rows))
    samples = [(chunk.sequence, index) for chunk in chunks for index in range(chunk.num_samples)]
    _fill_sampling(inputs, samples)
    if len(inputs.adjustment_slots):
        _fill_adjustments(inputs, samples, adjustments)
    if len(inputs.prompt_rows):
        _fill_prompt_logprobs(inputs, chunks, stops)


def fill_idle(inputs: PassInputs, shape: PassShape, used: PassShape, idle_block: int) -> None:
    """Make the tokens, sequences and samples behind those in use compute something that nobody reads.

    They attend to the block idle_block, and write nothing else, draw greedily, and their ids go nowhere. Sequences left
    over share the tokens left over; some may have none.
    """
    rows = slice(used.num_tokens, None)
    inputs.ids[rows], inputs.positions[rows], inputs.slots[rows] = 0, 0, -1
    rows = slice(used.num_sequences, None)
    num_tokens, num_sequences = shape.num_tokens - used.num_tokens, shape.num_sequences - used.num_sequences
    assert num_sequences > 0 or num_tokens == 0, "tokens left over need a sequence"
    starts = np.arange(num_sequences + 1) * num_tokens // max(num_sequences, 1)
    inputs.query_starts[rows] = used.num_tokens + starts
    inputs.context_lens[rows] = np.diff(starts)
    inputs.block_tables[rows] = idle_block
    rows = slice(used.num_samples, None)
    inputs.last_rows[rows] = shape.num_tokens - 1
    inputs.sample_rows[rows], inputs.seeds[rows], inputs.draw_positions[rows] = -1, 0, 0
    inputs.temperature[rows], inputs.top_k[rows], inputs.top_p[rows], inputs.min_p[rows] = 0, 0, 1, 0
    for array in (inputs.adjustment_slots, inputs.mask_rows, inputs.num_logprobs):
        array[rows] = -1


def _fill_single_tokens(inputs: PassInputs, sequences: list[Sequence]) -> None:
    """Ids, positions and slots of one token of each sequence: hundreds of them, in every step."""
    positions = [sequence.num_computed_tokens for sequence in sequences]
    rows = slice(0, len(sequences))
    inputs.positions[rows] = positions
    inputs.slots[rows] = [
        sequence.block_table[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
        for sequence, position in zip(sequences, positions, strict=True)
    ]
    inputs.ids[rows] = [
        sequence.token_ids[position] if position < len(sequence.token_ids) else _newest_id(sequence)
        for sequence, position in zip(sequences, positions, strict=True)
    ]


def _fill_tokens(inputs: PassInputs, chunk: Chunk, rows: slice) -> None:
    """Ids, positions and slots of a chunk's tokens, drafts included."""
    sequence, first = chunk.sequence, chunk.sequence.num_computed_tokens
    stop, table = first + chunk.num_tokens, np.array(chunk.sequence.block_table)
    positions = np.arange(first, stop)
    token_ids = sequence.token_ids[first:stop] + sequence.drafts[: chunk.num_drafts]
    if len(token_ids) < chunk.num_tokens:
        token_ids.append(_newest_id(sequence))
    inputs.ids[rows] = token_ids
    inputs.positions[rows] = positions
    inputs.slots[rows] = table[positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE


def _newest_id(sequence: Sequence) -> int:
    """How `Kernels.gather_ids` is told of a token that the device alone knows."""
    assert sequence.num_unread_tokens == 1, "only the newest token can be unread when a step is launched"
    return -1 - sequence.sample_row


def _fill_sampling(inputs: PassInputs, samples: list[Sample]) -> None:
    """The random number is a function of (seed, index of the token in its request) alone."""
    params, rows = [sequence.request.sampling for sequence, _ in samples], slice(0, len(samples))
    inputs.temperature[rows] = [p.temperature for p in params]
    inputs.top_k[rows] = [p.top_k for p in params]
    inputs.top_p[rows] = [p.top_p for p in params]
    inputs.min_p[rows] = [p.min_p for p in params]
    inputs.seeds[rows] = [p.seed for p in params]
    inputs.draw_positions[rows] = [sequence.num_generated_tokens + index for sequence, index in samples]


def _fill_adjustments(inputs: PassInputs, samples: list[Sample], adjustments: Adjustments) -> None:
    wishes = [sequence.request.sampling.logprobs for sequence, _ in samples]
    adjustments.wants_logprobs |= any(wish is not None for wish in wishes)
    rows = slice(0, len(samples))
    inputs.num_logprobs[rows] = [-1 if wish is None else wish for wish in wishes]
    inputs.adjustment_slots[rows] = [adjustments.slot_of(sequence) for sequence, _ in samples]
    inputs.mask_rows[rows] = [adjustments.mask_row_of(*sample) for sample in samples]


def _fill_prompt_logprobs(inputs: PassInputs, chunks: list[Chunk], stops: list[int]) -> None:
    start = 0
    for chunk, stop in zip(chunks, stops, strict=True):
        if not chunk.sequence.prompt_logprobs:
            continue
        targets, first_row = prompt_targets(chunk), stop - chunk.num_tokens
        rows = slice(start, start + len(targets))
        inputs.prompt_rows[rows] = range(first_row, first_row + len(targets))
        inputs.prompt_targets[rows] = targets
        inputs.prompt_num_logprobs[rows] = chunk.sequence.request.sampling.prompt_logprobs
        inputs.prompt_out_rows[rows] = range(start, start + len(targets))
        start += len(targets)
