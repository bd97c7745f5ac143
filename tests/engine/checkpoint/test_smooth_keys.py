"""Smoother keys: the same scores to the last bit, and less error in INT8 KV blocks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hf_models import VOCAB_SIZE, QuantizedSource, quantize_linears, random_hf_model, save_hf_model
from model_logits import Logits, all_logits, kl_divergence
from transformers import PreTrainedModel

from nibble.engine.checkpoint.convert import convert_checkpoint
from nibble.engine.checkpoint.native import load_checkpoint
from nibble.engine.checkpoint.resolve import resolve_checkpoint
from nibble.engine.checkpoint.row_formats import dequantize_rows
from nibble.engine.checkpoint.safetensors_file import SafetensorsFile
from nibble.engine.checkpoint.smooth_keys import SmoothKeySource
from nibble.engine.checkpoint.source import Source, open_source, tensor_shapes
from nibble.engine.quantize.options import KVScales, Method, Options
from nibble.engine.quantize.quantize import STATISTICS_FILE, quantize
from nibble.kernels.cpu.backend import CPUKernels
from nibble.kernels.interface import Mode
from nibble.kernels.layout import KVDtype

HEAD_DIM, NUM_HEADS, NUM_KV_HEADS = 64, 4, 2
LOUD = torch.tensor([29, 29 + HEAD_DIM // 2])  # a slow pair of channels
GAIN = 40.0
MODELS = ["llama", "mistral", "qwen2", "qwen3"]


def quiet(stage: str, done: float) -> None:
    pass


def loud_model(model_type: str) -> PreTrainedModel:
    """Its keys have a pair of channels far larger than the rest, its queries the contrary."""
    model = random_hf_model(model_type)
    with torch.no_grad():
        for layer in model.model.layers:
            attention = layer.self_attn
            if model_type == "qwen3":
                attention.k_norm.weight[LOUD] *= GAIN
                attention.q_norm.weight[LOUD] /= GAIN
                continue
            rows = (torch.arange(NUM_KV_HEADS)[:, None] * HEAD_DIM + LOUD).flatten()
            if model_type == "qwen2":
                attention.k_proj.bias[rows] += GAIN
            else:
                attention.k_proj.weight[rows] *= GAIN
            for projection in (attention.q_proj.weight, attention.q_proj.bias):
                if projection is not None:
                    projection.view(NUM_HEADS, HEAD_DIM, -1)[:, LOUD] /= GAIN
        for parameter in model.parameters():
            parameter.copy_(parameter.half())
    return model


def loud_source(directory: Path, model_type: str, is_int4: bool = False) -> QuantizedSource:
    model = loud_model(model_type)
    quantized = quantize_linears(model) if is_int4 else {}
    return QuantizedSource(save_hf_model(model, directory / "source", "float32"), quantized)


def factors(plain: Source, part: str) -> npt.NDArray[np.float32]:
    """By which `SmoothKeySource` multiplies the rows of a tensor of the first layer."""
    name = f"model.layers.0.self_attn.{part}"
    before, after = (
        source.floats(name).reshape(plain.floats(name).shape[0], -1) for source in (plain, SmoothKeySource(plain))
    )
    ratio: npt.NDArray[np.float32] = np.abs(after).max(axis=1) / np.abs(before).max(axis=1)
    np.testing.assert_array_equal(after, before * ratio[:, None])
    return ratio


@pytest.mark.parametrize("is_int4", [False, True])
@pytest.mark.parametrize("model_type", MODELS)
def test_queries_are_multiplied_by_what_keys_are_divided_by(tmp_path: Path, model_type: str, is_int4: bool) -> None:
    plain = loud_source(tmp_path, model_type, is_int4)
    part = "norm.weight" if model_type == "qwen3" else "proj.weight"
    q, k = (factors(plain, f"{which}_{part}").reshape(-1, 2, HEAD_DIM // 2) for which in "qk")
    np.testing.assert_array_equal(k[:, 0], k[:, 1])  # a rotary pair has one factor
    np.testing.assert_array_equal(q, np.repeat(1 / k, len(q) // len(k), axis=0))  # and so have the queries of a kv head
    np.testing.assert_array_equal(np.exp2(np.rint(np.log2(k))), k)
    assert (k[:, 0, LOUD[0]] <= 1 / 4).all()
    assert (np.delete(k[:, 0], LOUD[0], axis=1) >= 1).all()


@pytest.mark.parametrize("is_int4", [False, True])
@pytest.mark.parametrize("model_type", MODELS)
def test_rows_are_the_weights_and_nothing_else_changes(tmp_path: Path, model_type: str, is_int4: bool) -> None:
    plain = loud_source(tmp_path, model_type, is_int4)
    smooth = SmoothKeySource(plain)
    changed = set()
    for name, shape in tensor_shapes(plain.config).items():
        values = smooth.floats(name)
        if not np.array_equal(values, plain.floats(name)):
            changed.add(".".join(name.split(".")[4:]))
        if len(shape) == 2:
            np.testing.assert_array_equal(smooth.floats(name, slice(3, 70)), values[3:70])
            assert smooth.format(name) == plain.format(name)
            np.testing.assert_allclose(
                dequantize_rows(smooth.rows(name)), values, rtol=2**-11, atol=2**-24 * (1 + 15 * is_int4)
            )
    kind = {"qwen2": ("proj.weight", "proj.bias"), "qwen3": ("norm.weight",)}.get(model_type, ("proj.weight",))
    assert changed == {f"{which}_{part}" for which in "qk" for part in kind}


def logits(directory: Path, source: Source, kv_dtype: KVDtype) -> Logits:
    if not directory.exists():
        directory.mkdir()
        convert_checkpoint(source, directory, quiet)
    ids = np.random.default_rng(1).integers(0, VOCAB_SIZE, 150).tolist()
    return all_logits(directory, CPUKernels(), ids, kv_dtype, Mode.DECODE, [70, 1, 1, 78])


@pytest.mark.parametrize("is_int4", [False, True])
@pytest.mark.parametrize("model_type", MODELS)
def test_logits_stay_and_the_error_of_an_int8_cache_falls(tmp_path: Path, model_type: str, is_int4: bool) -> None:
    plain = loud_source(tmp_path, model_type, is_int4)
    smooth = SmoothKeySource(plain)
    exact = logits(tmp_path / "plain", plain, KVDtype.FP16)
    same = logits(tmp_path / "smooth", smooth, KVDtype.FP16)
    np.testing.assert_allclose(same, exact, rtol=0, atol=2e-3 * np.abs(exact).max())
    before = kl_divergence(exact, logits(tmp_path / "plain", plain, KVDtype.INT8)).mean()
    after = kl_divergence(exact, logits(tmp_path / "smooth", smooth, KVDtype.INT8)).mean()
    assert after < before / 4


@pytest.mark.parametrize("model_type", MODELS)
def test_keys_of_like_size_stay_as_they_are(tmp_path: Path, model_type: str) -> None:
    plain = open_source(save_hf_model(random_hf_model(model_type), tmp_path))
    smooth = SmoothKeySource(plain)
    for name in tensor_shapes(plain.config):
        np.testing.assert_array_equal(smooth.floats(name), plain.floats(name))


def test_heads_that_factors_would_make_worse_stay_as_they_are(tmp_path: Path) -> None:
    model = random_hf_model("llama")
    attention = model.model.layers[0].self_attn
    other = LOUD - 7
    with torch.no_grad():
        attention.k_proj.weight[LOUD] *= 2.3  # next to 2, which divides it: then the other one sets the scale
        attention.k_proj.weight[other] *= 1.8
        attention.q_proj.weight.view(NUM_HEADS, HEAD_DIM, -1)[:, LOUD] *= 10  # and this is what is multiplied
    np.testing.assert_array_equal(factors(open_source(save_hf_model(model, tmp_path)), "k_proj.weight"), 1)


def test_a_pair_that_fp16_does_not_hold_multiplied_stays_as_it_is(tmp_path: Path) -> None:
    model = loud_model("qwen2")
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        attention.k_proj.weight[LOUD] *= 2.0**-16  # of the first kv head: the bias makes them loud
        attention.q_proj.weight[3 * HEAD_DIM + LOUD[0]] = 6e4  # of the last query head
    plain = open_source(save_hf_model(model, tmp_path, "float32"))
    k = factors(plain, "k_proj.weight").reshape(NUM_KV_HEADS, HEAD_DIM)
    np.testing.assert_array_equal(k[:, LOUD], 1)


def test_channels_without_weights_are_no_division_by_zero(tmp_path: Path) -> None:
    model = loud_model("llama")
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight[[5, 5 + HEAD_DIM // 2]] = 0  # one pair
        model.model.layers[1].self_attn.k_proj.weight[:HEAD_DIM] = 0  # a head
    plain = open_source(save_hf_model(model, tmp_path))
    smooth = SmoothKeySource(plain)
    for name in tensor_shapes(plain.config):
        assert np.isfinite(smooth.floats(name)).all()
    name = "model.layers.1.self_attn.q_proj.weight"
    queries = 2 * HEAD_DIM
    np.testing.assert_array_equal(smooth.floats(name)[:queries], plain.floats(name)[:queries])
    assert not np.array_equal(smooth.floats(name)[queries:], plain.floats(name)[queries:])


def test_models_are_converted_with_smooth_keys(tmp_path: Path) -> None:
    source = save_hf_model(loud_model("qwen2"), tmp_path / "source")
    native = load_checkpoint(resolve_checkpoint(source, tmp_path / "cache", quiet))
    keys = native.array("layers.0.qkv.bias")[NUM_HEADS * HEAD_DIM :][: NUM_KV_HEADS * HEAD_DIM]
    np.testing.assert_array_equal(
        keys, SmoothKeySource(open_source(source)).floats("model.layers.0.self_attn.k_proj.bias")
    )
    assert np.abs(keys).max() < GAIN / 3


def test_calibration_sees_the_keys_that_are_served(tmp_path: Path) -> None:
    source = save_hf_model(loud_model("qwen2"), tmp_path / "source", "float32")
    options = Options(method=Method.RTN, group_size=32, kv=KVScales.CHANNEL, num_sequences=2, sequence_tokens=64)
    quantize(source, tmp_path / "out", options, quiet)
    keys = load_checkpoint(tmp_path / "out").array("layers.0.qkv.bias")[NUM_HEADS * HEAD_DIM :][
        : NUM_KV_HEADS * HEAD_DIM
    ]
    assert np.abs(keys).max() < GAIN / 3
    seen = SafetensorsFile(tmp_path / "out" / STATISTICS_FILE).array("layers.0.keys.absmax")
    assert seen[:, LOUD].min() > GAIN / 20
    assert seen[:, LOUD].max() < GAIN / 2
