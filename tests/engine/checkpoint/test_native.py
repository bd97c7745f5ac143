from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from tiny_models import make_tiny_llama

from nibble.engine.checkpoint.errors import NativeFormatError, SafetensorsError
from nibble.engine.checkpoint.native import METADATA_KEY, WEIGHTS_FILE, load_checkpoint, write_checkpoint
from nibble.engine.checkpoint.safetensors_file import SafetensorsFile, write_safetensors
from nibble.engine.checkpoint.schema import Description, LinearFormat, TensorSpec, tensor_specs
from nibble.engine.model_config import ModelConfig, RopeConfig
from nibble.kernels.interface import Int4Weight, Int8Weight
from nibble.kernels.layout import KVLayout


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One with everything: odd head counts, biases, INT8 linears, an untied head, rope divisors."""
    path = tmp_path_factory.mktemp("native")
    make_tiny_llama(
        path, num_heads=5, num_kv_heads=5, head_dim=32, tied=False, attention_bias=True, int8_linears=True,
        rope=RopeConfig(theta=5e5, frequency_divisors=tuple(1.0 + i for i in range(16))),
    )  # fmt: skip
    return path


def test_linears_and_configuration_come_back(directory: Path) -> None:
    checkpoint = load_checkpoint(directory)
    config = checkpoint.config
    assert (config.num_heads, config.attention_bias, config.tie_word_embeddings) == (5, True, False)
    assert config.rope.frequency_divisors == tuple(1.0 + i for i in range(16))
    qkv, o, head = (checkpoint.linear(name) for name in ("layers.1.qkv", "layers.0.o", "lm_head"))
    assert isinstance(qkv, Int8Weight)
    assert (qkv.out_features, qkv.in_features, qkv.group_size) == (480, 64, 32)
    assert isinstance(o, Int4Weight)
    assert (o.out_features, o.in_features, o.group_size) == (64, 160, 32)
    assert isinstance(head, Int8Weight)
    assert head.group_size == 64
    assert checkpoint.has("layers.0.qkv.bias")
    assert not checkpoint.has("layers.0.o.bias")
    assert not [name for name in checkpoint.names if name.startswith("padding")]
    for name in checkpoint.names:
        assert checkpoint.array(name).ctypes.data % 64 == 0


def test_a_round_trip_keeps_every_byte(directory: Path, tmp_path: Path) -> None:
    first = load_checkpoint(directory)
    description = described(directory)
    arrays = [(name, first.array(name)) for name in first.names]
    write_checkpoint(tmp_path, first.config, arrays, int4=description.int4, int8=description.int8)
    assert (tmp_path / WEIGHTS_FILE).read_bytes() == (directory / WEIGHTS_FILE).read_bytes()


def test_the_twin_has_the_checkpoints_numbers(directory: Path, tmp_path: Path) -> None:
    """make_tiny_llama's two halves are one model: changing one stored scale changes the logits."""
    model = make_tiny_llama(tmp_path, tied=True)
    ids = torch.arange(10)[None]
    with torch.inference_mode():
        logits = model(ids).logits
    again = make_tiny_llama(tmp_path, tied=True)
    other = make_tiny_llama(tmp_path, tied=True, seed=1)
    with torch.inference_mode():
        torch.testing.assert_close(again(ids).logits, logits, rtol=0, atol=0)
        assert (other(ids).logits - logits).abs().max() > 0.1
    assert 0.3 < logits.std() < 5


def described(directory: Path) -> Description:
    text = SafetensorsFile(directory / WEIGHTS_FILE).metadata[METADATA_KEY]
    return msgspec.json.decode(text, type=Description)


Specs = dict[str, TensorSpec]


def rewrite(
    source: Path,
    target: Path,
    edit_description: Callable[[dict[str, Any]], None] = lambda description: None,
    edit_specs: Callable[[Specs], None] = lambda specs: None,
) -> None:
    """Write `target` with a changed description or other tensors, all zeros."""
    description = msgspec.json.decode(SafetensorsFile(source / WEIGHTS_FILE).metadata[METADATA_KEY])
    specs = dict(tensor_specs(described(source)))
    edit_description(description)
    edit_specs(specs)
    dtypes = {"F32": np.float32, "F16": np.float16, "U8": np.uint8, "I8": np.int8}
    arrays = ((name, np.zeros(spec.shape, dtypes[spec.dtype])) for name, spec in specs.items())
    metadata = {METADATA_KEY: msgspec.json.encode(description).decode()} if description else {}
    write_safetensors(target / WEIGHTS_FILE, specs, metadata, arrays)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda specs: specs.pop("layers.1.down"), "tensor layers.1.down is missing, expected U8 [5120]"),
        (
            lambda specs: specs.update({"final_norm": TensorSpec("F32", (65,))}),
            "tensor final_norm is F32 [65], expected F32 [64]",
        ),
        (
            lambda specs: specs.update({"embedding.scales": TensorSpec("F32", (300, 2))}),
            "tensor embedding.scales is F32 [300, 2], expected F16 [300, 2]",
        ),
        (
            lambda specs: specs.update({"layers.2.down": TensorSpec("U8", (4,))}),
            "tensor layers.2.down is not part of this model",
        ),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(
    directory: Path, tmp_path: Path, edit: Callable[[Specs], None], message: str
) -> None:
    rewrite(directory, tmp_path, edit_specs=edit)
    with pytest.raises(NativeFormatError) as caught:
        load_checkpoint(tmp_path)
    assert message in str(caught.value)


