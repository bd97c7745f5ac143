"""What a Hugging Face model says of how its linears are quantised, as one of the ways of `packed_int4.py`.

In config.json under `quantization_config`, or in quantize_config.json beside it. What is not known is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nibble.engine.checkpoint.errors import UnsupportedModelError
from nibble.engine.checkpoint.hf_metadata import read_json
from nibble.engine.checkpoint.packed_int4 import AWQ, GPTQ, CompressedTensors, Packing

LEGACY_FILE = "quantize_config.json"
_GPTQ_FORMATS = {"gptq": 1, "gptq_v2": 0}  # what is added to stored zeros
_BITS = 4


def read_packing(directory: Path) -> Packing | None:
    """None for a model that is not quantised. Raises UnsupportedModelError, SourceError."""
    path = directory / "config.json"
    config = read_json(path).get("quantization_config")
    if config is None and (directory / LEGACY_FILE).is_file():
        path = directory / LEGACY_FILE
        config = {"quant_method": "gptq", **read_json(path)}
    if config is None:
        return None
    if not isinstance(config, dict):
        raise UnsupportedModelError(f"{path}: quantization_config is not an object")
    options = _Options(config, f"{path}: quantization_config")
    method = config.get("quant_method")
    readers = {"awq": _awq, "gptq": _gptq, "compressed-tensors": _compressed_tensors}
    if not isinstance(method, str) or method not in readers:
        raise options.refusal("quant_method", ", ".join(readers))
    return readers[method](options)


class _Options:
    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self.values = values
        self.source = source

    def refusal(self, key: str, supported: str) -> UnsupportedModelError:
        got = repr(self.values.get(key))[:80]
        return UnsupportedModelError(f"{self.source}: {key} {got} is not supported, only {supported}")

    def require(self, key: str, *allowed: Any) -> None:
        """Raise unless it is one of these; None stands for absent."""
        if self.values.get(key) not in allowed:
            raise self.refusal(key, ", ".join(repr(value) for value in allowed if value is not None) or "none")

    def group_size(self) -> int:
        value = self.values.get("group_size")
        if not isinstance(value, int) or isinstance(value, bool) or (value < 1 and value != -1):
            raise self.refusal("group_size", "a positive number or -1")
        return value


def _awq(options: _Options) -> Packing:
    values = dict(options.values)
    for old, new in (("w_bit", "bits"), ("q_group_size", "group_size")):
        values.setdefault(new, values.get(old))
    options = _Options(values, options.source)
    options.require("bits", _BITS)
    options.require("version", "gemm", "GEMM", None)
    options.require("zero_point", True, False, None)  # zeros are stored either way
    return AWQ(options.group_size())


def _gptq(options: _Options) -> Packing:
    options.require("bits", _BITS)
    options.require("checkpoint_format", *_GPTQ_FORMATS, None)
    _require_alike(options)
    return GPTQ(options.group_size(), _GPTQ_FORMATS[options.values.get("checkpoint_format") or "gptq"])


def _require_alike(options: _Options) -> None:
    """GPTQModel's `dynamic` has other options for linears by name, or none for those that are not quantised."""
    dynamic = options.values.get("dynamic") or {}
    if not isinstance(dynamic, dict):
        raise options.refusal("dynamic", "an object")
    for pattern, changed in dynamic.items():
        linears = _Options(changed if isinstance(changed, dict) else {}, f"{options.source}: dynamic {pattern[:80]!r}")
        for key in ("bits", "group_size"):
            linears.require(key, options.values.get(key), None)


def _compressed_tensors(options: _Options) -> Packing:
    options.require("format", "pack-quantized")
    options.require("kv_cache_scheme", None)
    sparsity = options.values.get("sparsity_config")
    if sparsity and not (isinstance(sparsity, dict) and sparsity.get("format") == "dense"):
        raise options.refusal("sparsity_config", "none")
    if options.values.get("transform_config"):  # rotations of activations at run time
        raise options.refusal("transform_config", "none")
    groups = options.values.get("config_groups")
    if not isinstance(groups, dict) or len(groups) != 1 or not isinstance(next(iter(groups.values())), dict):
        raise options.refusal("config_groups", "one group")
    ((name, group),) = groups.items()
    scheme = _Options(group, f"{options.source}: config_groups.{name}")
    for key in ("input_activations", "output_activations"):
        scheme.require(key, None)
    scheme.require("format", "pack-quantized", None)
    if not isinstance(group.get("weights"), dict):
        raise scheme.refusal("weights", "an object")
    weights = _Options(group["weights"], f"{scheme.source}.weights")
    weights.require("num_bits", _BITS)
    weights.require("type", "int", None)
    weights.require("strategy", "group", "channel")
    weights.require("dynamic", False, None)
    weights.require("actorder", "group", "weight", "static", "dynamic", True, False, None)
    symmetric = weights.values.get("symmetric", True)
    group_size = -1 if weights.values["strategy"] == "channel" else weights.group_size()
    return CompressedTensors(group_size, bool(symmetric))
