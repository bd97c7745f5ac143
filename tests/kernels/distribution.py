"""Draws from all of sampling (adjust, mask, sample), and the probabilities that a plain reading of the rules gives."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from adjusting import Case, adjustment, batch_of
from sampling_reference import adjusted

from nibble.kernels.interface import Kernels
from nibble.kernels.sampling import SamplingBatch
from nibble.kernels.slots import SlotContent, SlotLayout, pack_mask

NUM_TOKENS = 24
NUM_DRAWS = 20_000
PROMPT, GENERATED = [3, 4, 5, 3], [5, 6, 6, 6, 20, 21]
LOGITS = np.random.default_rng(3).normal(0, 1.2, NUM_TOKENS).astype(np.float32)


@dataclass(frozen=True)
class Setting:
    """What one request asks for; mask: tokens of a mask of the host."""

    content: SlotContent | None = None
    mask: list[int] | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = field(default=11)


CONTENTS = {
    "frequency": SlotContent(frequency=0.7),
    "presence": SlotContent(presence=1.1),
    "encouraged": SlotContent(presence=-1.0, frequency=-0.2),
    "repetition": SlotContent(repetition=1.8),
    "logit_bias": SlotContent(biases=((2, 1.5), (9, -100.0), (11, float("-inf")))),
    "allowed": SlotContent(allowed=[1, 2, 3, 5, 6, 17]),
    "bad_words": SlotContent(bad_words=((7,), (20, 21, 8), (21, 20, 9))),
    "min_tokens": SlotContent(min_tokens=7, stop_ids=(0, 1, 2)),
    "min_tokens reached": SlotContent(min_tokens=6, stop_ids=(0, 1, 2)),
}
SETTINGS = {
    "plain": Setting(),
    "temperature": Setting(temperature=0.6),
    "hot": Setting(temperature=1.9),
    "top_k": Setting(top_k=7),
    "top_p": Setting(top_p=0.8),
    "min_p": Setting(min_p=0.1),
    "mask": Setting(mask=[0, 3, 5, 8, 13, 23]),
    "cuts": Setting(temperature=1.4, top_k=15, top_p=0.9, min_p=0.05),
    **{name: Setting(content) for name, content in CONTENTS.items()},
    "penalties": Setting(SlotContent(repetition=1.3, frequency=0.4, presence=0.2), temperature=0.8),
    "all": Setting(
        SlotContent(
            repetition=1.3,
            frequency=0.4,
            presence=0.2,
            biases=((2, 1.5), (9, -100.0)),
            bad_words=((7,), (20, 21, 8)),
            min_tokens=9,
            stop_ids=(0,),
            allowed=list(range(0, 22)),
        ),
        mask=[*range(0, 24, 2), 3, 5],
        temperature=1.2,
        top_k=10,
        top_p=0.95,
        min_p=0.02,
    ),
}


def probabilities(setting: Setting) -> np.ndarray:
    """Of each token."""
    x = adjusted(LOGITS, setting.content or SlotContent(), PROMPT, GENERATED)
    if setting.mask is not None:
        x[[token for token in range(NUM_TOKENS) if token not in setting.mask]] = -np.inf
    p = np.exp((x - x.max()) / setting.temperature)
    order = np.argsort(-x, kind="stable")[: setting.top_k or NUM_TOKENS]
    if setting.top_p < 1:
        running = np.cumsum(p[order]) / p[order].sum()
        order = order[: int(np.searchsorted(running, setting.top_p)) + 1]
    kept = np.zeros(NUM_TOKENS)
    kept[order] = p[order]
    kept[kept < setting.min_p * kept.max()] = 0
    return kept / kept.sum()


def draws(kernels: Kernels, setting: Setting) -> np.ndarray:
    """How often each token came up."""
    rng = np.random.default_rng(0)
    logits = kernels.to_device(LOGITS[None].copy())
    if setting.content is not None:
        case = Case(setting.content, PROMPT, GENERATED)
        slots = np.zeros((1, SlotLayout(NUM_TOKENS).num_words), np.int32)
        SlotLayout(NUM_TOKENS).write(slots[0], setting.content, *case.before)
        arrays = batch_of([case], np.array([0]), rng)
        batch = adjustment({name: kernels.to_device(array) for name, array in arrays.items()})
        kernels.adjust_logits(logits, kernels.to_device(slots), batch)
    if setting.mask is not None:
        masks, rows = pack_mask(setting.mask, NUM_TOKENS)[None], np.zeros(1, np.int32)
        kernels.mask_logits(logits, kernels.to_device(masks), kernels.to_device(rows))
    every = np.repeat(kernels.to_host(logits), NUM_DRAWS, axis=0)
    tokens = kernels.to_host(kernels.sample(kernels.to_device(every), sampling_batch(kernels, setting)))
    return np.bincount(tokens, minlength=NUM_TOKENS)


def sampling_batch(kernels: Kernels, setting: Setting) -> SamplingBatch:
    columns: dict[str, Any] = {
        "temperature": np.full(NUM_DRAWS, setting.temperature, np.float32),
        "top_k": np.full(NUM_DRAWS, setting.top_k, np.int32),
        "top_p": np.full(NUM_DRAWS, setting.top_p, np.float32),
        "min_p": np.full(NUM_DRAWS, setting.min_p, np.float32),
        "seeds": np.full(NUM_DRAWS, setting.seed, np.uint64),
        "positions": np.arange(NUM_DRAWS, dtype=np.int64),
    }
    return SamplingBatch(**{name: kernels.to_device(column) for name, column in columns.items()})


def check(kernels: Kernels, setting: Setting) -> None:
    """Chi-square; what has no probability never comes up."""
    expected, observed = probabilities(setting) * NUM_DRAWS, draws(kernels, setting)
    assert not observed[expected == 0].any()
    is_common = expected >= 5
    is_rare = (expected > 0) & ~is_common  # counted as one
    if is_rare.any():
        observed = np.append(observed[is_common], observed[is_rare].sum())
        expected = np.append(expected[is_common], expected[is_rare].sum())
    else:
        observed, expected = observed[is_common], expected[is_common]
    freedom = len(expected) - 1
    chi_square = ((observed - expected) ** 2 / expected).sum()
    # Wilson and Hilferty's approximation: exceeded with probability 0.001, and the draws are fixed
    limit = freedom * (1 - 2 / (9 * freedom) + 3.09 * np.sqrt(2 / (9 * freedom))) ** 3
    assert chi_square < limit, f"chi square {chi_square:.1f}, the limit is {limit:.1f}"
