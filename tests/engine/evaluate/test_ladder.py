"""The ladder from end to end, on a tiny model, through the CPU backend."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from gguf_files import TinyGGUF, write_tiny_gguf
from hf_models import VOCAB_SIZE, random_hf_model, save_hf_model
from model_logits import kl_divergence, transformers_logits
from tiny_models import dequantized_linear

from nibble.engine.checkpoint.errors import SourceError
from nibble.engine.checkpoint.native import load_checkpoint
from nibble.engine.evaluate.checkpoints import Pair, make_pair
from nibble.engine.evaluate.ladder import Measures, Settings, measure, recommended, rungs_of
from nibble.engine.evaluate.report import Subject, cells, to_html, to_json
from nibble.engine.evaluate.sequence_logits import SequenceLogits
from nibble.engine.evaluate.speed import agreement
from nibble.engine.model import DecoderModel
from nibble.engine.quantize.options import KVScales, Method, Options
from nibble.engine.quantize.quantize import quantize
from nibble.kernels.cpu.backend import CPUKernels
from nibble.kernels.layout import BLOCK_SIZE, KVDtype
from nibble.kernels.pack import deinterleave_gate_up

SEQUENCES = np.random.default_rng(0).integers(0, VOCAB_SIZE, (2, 100)).astype(np.int32)


def silent(stage: str, done: float) -> None:
    pass


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    directory = tmp_path_factory.mktemp("ladder")
    source = save_hf_model(random_hf_model("llama"), directory / "source")
    options = Options(Method.RTN, group_size=32, num_sequences=8, sequence_tokens=128, device="cpu")
    return make_pair(source, None, directory / "cache", lambda out: quantize(source, out, options, silent), silent)


@pytest.fixture(scope="module")
def results(pair: Pair) -> list[Measures]:
    settings = Settings(generated_tokens=16, gpu_memory_bytes=2 << 30)
    return measure(rungs_of(pair), SEQUENCES, CPUKernels(), settings, silent)


def test_first_rung_is_the_reference(results: list[Measures]) -> None:
    first = results[0]
    assert (first.quality.mean_kl, first.quality.top1_agreement, first.generation_agreement) == (0.0, 1.0, 1.0)


def test_each_rung_costs_quality_and_saves_bytes(results: list[Measures]) -> None:
    reference, kv, weights, both = results
    assert 0 < kv.quality.mean_kl < weights.quality.mean_kl
    assert both.weight_bytes == weights.weight_bytes < reference.weight_bytes == kv.weight_bytes
    assert kv.kv_token_bytes == both.kv_token_bytes < 0.6 * reference.kv_token_bytes
    assert all(each.tokens_per_s_alone > 0 and each.tokens_per_s_batch > 0 for each in results)
    assert 0 < (reference.tokens_that_fit or 0) <= (both.tokens_that_fit or 0)


def test_a_cache_by_channel_is_named_and_counted(tmp_path: Path, pair: Pair, results: list[Measures]) -> None:
    source = save_hf_model(random_hf_model("llama"), tmp_path / "source")
    options = Options(Method.RTN, 32, num_sequences=8, sequence_tokens=128, device="cpu", kv=KVScales.CHANNEL)
    quantize(source, tmp_path / "out", options, silent)
    rungs = rungs_of(Pair(pair.reference, tmp_path / "out"))
    by_channel = measure(rungs, SEQUENCES, CPUKernels(), Settings(generated_tokens=8), silent)
    assert [each.name for each in by_channel] == ["fp16 + fp16", "fp16 + int8", "int4 + fp16", "int4 + int8-channel"]
    assert by_channel[3].kv_token_bytes == by_channel[2].kv_token_bytes / 2
    assert by_channel[3].kv_token_bytes < results[3].kv_token_bytes
    assert by_channel[3].quality.mean_kl == pytest.approx(by_channel[2].quality.mean_kl, rel=0.5)


def test_divergence_of_weights_is_that_of_the_dequantised_model(pair: Pair, results: list[Measures]) -> None:
    """A fp32 model of `transformers`, its linears replaced by what the checkpoint holds, says the same."""
    model = random_hf_model("llama")
    ids = SEQUENCES[0].tolist()
    expected = transformers_logits(model, ids)
    config = load_checkpoint(pair.quantized).config
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    for index, layer in enumerate(model.model.layers):
        parts = {
            name: dequantized_linear(pair.quantized, f"layers.{index}.{name}")
            for name in ("qkv", "o", "gate_up", "down")
        }
        attention, mlp = layer.self_attn, layer.mlp
        qkv = np.split(parts["qkv"], [q, q + kv])
        gate_up = deinterleave_gate_up(parts["gate_up"])
        linears = (
            attention.q_proj,
            attention.k_proj,
            attention.v_proj,
            attention.o_proj,
            mlp.gate_proj,
            mlp.up_proj,
            mlp.down_proj,
        )
        for linear, matrix in zip(linears, (*qkv, parts["o"], *gate_up, parts["down"]), strict=True):
            linear.weight.data = torch.from_numpy(np.array(matrix, np.float32))
    simulated = kl_divergence(expected, transformers_logits(model, ids)).mean()
    only_first = measure_first(pair)
    assert only_first == pytest.approx(simulated, rel=0.1)  # the head in INT8 adds some


def measure_first(pair: Pair) -> float:
    settings = Settings(generated_tokens=8)
    return measure(rungs_of(pair), SEQUENCES[:1], CPUKernels(), settings, silent)[2].quality.mean_kl


def test_recommendation_is_the_smallest_within_the_limit(results: list[Measures]) -> None:
    assert recommended(results, 1e9) is results[3]
    assert recommended(results, 0.0) is results[0]
    between = (results[1].quality.mean_kl + results[2].quality.mean_kl) / 2
    assert recommended(results, between) is results[1]


def test_report_has_all_rungs(results: list[Measures]) -> None:
    subject = Subject("tiny <model>", "tiny-w4", "a text", 2, 100, 16, "cpu")
    value = msgspec.json.decode(to_json(subject, results, results[3], 0.1))
    assert (value["model"], value["num_sequences"], value["max_mean_kl"]) == ("tiny <model>", 2, 0.1)
    assert [rung["name"] for rung in value["rungs"]] == [each.name for each in results]
    assert value["recommended"] == results[3].name
    page = to_html(subject, results, results[3], 0.1)
    assert "<model>" not in page
    for each in results:
        assert all(cell in page for cell in cells(each))
    plots = [ET.fromstring(part.partition("</svg>")[0].join(("<svg", "</svg>"))) for part in page.split("<svg")[1:]]
    assert len(plots) == 4
    assert all(len(plot.findall("rect")) == 4 for plot in plots)


def test_probe_of_short_sequences_stays_within_their_cache(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels check no slots: beyond the cache is somebody else's memory."""
    checkpoint = load_checkpoint(pair.reference)
    layout = checkpoint.description.kv_layout(KVDtype.FP16)
    model = DecoderModel(checkpoint.config, CPUKernels(), checkpoint, layout)
    written: list[int] = []
    append = CPUKernels.append_kv

    def watched(kernels: CPUKernels, qkv: Any, slots: Any, *others: Any) -> None:
        written.append(int(slots.max()))
        append(kernels, qkv, slots, *others)

    monkeypatch.setattr(CPUKernels, "append_kv", watched)
    SequenceLogits(model, 65).probe()
    assert 0 <= max(written) < 2 * BLOCK_SIZE


