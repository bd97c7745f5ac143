"""SINQ: channel scales from the weights alone, so that no channel stands out of its group.

Müller et al., "SINQ" (2025). Rows and columns are divided in turns until their standard deviations are alike. A row's
factor would go into the scales of its groups, so it is left out; a column's goes into the op before, as AWQ's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nibble.engine.model_config import ModelConfig
from nibble.engine.quantize.awq import fold_scales
from nibble.engine.quantize.decoder import INPUTS, Layer

_NUM_ROUNDS = 16
_LEAST_STEP, _GREATEST_STEP = 0.7, 2.0  # of a factor in one round: rows and columns disturb each other
_LEAST = 1e-12  # of a standard deviation, which is divided by


def even_layer_scales(layer: Layer, config: ModelConfig) -> dict[str, Tensor]:
    """Channel scales (K,) for each of INPUTS, to be folded in this order."""
    found = {}
    for key, names in INPUTS.items():
        factors = column_factors(torch.cat([layer[name] for name in names]))
        if key == "o":  # alike for the heads that read the same value
            heads = factors.log().view(config.num_kv_heads, -1, config.head_dim)
            factors = heads.mean(1, keepdim=True).expand_as(heads).exp().flatten()
        found[key] = 1 / factors
        layer = fold_scales(layer, key, found[key], config)
    return found


def column_factors(w: Tensor) -> Tensor:
    """What to divide the columns of w (N, K) by, (K,), of geometric mean 1: of all rounds, that which leaves the least
    ratio between the greatest and the least standard deviation of a row or column."""
    columns, rows = w.new_ones(w.shape[1]), w.new_ones(len(w), 1)
    best, best_imbalance = columns, w.new_tensor(torch.inf)
    wanted: Tensor | None = None
    for _ in range(_NUM_ROUNDS):
        even = w / columns / rows
        by_column, by_row = even.std(0).clamp(min=_LEAST), even.std(1, keepdim=True).clamp(min=_LEAST)
        least = torch.minimum(by_column.amin(), by_row.amin())
        imbalance = torch.maximum(by_column.amax(), by_row.amax()) / least
        best = torch.where(imbalance < best_imbalance, columns, best)
        best_imbalance = torch.minimum(imbalance, best_imbalance)
        wanted = least if wanted is None else wanted
        columns = columns * (by_column / wanted).clamp(_LEAST_STEP, _GREATEST_STEP)
        rows = rows * (by_row / wanted).clamp(_LEAST_STEP, _GREATEST_STEP)
    return best / best.log().mean().exp()
