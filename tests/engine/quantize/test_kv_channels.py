"""Static scales of keys and values: from calibration to what the engine serves and counts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from channel_checkpoint import calibrated_ids, make_channel_checkpoint, with_scales
from model_logits import all_logits, generate, kl_divergence

from nibble.engine.checkpoint.native import load_checkpoint
from nibble.engine.checkpoint.safetensors_file import SafetensorsFile
from nibble.engine.limits import EngineLimits
from nibble.engine.llm_engine import LLMEngine
from nibble.engine.model_config import ModelConfig
from nibble.engine.quantize.decoder import rope_table, rotate
from nibble.engine.quantize.kv_channels import KVObserver, kv_channels
from nibble.engine.quantize.options import Method
from nibble.engine.quantize.quantize import STATISTICS_FILE
from nibble.kernels.cpu.backend import CPUKernels
from nibble.kernels.interface import Mode
from nibble.kernels.layout import KVDtype

CONFIG = ModelConfig(
    architecture="llama", vocab_size=8, hidden_size=64, intermediate_size=64, num_layers=1, num_heads=2, num_kv_heads=2,
    head_dim=64, max_context_tokens=4096, rms_norm_eps=1e-5,
)  # fmt: skip


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[Method, Path]:
    return {
        method: make_channel_checkpoint(tmp_path_factory.mktemp(method), method)
        for method in (Method.RTN, Method.SINQ, Method.AWQ, Method.AWQ_GPTQ)
    }


@pytest.fixture(scope="module")
def ids(checkpoints: dict[Method, Path]) -> list[int]:
    return calibrated_ids(checkpoints[Method.RTN])


@pytest.mark.parametrize("method", [Method.RTN, Method.SINQ, Method.AWQ, Method.AWQ_GPTQ])
@pytest.mark.parametrize("mode", Mode)
def test_static_scales_serve_as_well_as_those_of_tokens(
    checkpoints: dict[Method, Path], ids: list[int], method: Method, mode: Mode
) -> None:
    kernels, chunks = CPUKernels(), [70, 1, 1, 78]
    exact = all_logits(checkpoints[method], kernels, ids, KVDtype.FP16, mode, chunks)
    served = all_logits(checkpoints[method], kernels, ids, KVDtype.INT8, mode, chunks)
    divergence = kl_divergence(exact, served).mean()
    assert 0 < divergence < 1e-4


def test_scales_are_those_of_the_ranges_that_calibration_saw(checkpoints: dict[Method, Path]) -> None:
    directory = checkpoints[Method.AWQ_GPTQ]
    checkpoint, seen = load_checkpoint(directory), SafetensorsFile(directory / STATISTICS_FILE)
    parameters = checkpoint.array("layers.1.kv_channels")
    for which, name in enumerate(("keys", "values")):
        low, high = (seen.array(f"layers.1.{name}.{measure}") for measure in ("min", "max"))
        np.testing.assert_allclose(parameters[:, which, 0], 1.1 * (high - low) / 255, rtol=1e-6)
        np.testing.assert_allclose(parameters[:, which, 1], (high + low) / 2, rtol=1e-5, atol=1e-6)


def test_a_key_counts_as_what_it_is_at_every_position() -> None:
    generator = torch.Generator().manual_seed(0)
    seen = torch.randn(1, 2, 50, 64, generator=generator)
    observer = KVObserver(CONFIG, torch.device("cpu"))
    observer(seen, seen)
    statistics = {name: values.numpy() for name, values in observer.results().items()}
    scale, zero = torch.from_numpy(kv_channels(statistics))[:, 0].unbind(1)  # of keys: (kv heads, D)
    cos, sin = rope_table(CONFIG, 4096, torch.device("cpu"))
    steps = 0.0
    for position in range(0, 4096, 37):
        turned = rotate(seen, cos[position], sin[position])
        steps = max(steps, float(((turned - zero[:, None]) / scale[:, None]).abs().max()))
    assert 127.4 / 1.1 < steps < 127.51 / 1.1
    slowest = scale[:, [31, 63]] * 255 / 1.1  # turns by less than half a radian
    assert (slowest < 1.5 * (seen.amax((0, 2)) - seen.amin((0, 2)))[:, [31, 63]]).all()


def test_a_constant_channel_has_a_scale() -> None:
    measures = ("min", "max", "absmax")
    statistics = {f"keys.{measure}": np.full((1, 32), 3.0, np.float32) for measure in measures}
    statistics |= {f"values.{measure}": np.zeros((1, 32), np.float32) for measure in measures}
    parameters = kv_channels(statistics)
    assert (parameters[:, :, 0] > 0).all()
    assert (parameters[:, 0, 0] * 127 > 3 * 2.0**-12).all()  # what fp16 makes of 3 is within the range
    np.testing.assert_array_equal(parameters[:, :, 1], [[[3.0] * 32, [0.0] * 32]])


def engine_of(directory: Path) -> LLMEngine:
    return LLMEngine.from_checkpoint(directory, CPUKernels(), EngineLimits(kv_cache_bytes=8 << 20))


def test_what_saturates_is_counted_by_the_engine(
    checkpoints: dict[Method, Path], ids: list[int], tmp_path: Path
) -> None:
    directory = checkpoints[Method.AWQ]
    wide, narrow = (
        engine_of(with_scales(directory, tmp_path / "wide", 4)),
        engine_of(with_scales(directory, tmp_path / "narrow", 0.01)),
    )
    prompts = [ids[:100], ids[100:103]]
    generate(wide, prompts, 5)
    assert wide.stats.num_saturated_kv == 0
    generate(narrow, prompts, 5)
    tokens = sum(map(len, prompts)) + 2 * 4  # the last token of each is not computed
    config = narrow.config
    values = tokens * config.num_layers * 2 * config.num_kv_heads * config.head_dim
    assert 0.5 * values < narrow.stats.num_saturated_kv <= values


def test_the_same_checkpoint_has_an_fp16_cache_too(checkpoints: dict[Method, Path], ids: list[int]) -> None:
    limits = EngineLimits(kv_cache_bytes=8 << 20, kv_dtype=KVDtype.FP16)
    engine = LLMEngine.from_checkpoint(checkpoints[Method.RTN], CPUKernels(), limits)
    assert engine.runner.model.kv_layout.dtype is KVDtype.FP16
    assert [len(tokens) for tokens in generate(engine, [ids[:20]], 5)] == [5]
