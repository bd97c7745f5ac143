"""Perplexity and KL divergence of quantised linears and of a KV cache, simulated in float32; the head is kept.

Of checkpoints that are there, in any format that is served (those of other quantisers too), and of methods that it
quantises with first. The last row of each has its own embedding and head, and an INT8 KV cache: what is served, as
`nibble ladder --sequence-tokens 1024` on the same text measures it in the engine.

python -m loadtest.permuted_model MODEL.gguf PERMUTED
python -m loadtest.quantization_quality PERMUTED --methods rtn sinq awq gptq awq-gptq \\
    --text wiki.test.raw --calibration TEXT
nibble quantize PERMUTED -o OUT --group-size 64 --calibration TEXT
python -m loadtest.quantization_quality PERMUTED OUT ... --text wiki.test.raw
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nibble.engine.checkpoint.native import Checkpoint, load_checkpoint
from nibble.engine.checkpoint.resolve import convert_model, is_native
from nibble.engine.checkpoint.smooth_keys import SmoothKeySource
from nibble.engine.checkpoint.source import Source, open_source
from nibble.engine.evaluate.divergence import Comparison, Quality
from nibble.engine.quantize.calibration import read_texts
from nibble.engine.quantize.decoder import KVTransform, Layer, layer_forward, read_layer, rms_norm
from nibble.engine.quantize.kv_channels import KVObserver, kv_channels
from nibble.engine.quantize.options import Method, Options
from nibble.engine.quantize.quantize import quantize
from nibble.kernels.interface import Float16Weight, Int4Weight
from nibble.kernels.pack import deinterleave_gate_up, dequantize_int4

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CALIBRATION_SEQUENCES, CALIBRATION_TOKENS = 16, 512


class Vocabulary(NamedTuple):
    """What is around the layers."""

    table: Tensor
    norm: Tensor
    head: Tensor


class Simulation:
    """The original model and a text."""

    def __init__(self, source: Source, ids: Tensor) -> None:
        """ids int64 (S, T)."""
        self._config = source.config
        self._ids = ids
        self._original = _vocabulary(source)
        self.layers = [read_layer(source, index, DEVICE) for index in range(source.config.num_layers)]
        self._reference = self._hidden(self._original.table, self.layers, (), ids)

    def quality(
        self, layers: Iterable[Layer], transforms: Sequence[KVTransform] = (), vocabulary: Vocabulary | None = None
    ) -> Quality:
        """transforms: of keys and values, one per layer. vocabulary: the original's where it is None."""
        vocabulary = vocabulary or self._original
        comparison = Comparison()
        streams = self._hidden(vocabulary.table, layers, transforms, self._ids)
        for reference, hidden, ids in zip(self._reference, streams, self._ids, strict=True):
            targets = torch.cat((ids[1:], torch.tensor([-1])))
            comparison.add(self._logits(self._original, reference), self._logits(vocabulary, hidden), targets)
        return comparison.result()

    def calibrated(self, ids: Tensor) -> list[KVTransform]:
        """INT8 by channel with ranges from other text, int64 (S, T)."""
        observers = [KVObserver(self._config, DEVICE) for _ in self.layers]
        self._hidden(self._original.table, self.layers, observers, ids)
        return [int8_per_channel(observer) for observer in observers]

    def _hidden(
        self, table: Tensor, layers: Iterable[Layer], transforms: Sequence[KVTransform], sequences: Tensor
    ) -> Tensor:
        streams = [table[row.to(DEVICE)][None] for row in sequences]
        for index, layer in enumerate(layers):
            transform = transforms[index : index + 1]
            streams = [layer_forward(layer, x, self._config, *transform) for x in streams]
        return torch.cat(streams)

    def _logits(self, vocabulary: Vocabulary, hidden: Tensor) -> Tensor:
        return rms_norm(hidden, vocabulary.norm, self._config.rms_norm_eps) @ vocabulary.head.T


