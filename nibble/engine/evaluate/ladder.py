"""Four rungs of fewer and fewer bytes, measured on the same text and prompts through the engine that serves them.

fp16 weights and fp16 KV cache are what the others are compared with: INT8 KV, INT4 weights, both. What is
recommended is the rung that takes the fewest bytes of those within a stated limit.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from nibble.engine.block_manager import num_blocks_for
from nibble.engine.checkpoint.native import Checkpoint, load_checkpoint
from nibble.engine.evaluate.checkpoints import Pair
from nibble.engine.evaluate.divergence import Comparison, Quality
from nibble.engine.evaluate.sequence_logits import SequenceLogits
from nibble.engine.evaluate.speed import BATCH, Generation, agreement, generate
from nibble.engine.limits import EngineLimits
from nibble.engine.llm_engine import LLMEngine
from nibble.engine.memory_estimate import estimate, weight_bytes
from nibble.engine.memory_plan import IDLE_BLOCKS
from nibble.engine.model import DecoderModel
from nibble.kernels.interface import Kernels
from nibble.kernels.layout import BLOCK_SIZE, KVDtype, KVLayout

DEFAULT_TEXT = Path(__file__).with_name("evaluation.txt")  # written for this purpose (CC0); no calibration text
PROMPT_TOKENS = 32

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Rung:
    weights: str
    checkpoint: Path
    kv_dtype: KVDtype


@dataclass(frozen=True)
class Measures:
    """tokens_that_fit: in the KV cache on a GPU of the given memory. generation_agreement: see `speed.agreement`."""

    name: str
    quality: Quality
    generation_agreement: float
    weight_bytes: int
    kv_token_bytes: float
    tokens_that_fit: int | None
    tokens_per_s_alone: float
    tokens_per_s_batch: float
    batch_size: int  # prompts: BATCH, fewer of a short text


@dataclass(frozen=True)
class Settings:
    """generated_tokens: of each prompt, with PROMPT_TOKENS within the context. gpu_memory_bytes: of the GPU that tokens
    are to fit on; None: not asked."""

    generated_tokens: int = 128
    gpu_memory_bytes: int | None = None


def rungs_of(pair: Pair) -> list[Rung]:
    return [
        Rung(weights, checkpoint, kv_dtype)
        for weights, checkpoint in (("fp16", pair.reference), ("int4", pair.quantized))
        for kv_dtype in (KVDtype.FP16, KVDtype.INT8)
    ]


def measure(
    rungs: list[Rung], sequences: npt.NDArray[np.int32], kernels: Kernels, settings: Settings, progress: Progress
) -> list[Measures]:
    """sequences int32 (S, T): the text. The first rung is the reference. Raises CheckpointError, CapacityError."""
    checkpoints = {rung.checkpoint: load_checkpoint(rung.checkpoint) for rung in rungs}
    qualities = _qualities(rungs, checkpoints, sequences, kernels, progress)
    gc.collect()  # the models' memory
    prompts = _prompts(sequences)
    results: list[Measures] = []
    reference: list[list[int]] = []
    for index, (rung, quality) in enumerate(zip(rungs, qualities, strict=True)):
        progress("generating", index / len(rungs))
        checkpoint = checkpoints[rung.checkpoint]
        generation = _generation(rung, checkpoint, prompts, kernels, settings.generated_tokens)
        reference = reference or generation.token_ids
        results.append(_measures(rung, checkpoint, quality, generation, reference, settings))
    progress("generating", 1.0)
    return results


def recommended(results: list[Measures], max_mean_kl: float) -> Measures:
    """The fewest bytes of weights, then of KV cache, within the limit. The reference is always within it."""
    within = [each for each in results if each.quality.mean_kl <= max_mean_kl]
    return min(within, key=lambda each: (each.weight_bytes, each.kv_token_bytes))


def _qualities(
    rungs: list[Rung],
    checkpoints: dict[Path, Checkpoint],
    sequences: npt.NDArray[np.int32],
    kernels: Kernels,
    progress: Progress,
) -> list[Quality]:
    """All rungs side by side, so that no logits have to be kept."""
    progress("comparing predictions", 0.0)
    layouts = {rung: _layout(rung, checkpoints[rung.checkpoint]) for rung in rungs}
    models: dict[Path, DecoderModel] = {}
    evaluators = []
    for rung in rungs:
        if rung.checkpoint not in models:
            checkpoint = checkpoints[rung.checkpoint]
            models[rung.checkpoint] = DecoderModel(checkpoint.config, kernels, checkpoint, layouts[rung])
        model = copy.copy(models[rung.checkpoint])
        model.kv_layout = layouts[rung]
        evaluators.append(SequenceLogits(model, sequences.shape[1]))

    def probe() -> None:
        for evaluator in evaluators:
            evaluator.probe()

    kernels.fit_workspace(probe)
    comparisons = [Comparison() for _ in rungs]
    for index, ids in enumerate(sequences):
        targets = torch.from_numpy(np.append(ids[1:], -1).astype(np.int64))
        start = 0
        for chunks in zip(*(evaluator(ids) for evaluator in evaluators), strict=True):
            stop = start + len(chunks[0])
            for comparison, logits in zip(comparisons, chunks, strict=True):
                comparison.add(chunks[0], logits, targets[start:stop])
            start = stop
            progress("comparing predictions", (index + start / len(ids)) / len(sequences))
    return [comparison.result() for comparison in comparisons]


def _prompts(sequences: npt.NDArray[np.int32]) -> list[list[int]]:
    """At most BATCH, from all over the text."""
    ids = sequences.reshape(-1)
    windows = ids[: len(ids) // PROMPT_TOKENS * PROMPT_TOKENS].reshape(-1, PROMPT_TOKENS)
    count = min(BATCH, len(windows))
    prompts: list[list[int]] = windows[np.arange(count) * len(windows) // count].tolist()
    return prompts


def _generation(
    rung: Rung, checkpoint: Checkpoint, prompts: list[list[int]], kernels: Kernels, num_tokens: int
) -> Generation:
    block_bytes = checkpoint.config.num_layers * _layout(rung, checkpoint).block_bytes
    num_blocks = len(prompts) * num_blocks_for(PROMPT_TOKENS + num_tokens) + IDLE_BLOCKS
    limits = EngineLimits(
        kv_cache_bytes=num_blocks * block_bytes,
        max_num_sequences=BATCH,
        kv_dtype=rung.kv_dtype,
        has_prefix_cache=False,
    )
    generation = generate(LLMEngine.load(checkpoint, kernels, limits), prompts, num_tokens)
    gc.collect()
    return generation


def _measures(
    rung: Rung,
    checkpoint: Checkpoint,
    quality: Quality,
    generation: Generation,
    reference: list[list[int]],
    settings: Settings,
) -> Measures:
    config, description = checkpoint.config, checkpoint.description
    tokens_that_fit = None
    if settings.gpu_memory_bytes is not None:
        tokens_that_fit = max(estimate(description, rung.kv_dtype, settings.gpu_memory_bytes).num_tokens, 0)
    layout = _layout(rung, checkpoint)
    return Measures(
        name=f"{rung.weights} + {layout.dtype}",
        quality=quality,
        generation_agreement=agreement(reference, generation.token_ids),
        weight_bytes=weight_bytes(description),
        kv_token_bytes=config.num_layers * layout.block_bytes / BLOCK_SIZE,
        tokens_that_fit=tokens_that_fit,
        tokens_per_s_alone=generation.tokens_per_s_alone,
        tokens_per_s_batch=generation.tokens_per_s_batch,
        batch_size=len(generation.token_ids),
    )


def _layout(rung: Rung, checkpoint: Checkpoint) -> KVLayout:
    return checkpoint.description.kv_layout(rung.kv_dtype)
