"""The whole decoder against `transformers` running the same dequantised weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from model_logits import (
    TEXT,
    TINY_SHAPES,
    Logits,
    TinyShape,
    all_logits,
    generate,
    kl_divergence,
    tiny_logits,
    transformers_logits,
)

from nibble.engine.checkpoint.errors import UnsupportedModelError
from nibble.engine.limits import EngineLimits
from nibble.engine.llm_engine import LLMEngine
from nibble.engine.protocol import GenerationRequest, SamplingParams
from nibble.kernels.cpu.backend import CPUKernels
from nibble.kernels.interface import Mode
from nibble.kernels.layout import KVDtype


@pytest.fixture(scope="module")
def kernels() -> CPUKernels:
    return CPUKernels()


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("shape", TINY_SHAPES, ids=str)
def test_tiny_llama_gives_the_logits_of_transformers(
    tmp_path: Path, kernels: CPUKernels, shape: TinyShape, mode: Mode
) -> None:
    expected, logits = tiny_logits(tmp_path, kernels, shape, mode)
    # DECODE: weights are the same numbers and sums are fp32, so what is left is the fp16 rounding of keys and values
    # (2^-11 relative). PREFILL: activations, weights, keys and values are rounded to bf16 (2^-9 relative) before each
    # product; random weights make sharp attention, which amplifies that: the largest error seen is 1.1 %.
    tolerance = (1e-3 if mode is Mode.DECODE else 2e-2) * np.abs(expected).max()
    np.testing.assert_allclose(logits, expected, rtol=0, atol=tolerance)


@pytest.fixture(scope="module")
def demo(demo_checkpoint: Path, demo_reference: torch.nn.Module) -> tuple[list[int], Logits]:
    """Token ids of TEXT and the reference's logits."""
    from tokenizers import Tokenizer

    ids = Tokenizer.from_file(str(demo_checkpoint / "tokenizer.json")).encode(TEXT).ids
    assert len(ids) >= 200
    return ids, transformers_logits(demo_reference, ids)


@pytest.mark.parametrize(
    ("kv_dtype", "mode", "max_error", "mean_kl"),
    [
        # logits of this model span about -15..25; errors seen are a third of these bounds or less
        (KVDtype.FP16, Mode.DECODE, 0.05, 1e-6),
        (KVDtype.FP16, Mode.PREFILL, 0.6, 5e-4),
        (KVDtype.INT8, Mode.DECODE, 1.0, 2e-3),
        (KVDtype.INT8, Mode.PREFILL, 1.0, 2e-3),
    ],
)
def test_demo_model_gives_the_logits_of_transformers(
    demo_checkpoint: Path, kernels: CPUKernels, demo: tuple[list[int], Logits],
    kv_dtype: KVDtype, mode: Mode, max_error: float, mean_kl: float,
) -> None:  # fmt: skip
    ids, expected = demo
    logits = all_logits(demo_checkpoint, kernels, ids, kv_dtype, mode, [100, 1, 7, len(ids)])
    assert np.abs(logits - expected).max() < max_error
    assert kl_divergence(expected, logits).mean() < mean_kl


def make_engine(directory: Path, kernels: CPUKernels, kv_dtype: KVDtype = KVDtype.INT8, **limits: int) -> LLMEngine:
    return LLMEngine.from_checkpoint(
        directory, kernels, EngineLimits(**{"kv_cache_bytes": 64 << 20, **limits}, kv_dtype=kv_dtype)
    )


@pytest.mark.parametrize(("kv_dtype", "near_tie"), [(KVDtype.FP16, 0.05), (KVDtype.INT8, 0.6)])
def test_greedy_tokens_are_those_of_transformers_but_for_near_ties(
    demo_checkpoint: Path, kernels: CPUKernels, demo: tuple[list[int], Logits], demo_reference: torch.nn.Module,
    kv_dtype: KVDtype, near_tie: float,
) -> None:  # fmt: skip
    """Where the engine's token is not the reference's first choice, the two lie within the logits' tolerance."""
    prompt = demo[0][:40]
    (generated,) = generate(make_engine(demo_checkpoint, kernels, kv_dtype), [prompt], 200)
    logits = transformers_logits(demo_reference, prompt + generated)[len(prompt) - 1 : -1]
    chosen = logits[np.arange(len(generated)), generated]
    assert (logits.max(-1) - chosen).max() < near_tie
    assert (logits.argmax(-1) == generated).mean() > 0.97


def test_greedy_tokens_do_not_depend_on_the_batch_or_on_preemption(
    demo_checkpoint: Path, kernels: CPUKernels, demo: tuple[list[int], Logits]
) -> None:
    """Alone, in a batch of 12 with chunked prompts, and in a KV cache too small for all: the same ids, bit for bit."""
    prompts = [demo[0][i : i + 5 + 9 * i] for i in range(12)]
    engine = make_engine(demo_checkpoint, kernels)
    alone = [generate(engine, [prompt], 40)[0] for prompt in prompts]
    assert generate(make_engine(demo_checkpoint, kernels, max_num_batched_tokens=64), prompts, 40) == alone
    scarce = make_engine(demo_checkpoint, kernels, kv_cache_bytes=9 * 64 * 30 * 3 * 136)
    assert generate(scarce, prompts, 40) == alone
    assert scarce.stats.num_preemptions > 0


def test_heads_that_a_backend_has_no_kernels_for_are_refused(
    demo_checkpoint: Path, kernels: CPUKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "supports", lambda layout: layout.head_dim == 128)
    with pytest.raises(UnsupportedModelError, match="head_dim 64 is not supported on cpu: "):
        make_engine(demo_checkpoint, kernels)


def test_a_resumed_request_goes_on_with_the_same_tokens(
    demo_checkpoint: Path, kernels: CPUKernels, demo: tuple[list[int], Logits]
) -> None:
    prompt = demo[0][:70]
    engine = make_engine(demo_checkpoint, kernels)
    sampling = SamplingParams(max_tokens=60, temperature=0.9, top_p=0.95, seed=7)
    outputs = []
    for num_before in (0, 33):
        generated = outputs[0][:num_before] if outputs else []
        request = GenerationRequest(
            request_id=str(num_before), prompt_token_ids=prompt, sampling=sampling, arrival_s=0.0
        )
        engine.add(request, generated)
        while engine.has_unfinished:
            generated = [*generated, *(token for event in engine.step() for token in event.token_ids)]
        outputs.append(generated)
    assert outputs[1] == outputs[0]
