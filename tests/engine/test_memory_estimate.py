"""What is said about memory before a start, against what is allocated at it."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from gguf_files import TinyGGUF, write_tiny_gguf
from hf_models import random_hf_model, save_hf_model

from loadtest.random_model import SHAPES
from nibble.engine.checkpoint.convert import convert_checkpoint
from nibble.engine.checkpoint.native import load_checkpoint
from nibble.engine.checkpoint.source import open_source
from nibble.engine.memory_estimate import descriptions_of, estimate, native_description, weight_bytes
from nibble.engine.model import DecoderModel
from nibble.engine.model_runner import ModelRunner
from nibble.engine.quantize.options import Method, Options
from nibble.engine.quantize.quantize import quantize
from nibble.kernels.cpu.backend import CPUKernels
from nibble.kernels.layout import KVDtype, KVLayout
from nibble.service.worker.device import CUDA_DEFAULTS

GIB = 1 << 30
LLAMA_3_8B = SHAPES["llama-3-8b"].config


def silent(stage: str, done: float) -> None:
    pass


class CountingKernels(CPUKernels):
    """Adds up what is asked for and stays."""

    num_bytes = 0

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> Any:
        array = super().zeros(shape, dtype)
        self.num_bytes += array.nbytes
        return array

    def rope_table(self, *arguments: Any) -> Any:
        table = super().rope_table(*arguments)
        self.num_bytes += table.nbytes
        return table


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_hf_model(random_hf_model("qwen2", tie_word_embeddings=True), tmp_path_factory.mktemp("source"))


def test_weights_are_those_of_the_checkpoints_that_are_made(tmp_path: Path, source: Path) -> None:
    said = descriptions_of(source, 64)
    (tmp_path / "fp16").mkdir()
    convert_checkpoint(open_source(source), tmp_path / "fp16", silent)
    quantize(source, tmp_path / "int4", Options(Method.RTN, 64, device="cpu"), silent)
    assert [load_checkpoint(tmp_path / name).description for name in ("fp16", "int4")] == list(said.values())
    checkpoint = load_checkpoint(tmp_path / "int4")
    layout = KVLayout(checkpoint.config.num_kv_heads, checkpoint.config.head_dim)
    model = DecoderModel(checkpoint.config, CPUKernels(), checkpoint, layout)
    assert model.weight_bytes == weight_bytes(checkpoint.description)


@pytest.mark.parametrize(("max_tokens", "max_verified"), [(70, 0), (70, 64), (9, 64)])
@pytest.mark.parametrize("dtype", KVDtype)
def test_buffers_and_kv_cache_are_what_a_runner_allocates(
    tmp_path: Path, source: Path, dtype: KVDtype, max_tokens: int, max_verified: int
) -> None:
    original, channels = open_source(source), None
    if dtype is KVDtype.INT8_CHANNEL:
        shape = KVLayout(original.config.num_kv_heads, original.config.head_dim, dtype).channels_shape
        channels, dtype = [np.ones(shape, np.float32)] * original.config.num_layers, KVDtype.INT8
    convert_checkpoint(original, tmp_path, silent, channels)
    checkpoint, kernels = load_checkpoint(tmp_path), CountingKernels()
    model = DecoderModel.load(kernels, checkpoint, dtype)
    memory = estimate(
        checkpoint.description,
        dtype,
        2 * GIB,
        max_num_sequences=5,
        max_num_batched_tokens=max_tokens,
        max_verified=max_verified,
    )
    runner = ModelRunner(
        kernels,
        model,
        num_blocks=memory.num_tokens // 64,
        max_sequences=5,
        max_tokens=max_tokens,
        max_verified=max_verified,
    )
    assert runner.kv_cache.nbytes == memory.kv_cache_bytes
    assert kernels.num_bytes - runner.kv_cache.nbytes == memory.buffer_bytes


def test_config_alone_suffices(tmp_path: Path, source: Path) -> None:
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    assert descriptions_of(tmp_path, 64) == descriptions_of(source, 64)


def test_quantised_model_is_planned_as_it_is(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf", TinyGGUF())
    (description,) = descriptions_of(path, 128).values()
    assert description.int4
    (tmp_path / "native").mkdir()
    convert_checkpoint(open_source(path), tmp_path / "native", silent)
    assert descriptions_of(tmp_path / "native", 128) == {"as stored": description}


def test_a_well_known_model_on_well_known_cards() -> None:
    int4, fp16 = native_description(LLAMA_3_8B, 128), native_description(LLAMA_3_8B, None)
    assert weight_bytes(fp16) / 1e9 == pytest.approx(16.06, abs=0.01)  # 8.03 billion parameters
    assert weight_bytes(int4) / GIB == pytest.approx(5.0, abs=0.3)
    assert estimate(fp16, KVDtype.INT8, 16 * GIB).num_tokens < 0
    assert estimate(fp16, KVDtype.INT8, 16 * GIB).kv_cache_bytes == 0
    small, large = estimate(int4, KVDtype.FP16, 24 * GIB), estimate(int4, KVDtype.INT8, 24 * GIB)
    assert 50_000 < small.num_tokens < large.num_tokens < 2 * small.num_tokens
    total = large.weight_bytes + large.buffer_bytes + large.reserve_bytes + large.kv_cache_bytes
    assert total <= 0.9 * 24 * GIB < total + 64 * large.kv_token_bytes


def test_no_more_tokens_than_the_sequences_can_have() -> None:
    short = msgspec.structs.replace(LLAMA_3_8B, max_context_tokens=128)
    assert estimate(native_description(short, 128), KVDtype.INT8, 80 * GIB).num_tokens == 256 * 128


def test_the_limits_are_those_of_a_cuda_worker() -> None:
    int4 = native_description(LLAMA_3_8B, 128)
    sequences, tokens = CUDA_DEFAULTS
    given = estimate(int4, KVDtype.INT8, 24 * GIB, max_num_sequences=sequences, max_num_batched_tokens=tokens)
    assert given == estimate(int4, KVDtype.INT8, 24 * GIB)


def test_the_table_of_gpu_memory_is_current() -> None:
    """`make docs` writes it."""
    page = Path(__file__).parents[2] / "docs" / "deploy.md"
    assert page.read_text() == runpy.run_path(str(page.with_name("memory_table.py")))["page"]()
