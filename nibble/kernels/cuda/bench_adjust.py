"""`python -m nibble.kernels.cuda.bench_adjust`: time of what comes beside sampling: penalties, masks, logprobs.

As `bench_head.py` measures: graphs of several launches, medians, logits in L2 where they fit.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from nibble.kernels.cuda.backend import CUDAKernels
from nibble.kernels.cuda.bench import Timing, print_timings
from nibble.kernels.cuda.bench_head import repeated_us
from nibble.kernels.interface import Array
from nibble.kernels.sampling import LOGPROB_WORDS, AdjustmentBatch
from nibble.kernels.slots import SlotContent, SlotLayout, mask_words

WORKSPACE_BYTES = 1 << 30
NUM_PROMPT_TOKENS, NUM_GENERATED = 1000, 500
REPEATS = 10


def contents(vocabulary: int) -> dict[str, SlotContent | None]:
    return {
        "no slot": None,
        "a bias": SlotContent(biases=[(5, 1.0)]),
        "penalties": SlotContent(frequency=1e-6, repetition=1.000001),
        "half of the tokens allowed": SlotContent(allowed=range(0, vocabulary, 2)),
    }


def adjustment_of(kernels: CUDAKernels, vocabulary: int, rows: int, content: SlotContent | None) -> tuple[Array, ...]:
    """Slots, and the fields of an AdjustmentBatch."""
    rng, layout = np.random.default_rng(0), SlotLayout(vocabulary)
    slots = np.zeros((rows, layout.num_words), np.int32)
    if content is not None:
        for slot in slots:
            prompt, generated = (rng.integers(0, vocabulary, n).tolist() for n in (NUM_PROMPT_TOKENS, NUM_GENERATED))
            layout.write(slot, content, prompt, generated)
    places = np.arange(rows, dtype=np.int32)
    slot_of = places if content is not None else np.full(rows, -1, np.int32)
    positions = np.full(rows, NUM_GENERATED, np.int64)
    return tuple(kernels.to_device(array) for array in (slots, slot_of, places, places, positions))


def adjust_timings(kernels: CUDAKernels, vocabulary: int, rows: int) -> Iterator[Timing]:
    rng = np.random.default_rng(0)
    logits = kernels.to_device(rng.standard_normal((rows, vocabulary), dtype=np.float32) * np.float32(4))

    def timing(kernel: str, what: str, op: Callable[[], object]) -> Timing:
        return Timing(kernel, f"{what}, {rows} rows", repeated_us(kernels, [op] * REPEATS), 0, 0)

    for name, content in contents(vocabulary).items():
        slots, *columns = adjustment_of(kernels, vocabulary, rows, content)
        yield timing("adjust_logits", name, partial(kernels.adjust_logits, logits, slots, AdjustmentBatch(*columns)))
    places = kernels.to_device(np.arange(rows, dtype=np.int32))
    nowhere = kernels.to_device(np.full(rows, -1, np.int32))
    masks = kernels.to_device(rng.integers(-(2**31), 2**31, (rows, mask_words(vocabulary))).astype(np.int32))
    yield timing("mask_logits", "no mask", partial(kernels.mask_logits, logits, masks, nowhere))
    yield timing("mask_logits", "half of the bits", partial(kernels.mask_logits, logits, masks, places))
    out = kernels.zeros((rows, LOGPROB_WORDS), np.int32)
    for count in (-1, 0, 5, 20):
        wanted = kernels.to_device(np.full(rows, count, np.int32))
        yield timing("copy_rows", f"{count} wanted", partial(kernels.copy_rows, logits, wanted))
        yield timing("logprobs", f"{count} wanted", partial(kernels.logprobs, logits, places, wanted, out, places))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--vocabulary", type=int, default=128_256)
    options = parser.parse_args()
    kernels = CUDAKernels(workspace_bytes=WORKSPACE_BYTES)
    every = (adjust_timings(kernels, options.vocabulary, rows) for rows in options.rows)
    print_timings(kernels, itertools.chain.from_iterable(every))


if __name__ == "__main__":
    main()