def _vocabulary(source: Source) -> Vocabulary:
    head = "model.embed_tokens.weight" if source.config.tie_word_embeddings else "lm_head.weight"
    names = ("model.embed_tokens.weight", "model.norm.weight", head)
    return Vocabulary(*(torch.from_numpy(source.floats(name)).to(DEVICE) for name in names))


def native_vocabulary(checkpoint: Checkpoint) -> Vocabulary:
    """As it is stored, dequantised."""
    table = _matrix(checkpoint, "embedding")
    head = table if checkpoint.config.tie_word_embeddings else _matrix(checkpoint, "lm_head")
    return Vocabulary(table, _vector(checkpoint, "final_norm"), head)


def native_layers(checkpoint: Checkpoint) -> Iterable[Layer]:
    """The layers of a quantised checkpoint, dequantised."""
    config = checkpoint.config
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    for index in range(config.num_layers):
        prefix = f"layers.{index}"
        layer = {name: _vector(checkpoint, f"{prefix}.{name}") for name in ("attention_norm", "mlp_norm")}
        qkv = torch.split(_matrix(checkpoint, f"{prefix}.qkv"), [q, kv, kv])
        gate_up = map(torch.from_numpy, deinterleave_gate_up(_matrix(checkpoint, f"{prefix}.gate_up").cpu().numpy()))
        layer |= dict(zip(("q", "k", "v", "gate", "up"), (*qkv, *gate_up), strict=True))
        if config.attention_bias:
            biases = torch.split(_vector(checkpoint, f"{prefix}.qkv.bias"), [q, kv, kv])
            layer |= dict(zip(("q.bias", "k.bias", "v.bias"), biases, strict=True))
        if config.qk_norm:
            layer |= {name: _vector(checkpoint, f"{prefix}.{name}") for name in ("q_norm", "k_norm")}
        layer |= {name: _matrix(checkpoint, f"{prefix}.{name}") for name in ("o", "down")}
        yield {name: tensor.to(DEVICE) for name, tensor in layer.items()}


