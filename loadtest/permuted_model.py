"""A model with its channels in a random order: the same function, but no longer on the grid of a 4-bit file.

For measuring a quantiser without unquantised weights at hand: those of a GGUF file lie on its groups' grids, which a
quantiser with the same groups would find again. Permuting the residual stream, the MLP's neurons and each head's values
changes nothing that the model computes and takes every group apart.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from nibble.engine.checkpoint.hf_config import write_hf_config
from nibble.engine.checkpoint.safetensors_file import write_safetensors
from nibble.engine.checkpoint.schema import TensorSpec
from nibble.engine.checkpoint.source import Floats, Source, open_source, tensor_shapes

Order = npt.NDArray[np.intp]


def write_permuted(source: Source, directory: Path, seed: int = 0) -> None:
    """A Hugging Face directory, weights in float32. The order is that of a seed and of a version of NumPy."""
    directory.mkdir(parents=True)
    specs = {name: TensorSpec("F32", shape) for name, shape in tensor_shapes(source.config).items()}
    write_safetensors(directory / "model.safetensors", specs, {"format": "pt"}, _permuted(source, seed))
    write_hf_config(directory, source.config)
    source.write_tokenizer(directory)


def _permuted(source: Source, seed: int) -> Iterator[tuple[str, Floats]]:
    config, rng = source.config, np.random.default_rng(seed)
    hidden = rng.permutation(config.hidden_size)
    neurons = [rng.permutation(config.intermediate_size) for _ in range(config.num_layers)]
    values = [_value_orders(rng, config.num_kv_heads, config.head_dim) for _ in range(config.num_layers)]
    group = config.num_heads // config.num_kv_heads
    for name in tensor_shapes(config):
        w = source.floats(name)
        parts = name.split(".")
        if "layers" not in parts:
            yield name, np.ascontiguousarray(w[..., hidden])
            continue
        layer = int(parts[2])
        rows, columns = _axes(parts[-2], hidden, neurons[layer], values[layer], group)
        is_bias = parts[-1] == "bias"
        w = w if rows is None else w[rows]
        yield name, np.ascontiguousarray(w if columns is None or is_bias else w[..., columns])


def _axes(
    part: str, hidden: Order, neurons: Order, values: list[Order], group: int
) -> tuple[Order | None, Order | None]:
    """The orders of a tensor's rows and of its columns."""
    size = len(values[0])
    per_kv_head = np.concatenate([head * size + order for head, order in enumerate(values)])
    per_head = np.concatenate([head * size + values[head // group] for head in range(group * len(values))])
    return {
        "input_layernorm": (hidden, None),
        "post_attention_layernorm": (hidden, None),
        "q_proj": (None, hidden),
        "k_proj": (None, hidden),
        "v_proj": (per_kv_head, hidden),
        "o_proj": (hidden, per_head),
        "gate_proj": (neurons, hidden),
        "up_proj": (neurons, hidden),
        "down_proj": (hidden, neurons),
    }.get(part, (None, None))


def _value_orders(rng: np.random.Generator, num_kv_heads: int, head_dim: int) -> list[Order]:
    return [rng.permutation(head_dim) for _ in range(num_kv_heads)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path, help="a directory that does not exist")
    arguments = parser.parse_args()
    write_permuted(open_source(arguments.model), arguments.output)


if __name__ == "__main__":
    main()
