from __future__ import annotations

import logging
import tracemalloc
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from gguf_files import TinyGGUF, add_tensor, write_tiny_gguf
from tiny_models import dequantized_linear, load_as_transformers
from transformers import AutoModelForCausalLM

from nibble.engine.checkpoint.convert import convert_checkpoint
from nibble.engine.checkpoint.errors import CheckpointError, ConversionError, UnsupportedModelError
from nibble.engine.checkpoint.gguf import GGUFFile
from nibble.engine.checkpoint.native import WEIGHTS_FILE, load_checkpoint
from nibble.engine.checkpoint.source import floating_tensors, open_source
from nibble.kernels.interface import Float16Weight, Int4Weight, Int8Weight


def convert(path: Path, out_dir: Path) -> Path:
    out_dir.mkdir()
    convert_checkpoint(open_source(path), out_dir, lambda stage, done: None)
    return out_dir


def transformers_state(path: Path) -> dict[str, npt.NDArray[np.float32]]:
    """The weights as transformers' own GGUF loader understands them."""
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


LOSSLESS = {
    "Q4_1, grouped queries, tied": TinyGGUF(),
    "Q4_0, odd heads, untied": TinyGGUF(
        num_heads=3, num_kv_heads=3, hidden_size=96, kind="Q4_0", tied=False, kinds={"output.weight": "Q8_0"}
    ),
    "Q8_0, one kv head": TinyGGUF(num_heads=5, num_kv_heads=1, hidden_size=160, kind="Q8_0"),
    "Q4_0 and Q4_1 in one matrix": TinyGGUF(kinds={"token_embd.weight": "Q8_0", "attn_k.weight": "Q4_0"}),
    "Q5_0": TinyGGUF(kind="Q5_0"),
    "Q8_0 in a 4-bit matrix": TinyGGUF(kind="Q4_0", kinds={"token_embd.weight": "Q8_0", "attn_v.weight": "Q8_0"}),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSLESS)
