"""The arrays that drive one forward pass, as views of one run of bytes, so that one copy brings them to the device.

The host fills the views of a page-locked buffer; the same cut of a device buffer gives the arrays that the kernels
read. Neither is allocated while tokens are generated, and a captured pass finds its arrays where they always were.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from nibble.engine.batch import Chunk
from nibble.engine.sequence import Sequence
from nibble.kernels.interface import Array, AttentionBatch, SamplingBatch
from nibble.kernels.layout import BLOCK_SIZE

ALIGNMENT = 64  # bytes; more than any vector access needs
MAX_STOP_TOKEN_IDS = 256  # per request; bounds the room for `bans`


@dataclass(frozen=True)
class PassShape:
    """T tokens of S sequences, whose block tables have B columns; N of the sequences sample; n bans."""

    num_tokens: int
    num_sequences: int
    num_blocks: int
    num_samples: int
    num_bans: int = 0

    @property
    def num_bytes(self) -> int:
        """Of the buffer that the pass is cut out of."""
        return sum(_aligned(math.prod(shape) * dtype.itemsize) for _, shape, dtype in _fields(self))


@dataclass(frozen=True)
class PassInputs:
    """Host or device arrays; see `PassShape` for the letters."""

    ids: Array  # int32 (T,), below 0: -1 - row of the step before that sampled the token
    positions: Array  # int32 (T,)
    slots: Array  # int64 (T,), where each token's key and value go: block_id * 64 + offset
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
    ban_rows: Array  # int32 (n,), rows of the logits
    ban_ids: Array  # int32 (n,), tokens that must not be drawn there
    ban_values: Array  # float32 (n,), all -inf

    @property
    def attention(self) -> AttentionBatch:
        return AttentionBatch(self.query_starts, self.context_lens, self.block_tables)

    @property
    def sampling(self) -> SamplingBatch:
        return SamplingBatch(self.temperature, self.top_k, self.top_p, self.min_p, self.seeds, self.draw_positions)


def cut(buffer: Array, shape: PassShape) -> PassInputs:
    """Views of the first shape.num_bytes bytes of a uint8 buffer, on the host or on the device."""
    views: dict[str, Array] = {}
    start = 0
    for name, dimensions, dtype in _fields(shape):
        num_bytes = math.prod(dimensions) * dtype.itemsize
        views[name] = buffer[start : start + num_bytes].view(dtype).reshape(dimensions)
        start += _aligned(num_bytes)
    return PassInputs(**views)


def shape_of(chunks: list[Chunk]) -> PassShape:
    """The shape that just holds the chunks."""
    sampling = [chunk.sequence for chunk in chunks if chunk.samples]
    return PassShape(
        num_tokens=sum(chunk.num_tokens for chunk in chunks),
        num_sequences=len(chunks),
        num_blocks=max(len(chunk.sequence.block_table) for chunk in chunks),
        num_samples=len(sampling),
        num_bans=sum(len(banned_ids(sequence)) for sequence in sampling if sequence.request.sampling.min_tokens),
    )


def banned_ids(sequence: Sequence) -> tuple[int, ...]:
    """What must not be drawn next: stop tokens, until min_tokens were generated."""
    sampling = sequence.request.sampling
    return sampling.stop_token_ids if sequence.num_generated_tokens < sampling.min_tokens else ()


def fill(inputs: PassInputs, chunks: list[Chunk], first_sample_row: int) -> None:
    """Write the chunks to the front of the host arrays. What samples gets rows from first_sample_row on, in order."""
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
    last_rows = [stop - 1 for chunk, stop in zip(chunks, stops, strict=True) if chunk.samples]
    inputs.last_rows[: len(last_rows)] = last_rows
    inputs.sample_rows[: len(last_rows)] = range(first_sample_row, first_sample_row + len(last_rows))
    _fill_sampling(inputs, [chunk.sequence for chunk in chunks if chunk.samples])


def fill_idle(inputs: PassInputs, shape: PassShape, first_row: int, idle_block: int) -> None:
    """Make the rows from first_row on (tokens, sequences and samples alike) compute something that nobody reads.

    They write the block idle_block, attend to its first slot alone, draw greedily, and their ids go nowhere.
    """
    rows = slice(first_row, None)
    inputs.ids[rows], inputs.positions[rows], inputs.slots[rows] = 0, 0, idle_block * BLOCK_SIZE
    starts = np.arange(shape.num_sequences + 1) * shape.num_tokens // shape.num_sequences
    inputs.query_starts[first_row:] = starts[first_row:]
    inputs.context_lens[rows] = np.diff(starts)[rows]
    inputs.block_tables[rows] = idle_block
    inputs.last_rows[rows] = starts[1 : shape.num_samples + 1][rows] - 1
    inputs.sample_rows[rows], inputs.seeds[rows], inputs.draw_positions[rows] = -1, 0, 0
    inputs.temperature[rows], inputs.top_k[rows], inputs.top_p[rows], inputs.min_p[rows] = 0, 0, 1, 0


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
    """Ids, positions and slots of a chunk's tokens."""
    sequence, first = chunk.sequence, chunk.sequence.num_computed_tokens
    stop, table = first + chunk.num_tokens, np.array(chunk.sequence.block_table)
    positions = np.arange(first, stop)
    num_known = min(stop, len(sequence.token_ids)) - first
    inputs.ids[rows.start : rows.start + num_known] = sequence.token_ids[first : first + num_known]
    if num_known < chunk.num_tokens:
        inputs.ids[rows.stop - 1] = _newest_id(sequence)
    inputs.positions[rows] = positions
    inputs.slots[rows] = table[positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE


def _newest_id(sequence: Sequence) -> int:
    """How `Kernels.gather_ids` is told of a token that the device alone knows."""
    assert sequence.num_unread_tokens == 1, "only the newest token can be unread when a step is launched"
    return -1 - sequence.sample_row


def _fill_sampling(inputs: PassInputs, sequences: list[Sequence]) -> None:
    """The random number is a function of (seed, index of the token in its request) alone."""
    params, rows = [sequence.request.sampling for sequence in sequences], slice(0, len(sequences))
    inputs.temperature[rows] = [p.temperature for p in params]
    inputs.top_k[rows] = [p.top_k for p in params]
    inputs.top_p[rows] = [p.top_p for p in params]
    inputs.min_p[rows] = [p.min_p for p in params]
    inputs.seeds[rows] = [p.seed for p in params]
    inputs.draw_positions[rows] = [sequence.num_generated_tokens for sequence in sequences]
    if len(inputs.ban_rows):
        bans = [(row, token_id) for row, sequence in enumerate(sequences) for token_id in banned_ids(sequence)]
        inputs.ban_rows[:], inputs.ban_ids[:] = zip(*bans, strict=True)
        inputs.ban_values[:] = -np.inf


def _fields(shape: PassShape) -> Iterator[tuple[str, tuple[int, ...], np.dtype[Any]]]:
    tokens, sequences, samples, bans = shape.num_tokens, shape.num_sequences, shape.num_samples, shape.num_bans
    for name in ("ids", "positions"):
        yield name, (tokens,), np.dtype(np.int32)
    yield "slots", (tokens,), np.dtype(np.int64)
    yield "query_starts", (sequences + 1,), np.dtype(np.int32)
    yield "context_lens", (sequences,), np.dtype(np.int32)
    for name in ("last_rows", "sample_rows", "top_k"):
        yield name, (samples,), np.dtype(np.int32)
    for name in ("temperature", "top_p", "min_p"):
        yield name, (samples,), np.dtype(np.float32)
    yield "seeds", (samples,), np.dtype(np.uint64)
    yield "draw_positions", (samples,), np.dtype(np.int64)
    for name in ("ban_rows", "ban_ids"):
        yield name, (bans,), np.dtype(np.int32)
    yield "ban_values", (bans,), np.dtype(np.float32)
    yield "block_tables", (sequences, shape.num_blocks), np.dtype(np.int32)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
