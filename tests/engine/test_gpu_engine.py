"""The engine on a GPU: logits against `transformers`, tokens against the CPU engine; batches change nothing."""

from __future__ import annotations

import copy
import dataclasses
import gc
import logging
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from channel_checkpoint import calibrated_ids, make_channel_checkpoint, with_scales
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
from random_params import adjustments
from replay import ReplayDrafter
from tiny_models import load_as_transformers, make_tiny_llama
from transformers import LlamaForCausalLM

from nibble.engine.limits import EngineLimits, SpeculationMethod
from nibble.engine.llm_engine import LLMEngine
from nibble.engine.protocol import GenerationRequest, SamplingParams
from nibble.engine.quantize.options import Method
from nibble.engine.speculative import Speculation, asynchronous_cost
from nibble.kernels.interface import Mode
from nibble.kernels.layout import KVDtype

if TYPE_CHECKING:
    from nibble.kernels.cuda.backend import CUDAKernels

logger = logging.getLogger(__name__)
pytestmark = pytest.mark.gpu

NEAR_TIE = 0.6  # logits; the INT8 cache alone moves the demo model's by as much, see test_model.py
# Without the prefix cache: products over prompts round by their rows, of which a prompt that is found has fewer.
LIMITS = EngineLimits(
    kv_cache_bytes=None,
    max_num_sequences=64,
    max_num_batched_tokens=2048,
    memory_utilization=0.5,
    has_prefix_cache=False,
)


@pytest.fixture(scope="module")
def kernels() -> CUDAKernels:
    pytest.importorskip("cupy")
    from nibble.kernels.cuda.backend import CUDAKernels
    from nibble.kernels.cuda.errors import CUDABackendError

    try:
        return CUDAKernels()
    except CUDABackendError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def engine(demo_checkpoint: Path, kernels: CUDAKernels) -> LLMEngine:
    return LLMEngine.from_checkpoint(demo_checkpoint, kernels, LIMITS)


@pytest.fixture(scope="module")
def reference(demo_checkpoint: Path) -> LlamaForCausalLM:
    """The same dequantised weights in float32, on the GPU where this build of PyTorch can."""
    return load_as_transformers(demo_checkpoint).to("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module")
def ids(demo_checkpoint: Path) -> list[int]:
    from tokenizers import Tokenizer

    token_ids: list[int] = Tokenizer.from_file(str(demo_checkpoint / "tokenizer.json")).encode(TEXT).ids
    return token_ids


@pytest.fixture(scope="module")
def half_precision_error(reference: LlamaForCausalLM, ids: list[int]) -> tuple[Logits, float, float]:
    """The reference's logits, and how far transformers' own fp16 is from them: largest error and mean divergence."""
    expected = transformers_logits(reference, ids)
    half = transformers_logits(copy.deepcopy(reference).half(), ids)
    return expected, float(np.abs(half - expected).max()), float(kl_divergence(expected, half).mean())


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("shape", TINY_SHAPES, ids=str)
def test_tiny_llama_gives_the_logits_of_transformers(
    tmp_path: Path, kernels: CUDAKernels, shape: TinyShape, mode: Mode
) -> None:
    expected, logits = tiny_logits(tmp_path, kernels, shape, mode)
    # Activations are rounded to fp16 (2^-11 relative) before each product; random weights amplify that.
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-2 * np.abs(expected).max())


@pytest.mark.parametrize("mode", [Mode.DECODE, Mode.PREFILL])
@pytest.mark.parametrize(("kv_dtype", "max_error", "mean_kl"), [(KVDtype.FP16, 0.0, 0.0), (KVDtype.INT8, 1.0, 2e-3)])
def test_demo_model_gives_the_logits_of_transformers(
    demo_checkpoint: Path, kernels: CUDAKernels, ids: list[int], half_precision_error: tuple[Logits, float, float],
    kv_dtype: KVDtype, mode: Mode, max_error: float, mean_kl: float,
) -> None:  # fmt: skip
    """With an fp16 cache at most three times as far from fp32 as transformers in fp16; an INT8 cache adds its own."""
    expected, half_error, half_kl = half_precision_error
    logits = all_logits(demo_checkpoint, kernels, ids, kv_dtype, mode, [100, 1, 7, len(ids)])
    error, divergence = np.abs(logits - expected).max(), kl_divergence(expected, logits).mean()
    logger.info(
        "%s %s: error %.4f (fp16 %.4f), KL %.2e (fp16 %.2e)", kv_dtype, mode, error, half_error, divergence, half_kl
    )
    assert error < 3 * half_error + max_error
    assert divergence < 3 * half_kl + mean_kl