def test_the_converted_weights_are_those_that_transformers_loads_bit_for_bit(name: str, tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf", LOSSLESS[name])
    ours = load_as_transformers(convert(path, tmp_path / "native")).state_dict()
    theirs = transformers_state(path)
    assert set(ours) == set(theirs)
    for key, weights in theirs.items():
        np.testing.assert_array_equal(ours[key].numpy(), weights, err_msg=key)


def test_4_bit_matrices_stay_4_bit_and_the_embedding_is_int8(tmp_path: Path) -> None:
    spec = TinyGGUF(kind="Q4_0", kinds={"token_embd.weight": "Q8_0", "attn_v.weight": "Q8_0", "ffn_up.weight": "Q4_1"})
    checkpoint = load_checkpoint(convert(write_tiny_gguf(tmp_path / "tiny.gguf", spec), tmp_path / "native"))
    kinds = {name: type(checkpoint.linear(f"layers.0.{name}")) for name in ("qkv", "o", "gate_up", "down")}
    assert kinds == {"qkv": Int8Weight, "o": Int4Weight, "gate_up": Int4Weight, "down": Int4Weight}
    assert isinstance(checkpoint.linear("embedding"), Int8Weight)


ARCHITECTURES = {
    "llama": TinyGGUF(),
    "qwen2": TinyGGUF(architecture="qwen2", attention_bias=True, tied=False, hidden_size=128),
    "qwen3": TinyGGUF(
        architecture="qwen3", qk_norm=True, head_dim=128
    ),  # whatever the file says, transformers takes 128
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_tensor_has_the_numbers_that_transformers_loads(architecture: str, tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf", ARCHITECTURES[architecture])
    source, theirs = open_source(path), transformers_state(path)
    assert source.config.architecture == architecture
    if source.config.tie_word_embeddings:
        del theirs["lm_head.weight"]
    ours = dict(floating_tensors(source))
    assert set(ours) == set(theirs)
    for name, values in ours.items():
        np.testing.assert_array_equal(values, theirs[name], err_msg=name)
        if values.ndim > 1:
            np.testing.assert_array_equal(source.floats(name, slice(1, 3)), values[1:3], err_msg=name)


def only(kind: str) -> TinyGGUF:
    return TinyGGUF(hidden_size=256, num_heads=8, num_kv_heads=8, intermediate_size=256, kind=kind, kinds={})


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_numbers_that_are_not_quantised_become_fp16(kind: str, tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf", only(kind))
    native = convert(path, tmp_path / "native")
    file = GGUFFile(path)
    for name, part in (("embedding", "token_embd"), ("layers.1.down", "blk.1.ffn_down")):
        assert isinstance(load_checkpoint(native).linear(name), Float16Weight)
        exact = file.dequantized(f"{part}.weight").astype(np.float16)
        np.testing.assert_array_equal(dequantized_linear(native, name), exact)


@pytest.mark.parametrize("kind", ["Q5_1", "Q5_K", "Q6_K"])
def test_other_types_are_rounded_to_int8_and_it_is_said(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf", only(kind))
    with caplog.at_level(logging.INFO):
        native = convert(path, tmp_path / "native")
    assert f"int4_linears=0 int8_linears=9 float16_linears=0 {kind}>int8:9" in caplog.text
    file = GGUFFile(path)
    for name, part in (("embedding", "token_embd"), ("layers.1.down", "blk.1.ffn_down")):
        exact = file.dequantized(f"{part}.weight")
        groups = exact.reshape(exact.shape[0], -1, 32)
        step = np.repeat(np.abs(groups).max(axis=2) / 127, 32, axis=1)
        error = np.abs(dequantized_linear(native, name) - exact)
        # half a step, and the fp16 rounding of the scale (2^-11) times up to 127 steps
        assert (error <= step * (0.5 + 127 * 2**-11) + 1e-12).all()
        assert error.max() > 0


def test_q4_k_stays_in_4_bits_within_the_rounding_of_its_scales(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf", only("Q4_K"))
    native = convert(path, tmp_path / "native")
    assert isinstance(load_checkpoint(native).linear("layers.1.down"), Int4Weight)
    exact = GGUFFile(path).dequantized("blk.1.ffn_down.weight")
    groups = np.abs(exact.reshape(exact.shape[0], -1, 32))
    # scale and minimum are rounded by 2^-11 each; their products with 0..15 cancel in part, so relative to the group
    spread = np.repeat(
        np.abs(exact.reshape(groups.shape)).max(axis=2) + np.ptp(exact.reshape(groups.shape), axis=2), 32, 1
    )
    error = np.abs(dequantized_linear(native, "layers.1.down") - exact)
    assert (error <= 7e-4 * spread).all()
    assert error.max() > 0


def test_the_demo_models_weights_are_those_that_transformers_loads(
    demo_checkpoint: Path, demo_reference: torch.nn.Module
) -> None:
    ours, theirs = load_as_transformers(demo_checkpoint).state_dict(), demo_reference.state_dict()
    assert set(ours) == set(theirs)
    for key, weights in theirs.items():
        if ".q_proj." in key or ".k_proj." in key:  # rows are multiplied by powers of two (`smooth_keys.py`)
            weights = weights * (ours[key].norm(dim=1) / weights.norm(dim=1)).log2().round().exp2()[:, None]
        assert torch.equal(ours[key], weights), key


def test_biases_are_reordered_with_their_rows(tmp_path: Path) -> None:
    """A head's rows come in rotate-half order: pairs (2i, 2i + 1) of the file are rows (i, i + D / 2)."""
    path = write_tiny_gguf(tmp_path / "tiny.gguf", TinyGGUF(attention_bias=True))
    checkpoint = load_checkpoint(convert(path, tmp_path / "native"))
    file = GGUFFile(path)
    assert checkpoint.config.attention_bias
    q, k, v = np.split(checkpoint.array("layers.1.qkv.bias"), [128, 192])
    for ours, part in ((q, "attn_q"), (k, "attn_k")):
        theirs = file.dequantized(f"blk.1.{part}.bias").reshape(-1, 16, 2)
        np.testing.assert_array_equal(ours.reshape(-1, 2, 16), theirs.swapaxes(1, 2))
    np.testing.assert_array_equal(v, file.dequantized("blk.1.attn_v.bias"))


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        (
            TinyGGUF(hidden_size=48, kind="F16", kinds={}),
            UnsupportedModelError,
            "tensor model.embed_tokens.weight has rows of 48, not a multiple of 32",
        ),
        (
            TinyGGUF(intermediate_size=104, kind="Q4_0", kinds={"token_embd": "Q8_0", "ffn_down.weight": "F16"}),
            UnsupportedModelError,
            "tensor model.layers.0.mlp.down_proj.weight has rows of 104, not a multiple of 32",
        ),
        (
            TinyGGUF(hidden_size=256, kinds={"token_embd.weight": "Q8_0", "blk.1.attn_q.weight": "Q2_K"}),
            UnsupportedModelError,
            "tensor blk.1.attn_q.weight is Q2_K; supported are F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K",
        ),
    ],
)
def test_weights_that_cannot_be_held_are_refused_before_anything_is_written(
    tmp_path: Path, spec: TinyGGUF, error: type[CheckpointError], message: str
) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf", spec)
    with pytest.raises(error) as caught:
        convert(path, tmp_path / "native")
    assert f"tiny.gguf: {message}" in str(caught.value)
    assert list((tmp_path / "native").iterdir()) == []


@pytest.mark.parametrize(
    ("tensor", "kind", "offset", "value"),
    [
        ("blk.0.attn_q.weight", "Q4_1", 0, np.float16(np.nan)),
        ("blk.0.attn_q.weight", "Q4_0", 0, np.float16(9000)),  # -8 times that is beyond fp16
        ("token_embd.weight", "Q8_0", 0, np.float16(np.inf)),
        ("blk.1.ffn_down.weight", "F32", 8, np.float32(np.nan)),
        ("blk.1.ffn_down.weight", "F32", 8, np.float32(1e30)),
        ("output_norm.weight", "F32", 8, np.float32(np.inf)),
    ],
)
def test_weights_that_are_no_numbers_are_refused_by_name(
    tmp_path: Path, tensor: str, kind: str, offset: int, value: np.generic
) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf", TinyGGUF(kind=kind))
    start = GGUFFile(path).tensor(tensor).start
    content = bytearray(path.read_bytes())
    content[start + offset : start + offset + value.nbytes] = value.tobytes()
    path.write_bytes(content)
    with pytest.raises(ConversionError, match=f"tensor {tensor} has "):
        convert(path, tmp_path / "native")


def test_only_a_part_of_the_model_is_in_memory_at_a_time(tmp_path: Path) -> None:
    spec = TinyGGUF(num_layers=24, hidden_size=256, num_heads=8, num_kv_heads=8, intermediate_size=512)
    path = write_tiny_gguf(tmp_path / "tiny.gguf", spec)
    (tmp_path / "native").mkdir()
    stages: list[tuple[str, float]] = []
    tracemalloc.start()
    try:
        convert_checkpoint(open_source(path), tmp_path / "native", lambda stage, done: stages.append((stage, done)))
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # 24 layers of 0.66 million weights; the largest step holds gate_up as one byte per weight a few times over
    assert (tmp_path / "native" / WEIGHTS_FILE).stat().st_size > 9e6
    assert peak_bytes < 4e6
    converting = [done for stage, done in stages if stage == "converting the weights"]
    assert converting == sorted(converting)
    assert (converting[0], converting[-1]) == (0.0, 1.0)


def test_a_tensor_of_an_unknown_feature_is_refused(tmp_path: Path) -> None:
    spec = TinyGGUF(edit=lambda writer: add_tensor(writer, "blk.0.attn_sinks.weight", np.ones((1, 32), "f4"), "F32"))
    with pytest.raises(UnsupportedModelError, match=r"tensor blk\.0\.attn_sinks\.weight belongs to a feature that is"):
        convert(write_tiny_gguf(tmp_path / "tiny.gguf", spec), tmp_path / "native")