def set_config(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda description: description["config"].update(values)


def set_linear(name: str, **values: int) -> Callable[[dict[str, Any]], None]:
    return lambda description: description["int4" if name in description["int4"] else "int8"][name].update(values)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d.clear(), "no 'nibble' entry: not a native checkpoint"),
        (lambda d: d.update(format_version=2), "native format version 2, this release reads 1"),
        (lambda d: d.pop("int8"), "missing required field `int8`"),
        (lambda d: d["config"].update(num_heads="5"), "Expected `int`, got `str` - at `$.config.num_heads`"),
        (set_config(num_layers=1 << 30), "configuration: num_layers is 1073741824, expected 1 to 16384"),
        (set_config(num_layers=3), "linears are described, expected 14 for 3 layers"),
        (set_config(hidden_size=0), "configuration: hidden_size is 0"),
        (set_config(num_kv_heads=2), "num_heads 5 is not a multiple of num_kv_heads 2"),
        (set_config(head_dim=33), "head_dim 33 is not a multiple of 32 up to 256"),
        (set_config(intermediate_size=127), "intermediate_size 127 is not a multiple of 8"),
        (set_config(eos_token_ids=[300]), "special token id 300 is not in the vocabulary of 300"),
        (set_config(bos_token_id=-1), "special token id -1"),
        (set_config(rms_norm_eps=0.0), "rms_norm_eps is 0.0"),
        (set_config(rope={"frequency_divisors": [1.0]}), "1 rope frequency divisors, expected 16"),
        (set_config(rope={"theta": -1.0}), "rope has the number -1.0"),
        (set_linear("layers.0.o", group_size=16), "layers.0.o: INT4 group size 16, expected one of (32, 64, 128)"),
        (set_linear("layers.0.o", group_size=64), "divides 160"),
        (set_linear("layers.0.o", out_features=63), "layers.0.o: is 63 x 160, expected 64 x 160"),
        (set_linear("lm_head", group_size=0), "lm_head: group size 0 does not divide 64"),
        (lambda d: d["int8"].update({"x": d["int8"].pop("lm_head")}), "x: the model has no such linear"),
        (lambda d: d["int4"].update({"lm_head": d["int8"].pop("lm_head")}), "lm_head: must be INT8 or float16"),
        (lambda d: d.update(ordered=["lm_head"]), "lm_head: no such linear can have an order"),
        (
            lambda d: (d["int8"].update({"layers.0.o": d["int4"]["layers.0.o"]}), d["int4"].pop("layers.1.down")),
            "layers.0.o: described twice",
        ),
    ],
)
def test_a_description_that_contradicts_itself_is_refused(
    directory: Path, tmp_path: Path, edit: Callable[[dict[str, Any]], None], message: str
) -> None:
    rewrite(directory, tmp_path, edit_description=edit)
    with pytest.raises(NativeFormatError) as caught:
        load_checkpoint(tmp_path)
    assert message in str(caught.value)


@pytest.mark.parametrize("order", [[0] * 160, list(range(1, 161)), [-1, *range(159)]])
def test_an_order_that_is_none_is_refused(directory: Path, tmp_path: Path, order: list[int]) -> None:
    """Kernels read where it says."""
    checkpoint, description = load_checkpoint(directory), described(directory)
    arrays = [(name, checkpoint.array(name)) for name in checkpoint.names]
    arrays.append(("layers.0.o.order", np.array(order, np.int32)))
    write_checkpoint(
        tmp_path,
        checkpoint.config,
        arrays,
        int4=description.int4,
        int8=description.int8,
        ordered=["layers.0.o"],
    )
    with pytest.raises(NativeFormatError, match=r"tensor layers\.0\.o\.order is not an order of 160 columns"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ((0, 1, 1, 5), np.nan, "numbers that are infinite or NaN"),
        ((0, 0, 0, 5), np.inf, "numbers that are infinite or NaN"),
        ((0, 1, 0, 5), 0.0, "a scale of 0.0, expected more than 0"),
        ((0, 0, 0, 7), -0.5, "a scale of -0.5, expected more than 0"),
    ],
)
def test_channels_that_are_none_are_refused(
    directory: Path, tmp_path: Path, place: tuple[int, ...], value: float, message: str
) -> None:
    checkpoint, description = load_checkpoint(directory), described(directory)
    arrays = [(name, checkpoint.array(name)) for name in checkpoint.names]
    layout = KVLayout(checkpoint.config.num_kv_heads, checkpoint.config.head_dim)
    channels = [np.ones(layout.channels_shape, np.float32) for _ in range(checkpoint.config.num_layers)]
    channels[-1][place] = value
    arrays += [(f"layers.{index}.kv_channels", each) for index, each in enumerate(channels)]
    write_checkpoint(
        tmp_path, checkpoint.config, arrays, int4=description.int4, int8=description.int8, has_kv_channels=True
    )
    with pytest.raises(NativeFormatError, match=re.escape(f"layers.{len(channels) - 1}.kv_channels has {message}")):
        load_checkpoint(tmp_path)


def test_writing_formats_that_do_not_fit_the_model_is_refused(tmp_path: Path) -> None:
    config = ModelConfig(
        architecture="llama", vocab_size=8, hidden_size=32, intermediate_size=32, num_layers=1, num_heads=1,
        num_kv_heads=1, head_dim=32, max_context_tokens=64, rms_norm_eps=1e-5, tie_word_embeddings=True,
    )  # fmt: skip
    with pytest.raises(NativeFormatError, match="1 linears are described, expected 5 for 1 layers"):
        write_checkpoint(tmp_path, config, [], int4={}, int8={"embedding": LinearFormat(8, 32, 32)})


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SafetensorsError, match=r"model\.safetensors: cannot be read: No such file"):
        load_checkpoint(tmp_path)
