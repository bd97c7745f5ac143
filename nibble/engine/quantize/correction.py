"""What a linear should compute on the inputs that it will really get.

Inputs a of a quantised model differ from the original's inputs h, and its residual stream y from the original's x. The
weights T that then make up for both minimise, summed over calibration tokens, |T a - W h - (x - y)|^2, where x - y
counts only for linears that write to the residual stream: T = W + sum (W (h - a) + x - y) a^T H^-1 with H = sum a a^T.
The first term is Li et al., "GPTAQ" (2025).
"""

from __future__ import annotations

import torch
from torch import Tensor

STRENGTH = 0.5  # of the step from W to T: all of it fits what these tokens happened to err by (docs/quantization.md)


def missing_output(w: Tensor, exact: Tensor, actual: Tensor, behind: Tensor | None) -> Tensor:
    """sum (W (h - a) + x - y) a^T over the tokens of a batch, float32 (N, K).

    w (N, K); exact h and actual a (B, T, K); behind: x - y (B, T, N), for a linear that writes to the residual stream.
    """
    error = (exact.float() - actual.float()) @ w.T
    if behind is not None:
        error += behind
    return error.flatten(0, -2).T @ actual.flatten(0, -2).float()


def corrected(w: Tensor, hessian: Tensor, missing: Tensor) -> Tensor:
    """New weights (N, K), STRENGTH of the way. hessian (K, K), `damped`; missing (N, K), summed over all batches.

    In float64: Hessians of activations are badly conditioned.
    """
    factor = torch.linalg.cholesky(hessian.double())
    step = torch.cholesky_solve(missing.T.double(), factor).T
    return w + STRENGTH * step.float()