@pytest.fixture(scope="module")
def channel_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_channel_checkpoint(tmp_path_factory.mktemp("channel"), Method.RTN)


@pytest.mark.parametrize("mode", Mode)
def test_static_scales_of_keys_and_values_serve_as_well_as_those_of_tokens(
    channel_checkpoint: Path, kernels: CUDAKernels, mode: Mode
) -> None:
    ids, chunks = calibrated_ids(channel_checkpoint), [70, 1, 1, 78]
    exact = all_logits(channel_checkpoint, kernels, ids, KVDtype.FP16, mode, chunks)
    served = all_logits(channel_checkpoint, kernels, ids, KVDtype.INT8, mode, chunks)
    assert 0 < kl_divergence(exact, served).mean() < 1e-4


def test_what_saturates_is_counted_in_prompts_and_captured_steps(
    tmp_path: Path, channel_checkpoint: Path, kernels: CUDAKernels
) -> None:
    ids = calibrated_ids(channel_checkpoint)
    counts = []
    for factor in (4, 0.01):
        directory = with_scales(channel_checkpoint, tmp_path / str(factor), factor)
        engine = LLMEngine.from_checkpoint(directory, kernels, LIMITS)
        generate(engine, [ids[:100]], 1)
        after_prompt = engine.stats.num_saturated_kv
        generate(engine, [ids[:100]], 20)
        counts.append((after_prompt, engine.stats.num_saturated_kv - 2 * after_prompt, engine.config))
        del engine
        gc.collect()
    (nothing, nothing_later, config), (of_prompt, of_steps, _) = counts
    token_values = config.num_layers * 2 * config.num_kv_heads * config.head_dim
    assert nothing == nothing_later == 0
    assert 0.5 * 100 * token_values < of_prompt <= 100 * token_values
    assert 0.5 * 19 * token_values < of_steps <= 20 * token_values  # the step that is launched before the end is known


def test_greedy_tokens_are_those_of_the_cpu_but_for_near_ties(
    demo_checkpoint: Path, engine: LLMEngine, ids: list[int], reference: LlamaForCausalLM
) -> None:
    """16 prompts, 256 tokens each. Where the two part, their choices lie within NEAR_TIE of each other."""
    prompts = [ids[i : i + 5 + 9 * i] for i in range(16)]
    expected = cpu_tokens(demo_checkpoint, prompts)
    tokens = generate(engine, prompts, 256)
    gaps = divergence_gaps(reference, prompts, expected, tokens)
    logger.info("%d of %d part; prompt:token: gap %s", len(gaps), len(prompts), gaps)
    assert all(gap < NEAR_TIE for gap in gaps.values())
    assert len(gaps) < len(prompts)


def cpu_tokens(directory: Path, prompts: list[list[int]]) -> list[list[int]]:
    from nibble.kernels.cpu.backend import CPUKernels

    return generate(LLMEngine.from_checkpoint(directory, CPUKernels(), EngineLimits(512 << 20)), prompts, 256)


def divergence_gaps(
    reference: LlamaForCausalLM, prompts: list[list[int]], ours: list[list[int]], theirs: list[list[int]]
) -> dict[str, float]:
    """For each prompt whose continuations part: where, and how far apart the reference sees the two choices."""
    gaps = {}
    for i, (prompt, a, b) in enumerate(zip(prompts, ours, theirs, strict=True)):
        index = next((k for k in range(min(len(a), len(b))) if a[k] != b[k]), None)
        if index is not None:
            logits = transformers_logits(reference, prompt + a[:index])[-1]
            gaps[f"{i}:{index}"] = float(abs(logits[a[index]] - logits[b[index]]))
    return gaps


def test_tokens_do_not_depend_on_the_batch_its_order_or_its_bucket(engine: LLMEngine, ids: list[int]) -> None:
    """64 sampled sequences: alone, then all together in two orders. Each prompt is prefilled in a step of its own."""
    prompts = [ids[i % 40 : i % 40 + 3 + i] for i in range(64)]
    order = np.random.default_rng(0).permutation(64).tolist()
    alone = {i: sampled(engine, prompts, [i])[i] for i in range(0, 64, 7)}
    together = sampled(engine, prompts, list(range(64)))
    assert sampled(engine, prompts, order) == together
    assert alone == {i: together[i] for i in alone}


