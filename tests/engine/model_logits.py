"""What tests of the whole decoder share: a text, the logits of all its positions, and how far two of them are apart."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tiny_models import make_tiny_llama
from transformers import PreTrainedModel

from nibble.engine.block_manager import num_blocks_for
from nibble.engine.checkpoint.native import load_checkpoint
from nibble.engine.llm_engine import LLMEngine
from nibble.engine.model import DecoderModel, ForwardBatch
from nibble.engine.protocol import GenerationRequest, SamplingParams
from nibble.kernels.interface import AttentionBatch, Kernels, Mode
from nibble.kernels.layout import BLOCK_SIZE, KVDtype

Logits = npt.NDArray[np.float32]

TEXT = (
    "The lighthouse keeper wrote in his journal every evening. On the third of March 1921 he noted that the wind came "
    "from the north-west, that 17 ships had passed, and that the lamp needed 2.5 litres of oil. He did not write about "
    "his daughter, who had left for the city in spring. def main():\n    for i in range(10):\n        print(i * i)\n"
    "When the fog lifted the sea lay grey and quiet; gulls sat on the rocks. «Morgen», sagte er, "
    "«kommt das Boot.» 東京は今日も雨です。 He filled the lamp, trimmed the wick, climbed the 112 steps and waited. "
    "In the morning the boat brought bread, newspapers, a letter with a blue stamp, and the news that the school would "
    "open again after the summer. The keeper read the letter twice, put it into the drawer, and went up to the lamp."
)


@dataclass(frozen=True)
class TinyShape:
    num_heads: int
    num_kv_heads: int
    head_dim: int
    tied: bool
    group_size: int

    def __str__(self) -> str:
        return f"{self.num_heads}-{self.num_kv_heads}-{self.head_dim}"


TINY_SHAPES = (
    TinyShape(9, 3, 64, True, 32),
    TinyShape(4, 4, 64, False, 64),
    TinyShape(8, 1, 128, True, 128),
    TinyShape(5, 5, 96, False, 32),
)


def tiny_logits(directory: Path, kernels: Kernels, shape: TinyShape, mode: Mode) -> tuple[Logits, Logits]:
    """Of a random model at 150 tokens, with an fp16 cache: (those of `transformers`, ours)."""
    reference = make_tiny_llama(
        directory,
        hidden_size=128 if shape.group_size == 128 else 192,
        num_layers=2,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=256,
        vocab_size=500,
        tied=shape.tied,
        group_size=shape.group_size,
        seed=shape.num_heads,
    )
    ids = np.random.default_rng(1).integers(0, 500, 150).tolist()
    logits = all_logits(directory, kernels, ids, KVDtype.FP16, mode, [70, 1, 1, 78])
    return transformers_logits(reference, ids), logits


def all_logits(
    directory: Path, kernels: Kernels, ids: list[int], kv_dtype: KVDtype, mode: Mode, chunks: list[int]
) -> Logits:
    """Logits of every position, computed in chunks over a KV cache whose blocks are in a shuffled order."""
    checkpoint = load_checkpoint(directory)
    config = checkpoint.config
    layout = checkpoint.description.kv_layout(kv_dtype)
    model = DecoderModel(config, kernels, checkpoint, layout)
    num_blocks = num_blocks_for(len(ids)) + 2
    table = np.random.default_rng(0).permutation(num_blocks).astype(np.int32)
    kv_cache = kernels.zeros((config.num_layers, num_blocks, config.num_kv_heads, layout.head_block_bytes), np.uint8)
    logits, start = [], 0
    for size in chunks:
        positions = np.arange(start, min(start + size, len(ids)), dtype=np.int32)
        slots = table[positions // BLOCK_SIZE].astype(np.int64) * BLOCK_SIZE + positions % BLOCK_SIZE
        batch = ForwardBatch(
            ids=kernels.to_device(np.array(ids, np.int32)[positions]),
            positions=kernels.to_device(positions),
            slots=kernels.to_device(slots),
            attention=AttentionBatch(
                query_starts=kernels.to_device(np.array([0, len(positions)], np.int32)),
                context_lens=kernels.to_device(np.array([start + len(positions)], np.int32)),
                block_tables=kernels.to_device(table[None]),
            ),
            mode=mode,
        )
        rows = kernels.to_device(np.arange(len(positions), dtype=np.int32))
        with kernels.temporaries():
            logits.append(kernels.to_host(model.logits(model.forward(batch, kv_cache), rows)).copy())
        start += len(positions)
    assert start == len(ids)
    return np.concatenate(logits)


def transformers_logits(model: PreTrainedModel, ids: list[int]) -> Logits:
    with torch.inference_mode():
        logits: Logits = model(torch.tensor([ids], device=model.device)).logits[0].float().cpu().numpy()
    return logits


def kl_divergence(reference: Logits, logits: Logits) -> npt.NDArray[np.float64]:
    """KL(softmax(reference) || softmax(logits)) per position, in nats."""

    def log_softmax(x: Logits) -> npt.NDArray[np.float64]:
        x64 = x.astype(np.float64)
        x64 -= x64.max(-1, keepdims=True)
        return x64 - np.log(np.exp(x64).sum(-1, keepdims=True))

    p, q = log_softmax(reference), log_softmax(logits)
    divergence: npt.NDArray[np.float64] = (np.exp(p) * (p - q)).sum(-1)
    return divergence


def generate(engine: LLMEngine, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    outputs: dict[str, list[int]] = {str(i): [] for i in range(len(prompts))}
    for i, prompt in enumerate(prompts):
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)
        engine.add(GenerationRequest(request_id=str(i), prompt_token_ids=prompt, sampling=sampling, arrival_s=float(i)))
    while engine.has_unfinished:
        for event in engine.step():
            outputs[event.request_id] += event.token_ids
    return list(outputs.values())