def int8_per_token(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """As `kernels/layout.py` says of KV blocks."""
    return _int8(k, k.amin(-1, keepdim=True), k.amax(-1, keepdim=True)), _int8(
        v, v.amin(-1, keepdim=True), v.amax(-1, keepdim=True)
    )


def int8_per_channel(observer: KVObserver) -> KVTransform:
    statistics = {name: values.cpu().numpy() for name, values in observer.results().items()}
    parameters = torch.from_numpy(kv_channels(statistics))[:, :, :, None].to(
        DEVICE
    )  # (kv heads, K | V, scale | zero, 1, D)

    def transform(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return _rounded(k, *parameters[:, 0].unbind(1)), _rounded(v, *parameters[:, 1].unbind(1))

    return transform


def _int8(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    zero, scale = ((low + high) / 2).half().float(), ((high - low) / 255).half().float()
    return _rounded(x, scale.clamp(min=1e-8), zero)


def _rounded(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return ((x - zero) / scale).round().clamp(-128, 127) * scale + zero


def _matrix(checkpoint: Checkpoint, name: str) -> Tensor:
    """Its columns in the order of the inputs."""
    stored = _stored_matrix(checkpoint, name)
    if name not in checkpoint.description.ordered:
        return stored
    matrix = torch.empty_like(stored)
    matrix[:, torch.from_numpy(checkpoint.array(f"{name}.order").astype(np.int64))] = stored
    return matrix


def _stored_matrix(checkpoint: Checkpoint, name: str) -> Tensor:
    weight = checkpoint.linear(name)
    if isinstance(weight, Int4Weight):
        shape = (weight.out_features, weight.in_features, weight.group_size)
        return torch.from_numpy(dequantize_int4(weight.packed, *shape)).to(DEVICE)
    if isinstance(weight, Float16Weight):
        return torch.from_numpy(weight.values.astype(np.float32)).to(DEVICE)
    scales = np.repeat(weight.scales.astype(np.float32), weight.group_size, axis=1)
    return torch.from_numpy(weight.values * scales).to(DEVICE)


def _vector(checkpoint: Checkpoint, name: str) -> Tensor:
    return torch.from_numpy(checkpoint.array(name).copy()).to(DEVICE)


def token_ids(source: Source, text: Path, num_sequences: int, length: int) -> Tensor:
    """The first sequences of a text, at most so many, int64 (S, T)."""
    from tokenizers import Tokenizer

    with TemporaryDirectory() as directory:
        source.write_tokenizer(Path(directory))
        tokenizer = Tokenizer.from_file(str(Path(directory) / "tokenizer.json"))
    ids = tokenizer.encode("\n".join(read_texts(text)), add_special_tokens=False).ids
    num_sequences = min(num_sequences, len(ids) // length)
    return torch.tensor(ids[: num_sequences * length]).view(num_sequences, length)


def _print(name: str, quality: Quality) -> None:
    numbers = f"{quality.perplexity:9.3f} {quality.mean_kl:9.5f} {quality.p99_kl:8.4f} {quality.top1_agreement:7.4f}"
    print(f"{name:50} {numbers}")  # noqa: T201 - a command's output


def _print_checkpoint(name: str, simulation: Simulation, path: Path) -> None:
    checkpoint = load_checkpoint(path)
    _print(name, simulation.quality(native_layers(checkpoint)))
    transforms = [int8_per_token] * checkpoint.config.num_layers
    served = simulation.quality(native_layers(checkpoint), transforms, native_vocabulary(checkpoint))
    _print(f"{name}, as served with an INT8 KV cache", served)


def _print_converted(path: Path, simulation: Simulation) -> None:
    if is_native(path):
        return _print_checkpoint(path.name, simulation, path)
    with TemporaryDirectory() as directory:
        native = Path(directory) / "native"
        convert_model(path, native, lambda stage, done: None)
        _print_checkpoint(path.name, simulation, native)


def _print_method(method: Method, simulation: Simulation, arguments: argparse.Namespace) -> None:
    with TemporaryDirectory() as directory:
        out = Path(directory) / method
        start_s = time.perf_counter()
        options = Options(method, arguments.group_size, arguments.calibration)
        quantize(arguments.model, out, options, lambda stage, done: None)
        _print_checkpoint(f"{method} ({time.perf_counter() - start_s:.0f} s)", simulation, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("quantized", type=Path, nargs="*")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, help="for the ranges of a KV cache by channel, and for --methods")
    parser.add_argument("--methods", type=Method, choices=list(Method), nargs="*", default=[])
    parser.add_argument("--group-size", type=int, default=64, help="of --methods")
    parser.add_argument("--num-sequences", type=int, default=6)
    parser.add_argument("--sequence-tokens", type=int, default=1024)
    arguments = parser.parse_args()
    source = SmoothKeySource(open_source(arguments.model))  # the keys that are served
    with torch.inference_mode():
        ids = token_ids(source, arguments.text, arguments.num_sequences, arguments.sequence_tokens)
        simulation = Simulation(source, ids)
        print(f"{'':50} {'ppl':>9} {'KL':>9} {'99 %':>8} {'top-1':>7}")  # noqa: T201 - a command's output
        _print("original", simulation.quality(simulation.layers))
        transforms = [int8_per_token] * source.config.num_layers
        _print("INT8 KV cache, per token", simulation.quality(simulation.layers, transforms))
        if arguments.calibration is not None:
            calibration = token_ids(source, arguments.calibration, CALIBRATION_SEQUENCES, CALIBRATION_TOKENS)
            _print(
                "INT8 KV cache, per channel", simulation.quality(simulation.layers, simulation.calibrated(calibration))
            )
        for path in arguments.quantized:
            _print_converted(path, simulation)
        for method in arguments.methods:
            _print_method(method, simulation, arguments)


if __name__ == "__main__":
    main()
