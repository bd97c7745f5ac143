"""AWQ, GPTQ, AutoRound and compressed-tensors checkpoints: their numbers, and the logits of the converted model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from architectures import check_logits
from hf_models import random_hf_model
from packed_models import (
    Quantized,
    Tensors,
    awq,
    compressed_tensors,
    gptq,
    gptq_v2,
    gptq_without_order,
    save_packed_model,
)
from transformers import PreTrainedModel

from nibble.engine.checkpoint.convert import convert_checkpoint
from nibble.engine.checkpoint.errors import CheckpointError, ConversionError, SourceError, UnsupportedModelError
from nibble.engine.checkpoint.native import load_checkpoint
from nibble.engine.checkpoint.source import open_source
from nibble.engine.memory_estimate import descriptions_of, weight_bytes
from nibble.engine.model import DecoderModel
from nibble.kernels.cpu.backend import CPUKernels
from nibble.kernels.interface import Int4Weight, Int8Weight, Mode
from nibble.kernels.layout import KVDtype

AWQ_CONFIG = {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm", "zero_point": True}
GPTQ_CONFIG = {"quant_method": "gptq", "bits": 4, "group_size": 32}


def compressed_config(**weights: Any) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32} | weights
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group}}


@dataclass(frozen=True)
class Format:
    pack: Callable[[Quantized], Tensors]
    config: dict[str, Any]
    group_size: int = 32
    symmetric: bool = False
    reordered: bool = False
    model_type: str = "llama"
    bits: Callable[[str], int] = lambda linear: 4


AUTO_ROUND_CONFIG = {
    "quant_method": "auto-round",
    "packing_format": "auto_round:auto_gptq",
    "bits": 4,
    "group_size": 32,
    "data_type": "int",
    "sym": True,
    "block_name_to_quantize": "model.layers",
}
DOWN_8, UP_16 = "model.layers.0.mlp.down_proj", "model.layers.1.mlp.up_proj"
MIXED = {"extra_config": {DOWN_8: {"bits": 8}, r"layers\.1\.mlp\.up_.*": {"bits": 16, "data_type": "float"}}}


def mixed_bits(linear: str) -> int:
    return {DOWN_8: 8, UP_16: 16}.get(linear, 4)


FORMATS = {
    "auto-round": Format(gptq_without_order, AUTO_ROUND_CONFIG, symmetric=True),
    "auto-round, asym": Format(gptq_v2, {**AUTO_ROUND_CONFIG, "packing_format": "auto_round:gptqmodel"}),
    "auto-round, awq": Format(awq, {**AUTO_ROUND_CONFIG, "packing_format": "auto_round:auto_awq"}),
    "auto-round, mixed": Format(
        gptq_without_order, {**AUTO_ROUND_CONFIG, **MIXED}, symmetric=True, bits=mixed_bits, model_type="qwen3"
    ),
    "gptq, 8 bits": Format(gptq, {**GPTQ_CONFIG, "bits": 8}, symmetric=True, bits=lambda linear: 8),
    "gptq, dynamic": Format(
        gptq,
        {**GPTQ_CONFIG, "dynamic": {r"+:.*\.0\.mlp\.down": {"bits": 8}, r"-:.*\.1\.mlp\.up": {}}},
        symmetric=True,
        bits=mixed_bits,
    ),
    "compressed-tensors, 8 bits": Format(
        compressed_tensors, compressed_config(num_bits=8, group_size=64), 64, symmetric=True, bits=lambda linear: 8
    ),
    "awq": Format(awq, AWQ_CONFIG, 64, model_type="qwen2"),
    "awq, sym": Format(awq, {**AWQ_CONFIG, "zero_point": False}, 64, symmetric=True),
    "gptq, sym": Format(gptq, GPTQ_CONFIG, symmetric=True),
    "gptq, asym": Format(gptq, {**GPTQ_CONFIG, "checkpoint_format": "gptq"}),
    "gptq_v2, asym": Format(gptq_v2, {**GPTQ_CONFIG, "checkpoint_format": "gptq_v2"}),
    "gptq, act-order": Format(gptq, {**GPTQ_CONFIG, "desc_act": True}, reordered=True, model_type="qwen2"),
    "gptq, one group": Format(gptq, {**GPTQ_CONFIG, "group_size": -1}, 128, symmetric=True, model_type="mistral"),
    "compressed-tensors, sym": Format(compressed_tensors, compressed_config(), symmetric=True),
    "compressed-tensors, asym": Format(compressed_tensors, compressed_config(symmetric=False), model_type="qwen3"),
    "compressed-tensors, act-order": Format(
        compressed_tensors, compressed_config(symmetric=False, actorder="group"), reordered=True
    ),
    "compressed-tensors, channel": Format(
        compressed_tensors, compressed_config(strategy="channel", group_size=None), 128, symmetric=True
    ),
}


def save(name: str, directory: Path) -> tuple[PreTrainedModel, dict[str, Quantized]]:
    form = FORMATS[name]
    # 128 everywhere: the inputs of every linear are one group, if that is all there is
    options = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 128}
    model = random_hf_model(form.model_type, **options)
    quantized = save_packed_model(
        model,
        directory,
        form.pack,
        form.config,
        group_size=form.group_size,
        symmetric=form.symmetric,
        reordered=form.reordered,
        bits=form.bits,
    )
    return model, quantized


@pytest.fixture(scope="module")
def kernels() -> CPUKernels:
    return CPUKernels()


@pytest.mark.parametrize("name", FORMATS)
def test_numbers_logits_and_plan_are_those_of_what_was_packed(tmp_path: Path, kernels: CPUKernels, name: str) -> None:
    model, quantized = save(name, tmp_path / "source")
    source = open_source(tmp_path / "source")
    for tensor, linear in quantized.items():
        # scale * zero, the minimum, is rounded to fp16: by half a unit of 15 scales at most
        bound = np.abs(linear.scale).astype(np.float32).max() * 15 * 2.0**-11
        np.testing.assert_allclose(
            source.floats(tensor), linear.weights(), rtol=0, atol=bound if not FORMATS[name].symmetric else 0
        )
    native = tmp_path / "native"
    native.mkdir()
    convert_checkpoint(source, native, lambda stage, done: None)
    checkpoint = load_checkpoint(native)
    for stem, part in (("qkv", "self_attn.q"), ("o", "self_attn.o"), ("gate_up", "mlp.up"), ("down", "mlp.down")):
        for layer in (0, 1):
            is_int4 = FORMATS[name].bits(f"model.layers.{layer}.{part}_proj") == 4
            assert isinstance(checkpoint.linear(f"layers.{layer}.{stem}"), Int4Weight if is_int4 else Int8Weight)
    assert descriptions_of(tmp_path / "source", 128) == {"as stored": checkpoint.description}
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.json").write_bytes((tmp_path / "source" / "config.json").read_bytes())
    assert descriptions_of(tmp_path / "config", 128) == {"as stored": checkpoint.description}
    served = DecoderModel.load(kernels, checkpoint, KVDtype.INT8)
    assert served.weight_bytes == weight_bytes(checkpoint.description)
    assert checkpoint.has("layers.0.o.order") == FORMATS[name].reordered
    check_logits(
        kernels, native, model, Mode.DECODE, 5e-2
    )  # the head is INT8, minima are rounded; a wrong order gives 1


def test_parts_with_different_orders_become_int8(tmp_path: Path, kernels: CPUKernels) -> None:
    model, quantized = save("gptq, act-order", tmp_path / "source")
    path = tmp_path / "source" / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    name = "model.layers.0.self_attn.k_proj"
    linear = quantized[f"{name}.weight"]
    other = Quantized(linear.q, linear.scale, linear.zero, np.roll(linear.group_of, 5))
    tensors |= {f"{name}.{part}": torch.from_numpy(np.ascontiguousarray(array)) for part, array in gptq(other).items()}
    safetensors.torch.save_file(tensors, path)
    with torch.no_grad():
        model.get_parameter(f"{name}.weight").copy_(torch.from_numpy(other.weights()))
    native = tmp_path / "native"
    native.mkdir()
    convert_checkpoint(open_source(tmp_path / "source"), native, lambda stage, done: None)
    checkpoint = load_checkpoint(native)
    assert not isinstance(checkpoint.linear("layers.0.qkv"), Int4Weight)
    assert not checkpoint.has("layers.0.qkv.order")
    assert isinstance(checkpoint.linear("layers.1.qkv"), Int4Weight)
    check_logits(kernels, native, model, Mode.DECODE, 5e-2)


def test_zero_biases_of_linears_without_one_are_passed_over(tmp_path: Path) -> None:
    save("gptq, sym", tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    name = "model.layers.0.mlp.up_proj.bias"
    safetensors.torch.save_file(tensors | {name: torch.zeros(128)}, path)
    open_source(tmp_path)
    safetensors.torch.save_file(tensors | {name: torch.ones(128)}, path)
    with pytest.raises(UnsupportedModelError, match=f"tensor {name} belongs to a feature that is not supported"):
        open_source(tmp_path)


def test_the_older_file_for_options_is_read(tmp_path: Path) -> None:
    _, quantized = save("gptq, asym", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    options = config.pop("quantization_config")
    del options["quant_method"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "quantize_config.json").write_text(json.dumps(options))
    (tmp_path / "model.safetensors").rename(tmp_path / "gptq_model-4bit-32g.safetensors")
    source = open_source(tmp_path)
    name = "model.layers.0.mlp.down_proj.weight"
    np.testing.assert_allclose(source.floats(name), quantized[name].weights(), rtol=0, atol=1e-3)


def test_reordered_linears_that_fp16_does_not_hold_are_refused(tmp_path: Path) -> None:
    """Their rows have orders of their own, which makes them INT8."""
    save("gptq, act-order", tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    up = "model.layers.0.mlp.up_proj"
    tensors[f"{up}.g_idx"] = tensors[f"{up}.g_idx"].flip(0).contiguous()
    tensors[f"{up}.scales"] = tensors[f"{up}.scales"].float() * 1e6
    safetensors.torch.save_file(tensors, path)
    (tmp_path / "native").mkdir()
    with pytest.raises(ConversionError, match=f"tensor {up}.weight has weights that are infinite, NaN or beyond fp16"):
        convert_checkpoint(open_source(tmp_path), tmp_path / "native", lambda stage, done: None)


def test_zeros_that_int8_has_not_are_refused_by_name(tmp_path: Path) -> None:
    save("gptq, 8 bits", tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors["model.layers.0.mlp.up_proj.qzeros"] += 1
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(
        UnsupportedModelError, match=r"tensor model\.layers\.0\.mlp\.up_proj\.qweight has 8 bits and zero"
    ):
        open_source(tmp_path).rows("model.layers.0.mlp.up_proj.weight")


Tensor = dict[str, torch.Tensor]
DOWN = "model.layers.1.mlp.down_proj"


def set_option(**values: Any) -> Callable[[dict[str, Any], Tensor], object]:
    return lambda config, tensors: config.update(values)


def set_tensor(part: str, edit: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, Any], Tensor], object]:
    name = f"{DOWN}.{part}"
    return lambda config, tensors: tensors.update({name: edit(tensors[name]).contiguous()})


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (set_option(quant_method="hqq"), UnsupportedModelError, "quant_method 'hqq' is not supported, only awq, gptq"),
        (set_option(quant_method={}), UnsupportedModelError, "quant_method {} is not supported, only awq, gptq"),
        (set_option(bits=3), UnsupportedModelError, "bits 3 is not supported, only 4, 8"),
        (set_option(checkpoint_format="marlin"), UnsupportedModelError, "checkpoint_format 'marlin' is not supported"),
        (set_option(group_size=0), UnsupportedModelError, "group_size 0 is not supported"),
        (set_option(group_size=16), UnsupportedModelError, "with groups of 16 is not supported"),
        (set_option(group_size=64), SourceError, "qzeros has shape [4, 16], expected [2, 16]"),
        (
            set_tensor("qweight", lambda t: t[:-1]),
            SourceError,
            f"{DOWN}.qweight has shape [15, 128], expected [16, 128]",
        ),
        (
            set_tensor("qweight", lambda t: t.float()),
            UnsupportedModelError,
            f"{DOWN}.qweight is F32; supported are I32",
        ),
        (set_tensor("scales", lambda t: t.int()), UnsupportedModelError, f"{DOWN}.scales is I32; supported are F16"),
        (lambda config, tensors: tensors.pop(f"{DOWN}.scales"), SourceError, f"tensor {DOWN}.scales is missing"),
        (set_tensor("g_idx", lambda t: t + 1), SourceError, f"tensor {DOWN}.g_idx has a group outside of 0..3"),
        (set_tensor("g_idx", lambda t: t - 1), SourceError, f"tensor {DOWN}.g_idx has a group outside of 0..3"),
        (set_tensor("g_idx", lambda t: t * 0), SourceError, f"tensor {DOWN}.g_idx has groups of different sizes"),
        (
            set_tensor("scales", lambda t: t * float("nan")),
            CheckpointError,
            f"tensor {DOWN}.scales has numbers that are inf",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    tmp_path: Path, edit: Callable[[dict[str, Any], Tensor], object], error: type[CheckpointError], message: str
) -> None:
    save("gptq, asym", tmp_path)
    path, config_path = tmp_path / "model.safetensors", tmp_path / "config.json"
    tensors, config = safetensors.torch.load_file(path), json.loads(config_path.read_text())
    edit(config["quantization_config"], tensors)
    safetensors.torch.save_file(tensors, path)
    config_path.write_text(json.dumps(config))
    (tmp_path / "native").mkdir()
    with pytest.raises(error) as caught:
        convert_checkpoint(open_source(tmp_path), tmp_path / "native", lambda stage, done: None)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**AWQ_CONFIG, "version": "gemv"}, "version 'gemv' is not supported, only 'gemm', 'GEMM'"),
        ({**AWQ_CONFIG, "zero_point": "no"}, "zero_point 'no' is not supported, only True, False"),
        (
            {**GPTQ_CONFIG, "dynamic": {"-:.*down.*": {}, "lm_head": {"bits": 3, "group_size": 32}}},
            "dynamic 'lm_head': bits 3 is not supported, only 4, 8",
        ),
        ({**GPTQ_CONFIG, "dynamic": {"(a+)+$": {"bits": 8}}}, "the pattern '^(?:(a+)+$)' of names is not supported"),
        ({**GPTQ_CONFIG, "dynamic": {"(": {"bits": 8}}}, "the pattern '^(?:()' of names is not supported"),
        ({**GPTQ_CONFIG, "dynamic": {"a": 8}}, "dynamic {'a': 8} is not supported, only objects of options"),
        ({**AUTO_ROUND_CONFIG, "packing_format": "auto_round:fp8"}, "packing_format 'auto_round:fp8' is not supported"),
        ({**AUTO_ROUND_CONFIG, "data_type": "mx_fp"}, "data_type 'mx_fp' is not supported, only 'int'"),
        ({**AUTO_ROUND_CONFIG, "act_bits": 8}, "act_bits 8 is not supported, only 16"),
        ({**AUTO_ROUND_CONFIG, "bits": 2}, "bits 2 is not supported, only 4, 8"),
        ({**AUTO_ROUND_CONFIG, "bits": 8, "sym": False}, "sym False is not supported, only True"),
        ({**GPTQ_CONFIG, "bits": 8, "sym": False}, "sym False is not supported, only True"),
        (compressed_config(num_bits=8, symmetric=False), "weights: symmetric False is not supported, only True"),
        ({**AUTO_ROUND_CONFIG, "bits": True}, "bits True is not supported, only 4, 8"),
        ({**AUTO_ROUND_CONFIG, "extra_config": {DOWN_8: {"bits": 2}}}, f"extra_config '{DOWN_8}': bits 2 is not supp"),
        ({**AUTO_ROUND_CONFIG, "rotation_config": {"x": 1}}, "rotation_config {'x': 1} is not supported, only {}"),
        ({**compressed_config(), "format": "marlin-24"}, "format 'marlin-24' is not supported, only 'pack-quantized'"),
        ({**compressed_config(), "kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme {'num_bits': 8} is not supp"),
        (
            {**compressed_config(), "transform_config": {"config_groups": {"R3": {}}}},
            "transform_config {'config_groups'",
        ),
        ({**compressed_config(), "config_groups": {}}, "config_groups {} is not supported, only one group"),
        (compressed_config(num_bits=2), "weights: num_bits 2 is not supported, only 4, 8"),
        (compressed_config(symmetric="no"), "weights: symmetric 'no' is not supported, only True, False"),
        (compressed_config(type="float"), "weights: type 'float' is not supported, only 'int'"),
        (compressed_config(strategy="tensor"), "weights: strategy 'tensor' is not supported, only 'group', 'channel'"),
    ],
)
def test_unknown_options_are_refused_by_name(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    save("gptq, asym", tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": config}))
    with pytest.raises(UnsupportedModelError) as caught:
        open_source(tmp_path)
    assert message in str(caught.value)
