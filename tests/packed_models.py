"""Models with linears of 4 or 8 bits in the formats of others, packed number by number after their specifications."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
from hf_models import LINEARS, save_hf_model
from transformers import PreTrainedModel

Tensors = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Quantized:
    """w[n, k] = scale[n, g] * (q[n, k] - zero[n, g]), g = group_of[k]."""

    q: npt.NDArray[np.int64]  # (N, K), 0..15 or, of 8 bits, 0..255
    scale: npt.NDArray[np.float16]  # (N, groups)
    zero: npt.NDArray[np.int64]  # (N, groups)
    group_of: npt.NDArray[np.int64]  # (K,)
    bits: int = 4

    def weights(self) -> npt.NDArray[np.float32]:
        scale, zero = self.scale.astype(np.float32)[:, self.group_of], self.zero[:, self.group_of]
        return scale * (self.q - zero).astype(np.float32)


def random_quantized(
    rng: np.random.Generator,
    shape: tuple[int, int],
    group_size: int,
    symmetric: bool,
    reordered: bool = False,
    bits: int = 4,
) -> Quantized:
    """Half of the scales are negative, as AutoRound writes them."""
    num_rows, num_columns = shape
    num_groups = num_columns // group_size
    group_of = np.arange(num_columns) // group_size
    middle = 1 << bits - 1
    sizes = rng.uniform(0.5, 1.5, (num_rows, num_groups)) * 1.6 / middle / num_columns**0.5
    return Quantized(
        q=rng.integers(0, 2 * middle, shape),
        scale=(sizes * rng.choice([-1, 1], sizes.shape)).astype(np.float16),
        zero=np.full(sizes.shape, middle) if symmetric else rng.integers(middle // 2, middle * 3 // 2, sizes.shape),
        group_of=rng.permutation(group_of) if reordered else group_of,
        bits=bits,
    )


def words(
    numbers: npt.NDArray[np.int64], bits: int = 4, places: tuple[int, ...] | None = None
) -> npt.NDArray[np.int32]:
    """Along the last axis, 32 / bits numbers a word: those from bits * i on are the one at places[i]."""
    per_word = 32 // bits
    packed = np.zeros((*numbers.shape[:-1], numbers.shape[-1] // per_word), np.uint32)
    for i, place in enumerate(places or range(per_word)):
        packed |= numbers[..., place::per_word].astype(np.uint32) << np.uint32(bits * i)
    return packed.view(np.int32)


def awq(quantized: Quantized) -> Tensors:
    places = (0, 2, 4, 6, 1, 3, 5, 7)
    return {
        "qweight": words(quantized.q.T, 4, places),
        "qzeros": words(quantized.zero.T, 4, places),
        "scales": quantized.scale.T,
    }


def gptq(quantized: Quantized, zero_offset: int = 1) -> Tensors:
    return {
        "qweight": words(quantized.q, quantized.bits).T,
        "qzeros": words((quantized.zero.T - zero_offset) % (1 << quantized.bits), quantized.bits),
        "scales": quantized.scale.T,
        "g_idx": quantized.group_of.astype(np.int32),
    }


def gptq_v2(quantized: Quantized) -> Tensors:
    return gptq(quantized, zero_offset=0)


def gptq_without_order(quantized: Quantized) -> Tensors:
    """As AutoRound writes them."""
    return {name: array for name, array in gptq(quantized).items() if name != "g_idx"}


def compressed_tensors(quantized: Quantized) -> Tensors:
    """Symmetric in order, or with zero points and groups of columns."""
    tensors = {
        "weight_packed": words(quantized.q, quantized.bits),
        "weight_scale": quantized.scale,
        "weight_shape": np.array(quantized.q.shape, np.int64),
    }
    if (quantized.zero != 1 << quantized.bits - 1).any():
        tensors["weight_zero_point"] = words(quantized.zero.T, quantized.bits).T
    if (np.diff(quantized.group_of) < 0).any():
        tensors["weight_g_idx"] = quantized.group_of.astype(np.int32)
    return tensors


def save_packed_model(
    model: PreTrainedModel,
    directory: Path,
    pack: Callable[[Quantized], Tensors],
    config: Mapping[str, Any],
    *,
    group_size: int,
    symmetric: bool,
    reordered: bool = False,
    bits: Callable[[str], int] = lambda linear: 4,
) -> dict[str, Quantized]:
    """Random linears packed in `directory`, and the same in the model. Linears of one input have one order.

    bits: of a linear by its name, 16 for those that stay as they are.
    """
    save_hf_model(model, directory)
    path = directory / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    rng, orders, quantized = np.random.default_rng(0), {}, {}
    for name, parameter in model.named_parameters():
        stem = name.removesuffix(".weight")
        if not stem.endswith(LINEARS) or bits(stem) == 16:
            continue
        rows, columns = parameter.shape
        linear = random_quantized(rng, (rows, columns), group_size, symmetric, reordered, bits(stem))
        shared = stem.replace("k_proj", "q_proj").replace("v_proj", "q_proj").replace("up_proj", "gate_proj")
        linear = quantized[name] = replace(linear, group_of=orders.setdefault(shared, linear.group_of))
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(linear.weights()))
        del tensors[name]
        tensors |= {
            f"{stem}.{part}": torch.from_numpy(np.ascontiguousarray(array)) for part, array in pack(linear).items()
        }
    safetensors.torch.save_file(tensors, path)
    config_path = directory / "config.json"
    values = json.loads(config_path.read_text())
    config_path.write_text(json.dumps(values | {"quantization_config": dict(config)}))
    return quantized
