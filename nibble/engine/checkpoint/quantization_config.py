"""What a Hugging Face model says of how its linears are quantised, as one of the ways of `packed_linears.py`.

In config.json under `quantization_config`, or in quantize_config.json beside it. What is not known is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nibble.engine.checkpoint.errors import UnsupportedModelError
from nibble.engine.checkpoint.hf_metadata import read_json
from nibble.engine.checkpoint.packed_linears import AWQ, GPTQ, CompressedTensors, Packing

LEGACY_FILE = "quantize_config.json"
HEAD = "lm_head"
_BITS = (4, 8)
_UNQUANTIZED_BITS = 16  # and more: what AutoRound says of a linear that is left as it was
_GPTQ_FORMATS = {"gptq": 1, "gptq_v2": 0}  # what is added to stored zeros
_AUTO_ROUND_GPTQ_FORMATS = {"auto_round:auto_gptq": 1, "auto_round:gptq": 1, "auto_round:gptqmodel": 0, "auto_round": 0}
_AUTO_ROUND_AWQ_FORMATS = ("auto_round:auto_awq", "auto_round:awq")
_MAX_PATTERN_LENGTH, _MAX_REPETITIONS = 200, 4  # of an expression for names: with more, matching might not end
_LINEAR_NAME = re.compile(rf"{HEAD}|model\.layers\.\d+\.\w+\.\w+")
_NESTED_REPETITION = re.compile(r"\)[*+?{]|\\\d")


@dataclass(frozen=True)
class Rule:
    """packing None: linears whose names match are not quantised."""

    pattern: re.Pattern[str]
    packing: Packing | None


@dataclass(frozen=True)
class Quantization:
    """Of all linears; a rule counts before those behind it, and before `packing`, that of the layers."""

    packing: Packing
    rules: tuple[Rule, ...] = ()

    def stated(self, linear: str) -> Packing | None:
        """How a linear (named without `.weight`) is packed, going by the configuration alone; None: it is not."""
        rule = self._rule(linear)
        if rule is not None:
            return rule.packing
        return self.packing if linear.startswith("model.layers.") else None

    def of_packed(self, linear: str) -> Packing:
        """How one is packed of which it is known that it is."""
        rule = self._rule(linear)
        return self.packing if rule is None or rule.packing is None else rule.packing

    def _rule(self, linear: str) -> Rule | None:
        return next((rule for rule in self.rules if rule.pattern.search(linear)), None)


def read_quantization(directory: Path) -> Quantization | None:
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
    readers = {"awq": _awq, "gptq": _gptq, "auto-round": _auto_round, "compressed-tensors": _compressed_tensors}
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
        value = self.values.get(key)
        if not any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in allowed):
            raise self.refusal(key, ", ".join(repr(value) for value in allowed if value is not None) or "none")

    def group_size(self) -> int:
        value = self.values.get("group_size")
        if not isinstance(value, int) or isinstance(value, bool) or (value < 1 and value != -1):
            raise self.refusal("group_size", "a positive number or -1")
        return value

    def names(self, key: str) -> Iterator[str]:
        values = self.values.get(key) or []
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise self.refusal(key, "a list of names")
        yield from values

    def changed(self, key: str) -> Iterator[tuple[str, _Options]]:
        """Of an object of objects: what each of them overrides, the others as they are here."""
        values = self.values.get(key) or {}
        if not isinstance(values, dict):
            raise self.refusal(key, "an object")
        for name, changes in values.items():
            if not isinstance(changes, dict | None):
                raise self.refusal(key, "objects of options")
            yield name, _Options({**self.values, **(changes or {})}, f"{self.source}: {key} {name[:80]!r}")

    def pattern(self, expression: str) -> re.Pattern[str]:
        """Of names. Raises UnsupportedModelError for one that could take for ever."""
        repetitions = len(re.findall(r"[*+{?]", expression))
        if len(expression) <= _MAX_PATTERN_LENGTH and repetitions <= _MAX_REPETITIONS:
            try:
                if not _NESTED_REPETITION.search(expression):
                    return re.compile(expression)
            except (re.error, OverflowError, RecursionError):
                pass
        raise UnsupportedModelError(f"{self.source}: the pattern {expression[:80]!r} of names is not supported")


def _awq(options: _Options) -> Quantization:
    values = dict(options.values)
    for old, new in (("w_bit", "bits"), ("q_group_size", "group_size")):
        values.setdefault(new, values.get(old))
    options = _Options(values, options.source)
    options.require("bits", 4)
    options.require("version", "gemm", "GEMM", None)
    options.require("zero_point", True, False, None)  # zeros are stored either way
    left_out = tuple(Rule(re.compile(re.escape(name)), None) for name in options.names("modules_to_not_convert"))
    return Quantization(AWQ(options.group_size()), left_out)


def _gptq(options: _Options) -> Quantization:
    options.require("checkpoint_format", *_GPTQ_FORMATS, None)
    zero_offset = _GPTQ_FORMATS[options.values.get("checkpoint_format") or "gptq"]
    rules = []
    for expression, linears in options.changed("dynamic"):  # GPTQModel's: -: of linears that are not quantised
        packing = None if expression.startswith("-:") else _gptq_packing(linears, zero_offset)
        pattern = options.pattern(f"^(?:{expression.removeprefix('-:').removeprefix('+:')})")
        rules.append(Rule(pattern, packing))
    packing = _gptq_packing(options, zero_offset)
    if options.values.get("lm_head"):
        rules.append(Rule(_exactly(HEAD), packing))
    return Quantization(packing, tuple(rules))


def _gptq_packing(options: _Options, zero_offset: int) -> Packing:
    _require_bits(options, "bits", "sym")
    group_size = options.group_size()
    has_order = options.values.get("desc_act") is True and options.values.get("static_groups") is not True
    return GPTQ(group_size, zero_offset, options.values["bits"], is_reordered=has_order and group_size != -1)


def _auto_round(options: _Options) -> Quantization:
    """`extra_config` has other options for linears by name, or by an expression that is found in it."""
    formats = (*_AUTO_ROUND_GPTQ_FORMATS, *_AUTO_ROUND_AWQ_FORMATS)
    options.require("packing_format", *formats, None)
    options.require("rotation_config", None, {})
    rules = []
    extra = sorted(options.changed("extra_config"), key=lambda item: _LINEAR_NAME.fullmatch(item[0]) is None)
    for name, linears in extra:  # whole names come before expressions
        pattern = _exactly(name) if _LINEAR_NAME.fullmatch(name) else options.pattern(name)
        rules.append(Rule(pattern, _auto_round_packing(linears)))
    rules += [Rule(options.pattern(name), None) for name in options.names("modules_to_not_convert")]
    packing = _auto_round_packing(options)
    if packing is None:
        raise options.refusal("bits", ", ".join(map(str, _BITS)))
    return Quantization(packing, tuple(rules))


def _auto_round_packing(options: _Options) -> Packing | None:
    for key in ("act_bits", "super_bits"):
        value = options.values.get(key)
        if value is not None and not (isinstance(value, int) and value >= _UNQUANTIZED_BITS):
            raise options.refusal(key, str(_UNQUANTIZED_BITS))
    bits = options.values.get("bits")
    if isinstance(bits, int) and bits >= _UNQUANTIZED_BITS:
        return None
    options.require("data_type", "int", None)
    packing_format = options.values.get("packing_format") or "auto_round:auto_gptq"
    if packing_format in _AUTO_ROUND_AWQ_FORMATS:
        options.require("bits", 4)
        return AWQ(options.group_size())
    _require_bits(options, "bits", "sym")
    return GPTQ(options.group_size(), _AUTO_ROUND_GPTQ_FORMATS[packing_format], options.values["bits"])


def _compressed_tensors(options: _Options) -> Quantization:
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
    packing = _compressed_packing(_Options(group["weights"], f"{scheme.source}.weights"))
    ignored = [Rule(_compressed_pattern(options, each), None) for each in options.names("ignore")]
    return Quantization(packing, tuple(ignored))


def _compressed_pattern(options: _Options, name: str) -> re.Pattern[str]:
    if name.startswith("re:"):
        return options.pattern(f"^(?:{name.removeprefix('re:')})")
    return _exactly(name)


def _compressed_packing(weights: _Options) -> Packing:
    _require_bits(weights, "num_bits", "symmetric")
    weights.require("type", "int", None)
    weights.require("strategy", "group", "channel")
    weights.require("dynamic", False, None)
    weights.require("actorder", "group", "weight", "static", "dynamic", True, False, None)
    weights.require("symmetric", True, False, None)
    is_symmetric = weights.values.get("symmetric") is not False
    group_size = -1 if weights.values["strategy"] == "channel" else weights.group_size()
    is_reordered = weights.values.get("actorder") in ("group", "dynamic", True) and group_size != -1
    return CompressedTensors(group_size, is_symmetric, weights.values["num_bits"], is_reordered)


def _require_bits(options: _Options, bits: str, symmetric: str) -> None:
    """INT8 has no zeros."""
    options.require(bits, *_BITS)
    if options.values[bits] == 8:
        options.require(symmetric, True, None)


def _exactly(name: str) -> re.Pattern[str]:
    return re.compile(f"^{re.escape(name)}$")
