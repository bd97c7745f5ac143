"""One layer: from float32 weights and calibration streams to INT4 matrices.

Linears are quantised in the order of the forward pass, each on the inputs that it will really get: those of the layers
and linears in front of it as they were quantised. AWQ_GPTQ also has each make up for what these inputs are off by.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from nibble.engine.model_config import ModelConfig
from nibble.engine.quantize.awq import fold_layer_scales, search_layer_scales
from nibble.engine.quantize.correction import corrected, missing_output
from nibble.engine.quantize.decoder import (
    INPUTS,
    LINEARS,
    KVTransform,
    Layer,
    down_input,
    gate_up_input,
    lowered,
    o_input,
    project,
    qkv_input,
)
from nibble.engine.quantize.gptq import damped, gptq
from nibble.engine.quantize.grid import QuantizedMatrix, fitting_group_size, minmax_grid, round_to_nearest, search_grid
from nibble.engine.quantize.kv_channels import KVObserver
from nibble.engine.quantize.options import Method
from nibble.engine.quantize.refine import refined
from nibble.engine.quantize.sinq import even_layer_scales
from nibble.engine.quantize.statistics import ChannelStatistics, gram

HESSIAN_DAMPING = 0.01  # as in the GPTQ paper's code
SEARCH_TOKENS = 2048  # that AWQ's scales are judged by


@dataclass
class QuantizedLayer:
    """rest: the vectors of the layer, with the channel scales in them. scales: those, by input. statistics: what
    calibration saw, by tensor and measure (`keys.absmax`)."""

    matrices: dict[str, QuantizedMatrix]
    rest: Layer
    scales: dict[str, Tensor] = field(default_factory=dict)
    statistics: dict[str, Tensor] = field(default_factory=dict)

    def dequantized(self) -> Layer:
        return self.rest | {name: matrix.dequantized() for name, matrix in self.matrices.items()}


class Stream:
    """The residual stream of all calibration batches, and the inputs of the linears that are reached."""

    def __init__(self, batches: list[Tensor], config: ModelConfig) -> None:
        """batches: float32 (B, T, H) each."""
        self.x = batches
        self.h: list[Tensor] = []
        self._config = config

    def advance(self, layer: Layer, key: str, transform: KVTransform | None = None) -> None:
        """To the inputs `key`, the next of INPUTS."""
        config = self._config
        if key == "qkv":
            self.h = [qkv_input(layer, x, config) for x in self.x]
        elif key == "o":
            options = () if transform is None else (transform,)
            self.h = [o_input(layer, h, config, *options) for h in self.h]
        elif key == "gate_up":
            self._add(layer, "o")
            self.h = [gate_up_input(layer, x, config) for x in self.x]
        else:
            self.h = [down_input(layer, h) for h in self.h]

    def finish(self, layer: Layer) -> None:
        """To the next layer."""
        self._add(layer, "down")
        self.h = []

    def run(self, layer: Layer) -> None:
        """Through a whole layer."""
        for key in INPUTS:
            self.advance(layer, key)
        self.finish(layer)

    def _add(self, layer: Layer, name: str) -> None:
        self.x = [x + project(layer, name, h) for x, h in zip(self.x, self.h, strict=True)]


def round_layer(layer: Layer, config: ModelConfig, method: Method, group_size: int) -> QuantizedLayer:
    """Without calibration, method RTN or SINQ."""
    scales = even_layer_scales(layer, config) if method is Method.SINQ else {}
    layer = fold_layer_scales(layer, scales, config)
    matrices = {name: _round(layer[name], method, group_size) for name in LINEARS}
    return QuantizedLayer(matrices, _rest(layer), scales)


def _round(w: Tensor, method: Method, group_size: int) -> QuantizedMatrix:
    size = fitting_group_size(group_size, w.shape[1])
    return round_to_nearest(w, minmax_grid(w, size) if method is Method.RTN else search_grid(w, size))


class LayerQuantizer:
    """Takes calibration streams through one layer after the other. dtype: the precision of computation."""

    def __init__(
        self, batches: list[Tensor], config: ModelConfig, method: Method, group_size: int, dtype: torch.dtype
    ) -> None:
        self._config = config
        self._method = method
        self._group_size = group_size
        self._dtype = dtype
        self.exact = Stream(batches, config)
        # AWQ judges each layer by itself.
        self.actual = self.exact if method is Method.AWQ else Stream(list(batches), config)

    def skip(self, layer: Layer, quantized: QuantizedLayer) -> None:
        """A layer that was quantised before: the streams end up as `quantize` left them."""
        layer = fold_layer_scales(layer, quantized.scales, self._config)
        self.exact.run(lowered(layer, self._dtype))
        if self.actual is not self.exact:
            self.actual.run(lowered(quantized.dequantized(), self._dtype))

    def quantize(self, layer: Layer) -> QuantizedLayer:
        scales = self._scales(layer)
        layer = fold_layer_scales(layer, scales, self._config)
        exact = lowered(layer, self._dtype)
        actual = dict(exact)  # linears become what they are quantised to, one after the other
        result = QuantizedLayer({}, _rest(layer), scales)
        observer = KVObserver(self._config, exact["q"].device)
        for key, names in INPUTS.items():
            if key == "o" and self.actual is self.exact:
                for h in self.exact.h:
                    o_input(actual, h, self._config, observer)
            self.exact.advance(exact, key)
            if self.actual is not self.exact:
                self.actual.advance(actual, key, observer)
            result.statistics |= _input_statistics(key, self.exact.h)
            w = torch.cat([layer[name] for name in names])
            parts = self._quantize(w, key).split([len(layer[name]) for name in names])
            for name, matrix in zip(names, parts, strict=True):
                result.matrices[name] = matrix
                actual[name] = matrix.dequantized().to(self._dtype)
        self.exact.finish(exact)
        if self.actual is not self.exact:
            self.actual.finish(actual)
        result.statistics |= observer.results()
        return result

    def _scales(self, layer: Layer) -> dict[str, Tensor]:
        if self._method is Method.SINQ:
            return even_layer_scales(layer, self._config)
        if self._method in (Method.AWQ, Method.AWQ_GPTQ):
            return search_layer_scales(layer, self._search_batch(), self._config, self._group_size, self._dtype)
        return {}

    def _quantize(self, w: Tensor, key: str) -> QuantizedMatrix:
        """All that read the inputs `key` as one matrix."""
        if self._method in (Method.RTN, Method.SINQ):
            return _round(w, self._method, self._group_size)
        hessian = sum((gram(h) for h in self.actual.h), torch.zeros(()).to(w.device))
        hessian = damped(hessian, HESSIAN_DAMPING)
        is_refined = self._method is Method.AWQ_GPTQ
        if is_refined:
            w = corrected(w, hessian, self._missing(w, key))
        grid = search_grid(w, fitting_group_size(self._group_size, w.shape[1]), hessian)
        if self._method is Method.AWQ:
            return round_to_nearest(w, grid)
        matrix = gptq(w, hessian, grid)
        return refined(w, hessian, matrix) if is_refined else matrix

    def _missing(self, w: Tensor, key: str) -> Tensor:
        missing = torch.zeros_like(w)
        for h, a, x, y in zip(self.exact.h, self.actual.h, self.exact.x, self.actual.x, strict=True):
            missing += missing_output(w, h, a, x - y if key in ("o", "down") else None)
        return missing

    def _search_batch(self) -> Tensor:
        x = self.exact.x[0]
        return x[: max(1, SEARCH_TOKENS // x.shape[1])]


def _input_statistics(key: str, batches: list[Tensor]) -> dict[str, Tensor]:
    statistics = ChannelStatistics(batches[0].shape[-1:], batches[0].device)
    for h in batches:
        statistics.add(h)
    return {f"{key}_input.{measure}": values for measure, values in statistics.results().items()}


def _rest(layer: Layer) -> Layer:
    return {part: weight for part, weight in layer.items() if part not in LINEARS}