def test_checkpoint_of_another_model_is_refused(tmp_path: Path, pair: Pair) -> None:
    source = save_hf_model(random_hf_model("llama", num_hidden_layers=1), tmp_path / "other")
    with pytest.raises(SourceError, match="num_layers is 2, not 1"):
        make_pair(source, pair.quantized, tmp_path / "cache", lambda out: None, silent)


def test_tokens_that_fit_are_left_out_where_no_gpu_is_named(results: list[Measures]) -> None:
    assert cells(replace(results[0], tokens_that_fit=None))[8] == ""


def test_quantised_model_is_compared_with_its_own_numbers(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf", TinyGGUF(kind="Q4_1"))

    def never(out: Path) -> None:
        raise AssertionError("the model is in 4 bits already")

    pair = make_pair(path, None, tmp_path / "cache", never, silent)
    assert load_checkpoint(pair.reference).description.float16
    assert load_checkpoint(pair.quantized).description.int4
    vocabulary = load_checkpoint(pair.reference).config.vocab_size
    results = measure(rungs_of(pair), SEQUENCES[:1] % vocabulary, CPUKernels(), Settings(generated_tokens=8), silent)
    assert results[2].quality.mean_kl < 1e-3


def test_agreement_ends_at_the_first_other_token() -> None:
    assert agreement([[1, 2, 3, 4]], [[1, 2, 9, 4]]) == 0.5
    assert agreement([[1, 2], [3, 4]], [[1, 2], [9, 4]]) == 0.5