def test_tokens_do_not_depend_on_how_prompts_are_cut(demo_checkpoint: Path, engine: LLMEngine, ids: list[int]) -> None:
    """24 prompts of 61 tokens and more, alone, and all at once in steps of 2,048 and of 256 tokens."""
    from nibble.kernels.cuda.backend import CUDAKernels

    prompts = [ids[i:] + ids[: 61 + 10 * i] for i in range(24)]
    alone = [generate(engine, [prompt], 64)[0] for prompt in prompts[::5]]
    for step_tokens in (2048, 256):
        limits = dataclasses.replace(LIMITS, max_num_batched_tokens=step_tokens, has_prefix_cache=False)
        other = LLMEngine.from_checkpoint(demo_checkpoint, CUDAKernels(), limits)
        together = generate(other, prompts, 64)
        assert together[::5] == alone
        del other
        gc.collect()


def sampled(
    engine: LLMEngine, prompts: list[list[int]], order: list[int], max_tokens: int = 48
) -> dict[int, list[int]]:
    """max_tokens tokens of each prompt in `order`, joining one by one."""
    outputs: dict[int, list[int]] = {i: [] for i in order}
    waiting = list(order)
    while engine.has_unfinished or waiting:
        if waiting:
            i = waiting.pop(0)
            sampling = SamplingParams(max_tokens=max_tokens, temperature=1.0, seed=i)
            engine.add(
                GenerationRequest(request_id=str(i), prompt_token_ids=prompts[i], sampling=sampling, arrival_s=0.0)
            )
        for event in engine.step():
            outputs[int(event.request_id)] += event.token_ids
    return outputs


def test_adjusted_tokens_and_their_logprobs_do_not_depend_on_the_batch(engine: LLMEngine, ids: list[int]) -> None:
    """Alone, and joining one by one with a part of their tokens; a third adjusts nothing."""
    rng = np.random.default_rng(0)
    vocab_size = engine.config.vocab_size
    requests = []
    for i in range(48):
        max_tokens = int(rng.integers(1, 100))
        sampling = SamplingParams(
            max_tokens=max_tokens,
            temperature=float(rng.choice([0.0, 0.8, 1.5])),
            seed=i,
            **(adjustments(rng, vocab_size, max_tokens) if i % 3 else {}),
        )
        prompt = ids[i : i + 3 + 2 * i]
        requests.append(
            GenerationRequest(request_id=str(i), prompt_token_ids=prompt, sampling=sampling, arrival_s=float(i))
        )
    outputs: dict[str, tuple[list[int], list[bytes | None]]] = {}

    def step() -> None:
        for event in engine.step():
            tokens, logprobs = outputs[event.request_id]
            tokens += event.token_ids
            logprobs.append(event.logprobs)

    for request in requests:
        outputs[request.request_id] = ([], [])
        engine.add(request)
        while engine.has_unfinished:
            step()
    alone, outputs = outputs, {}
    for i in rng.permutation(48):
        tokens, logprobs = alone[str(i)]
        num_before = int(rng.integers(len(tokens)))
        outputs[str(i)] = (tokens[:num_before], logprobs[:num_before])
        engine.add(requests[i], tokens[:num_before])
        step()
    while engine.has_unfinished:
        step()
    assert outputs == alone


def test_a_resumed_request_goes_on_with_the_same_tokens(engine: LLMEngine, ids: list[int]) -> None:
    outputs: list[list[int]] = []
    for num_before in (0, 1, 33):
        generated = outputs[0][:num_before] if outputs else []
        sampling = SamplingParams(max_tokens=80, temperature=0.9, seed=7)
        engine.add(
            GenerationRequest(request_id="a", prompt_token_ids=ids[:70], sampling=sampling, arrival_s=0.0), generated
        )
        while engine.has_unfinished:
            generated = [*generated, *(token for event in engine.step() for token in event.token_ids)]
        outputs.append(generated)
    assert outputs[1] == outputs[0]
    assert outputs[2] == outputs[0]


def test_preempted_sequences_keep_their_tokens(demo_checkpoint: Path, engine: LLMEngine, ids: list[int]) -> None:
    """A KV cache too small for all. Short prompts: long ones are prefilled by products that depend on their number."""
    from nibble.kernels.cuda.backend import CUDAKernels

    prompts, order = [ids[i : i + 5] for i in range(12)], list(range(12))
    expected = sampled(engine, prompts, order, max_tokens=110)
    limits = EngineLimits(12 * 64 * 30 * 3 * 136, max_num_sequences=16, max_num_batched_tokens=128)
    scarce = LLMEngine.from_checkpoint(demo_checkpoint, CUDAKernels(), limits)
    assert sampled(scarce, prompts, order, max_tokens=110) == expected
    assert scarce.stats.num_preemptions > 0


def test_no_step_allocates_device_memory(kernels: CUDAKernels, engine: LLMEngine, ids: list[int]) -> None:
    """Prompts of many lengths, more tokens than a step holds, bans, recomputation."""
    rng = np.random.default_rng(0)
    free_bytes, _ = kernels.memory_info()
    for i in range(100):
        sampling = SamplingParams(
            max_tokens=int(rng.integers(2, 60)), seed=i, min_tokens=i % 3, stop_token_ids=(1, 2, 3)
        )
        prompt = rng.integers(0, 49152, rng.integers(1, 3000)).tolist()
        request = GenerationRequest(request_id=str(i), prompt_token_ids=prompt, sampling=sampling, arrival_s=float(i))
        engine.add(request, rng.integers(0, 49152, rng.integers(0, 50)).tolist())
    while engine.has_unfinished:
        engine.step()
    assert kernels.memory_info()[0] >= free_bytes  # another test's may be freed meanwhile


@pytest.mark.parametrize("adjusts", [False, True])
def test_drafts_change_no_token(tmp_path: Path, kernels: CUDAKernels, adjusts: bool) -> None:
    """Copying, sampled or greedy, with log probabilities or without, alone and together: in all graphs with drafts."""
    make_tiny_llama(tmp_path, hidden_size=256, num_layers=3, head_dim=64, vocab_size=1000, max_context_tokens=2048)
    rng = np.random.default_rng(0)
    requests = []
    for i in range(20):
        prompt = (rng.integers(0, 1000, 5 + 9 * i).tolist() * 3)[: 300 + i]
        sampling = SamplingParams(
            max_tokens=60 + i,
            temperature=0.7 * (i % 2),
            seed=i,
            logprobs=3 if adjusts and i % 3 else None,
            logit_bias=((i, 2.0),) if adjusts and i % 4 == 0 else (),
        )
        requests.append(
            GenerationRequest(request_id=str(i), prompt_token_ids=prompt, sampling=sampling, arrival_s=float(i))
        )
    limits = dataclasses.replace(LIMITS, max_num_sequences=24, memory_utilization=0.2)
    plain = completions(LLMEngine.from_checkpoint(tmp_path, kernels, limits), requests)
    engine = LLMEngine.from_checkpoint(
        tmp_path, kernels, dataclasses.replace(limits, speculation=SpeculationMethod.NGRAM)
    )
    for accuracy in (1.0, 0.7):
        tokens = {name: completion[0] for name, completion in plain.items()}
        engine.speculation = Speculation(ReplayDrafter(tokens, accuracy, 1000), 7, asynchronous_cost(2e-3))
        alone: dict[str, tuple[list[int], bytes]] = {}
        for request in requests[:6]:
            alone |= completions(engine, [request])
        assert alone == {name: plain[name] for name in alone}
        assert completions(engine, requests) == plain
        assert engine.speculation.num_accepted_tokens > 300


def completions(engine: LLMEngine, requests: list[GenerationRequest]) -> dict[str, tuple[list[int], bytes]]:
    """Tokens and log probabilities. Each prompt is prefilled in a step of its own."""
    done: dict[str, tuple[list[int], bytes]] = {}
    waiting = list(requests)
    while engine.has_unfinished or waiting:
        if waiting:
            done[waiting[0].request_id] = ([], b"")
            engine.add(waiting.pop(0))
        for event in engine.step():
            tokens, logprobs = done[event.request_id]
            done[event.request_id] = (tokens + event.token_ids, logprobs + (event.logprobs or b""))
    return done
