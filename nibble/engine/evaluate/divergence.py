"""How far one model's predictions are from another's, over the positions of a text. All in nats."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[np.float32]  # (T, V)
Values = npt.NDArray[np.float64]

_CHUNK_ROWS = 64  # that are worked on in float64 at a time


@dataclass(frozen=True)
class Quality:
    """perplexity: of the text. The rest: against the reference, over all positions."""

    perplexity: float
    mean_kl: float
    p99_kl: float
    top1_agreement: float  # share of positions with the same most probable token
    num_tokens: int


class Comparison:
    """Adds up what becomes a `Quality`, chunk by chunk."""

    def __init__(self) -> None:
        self._losses: list[Values] = []
        self._divergences: list[Values] = []
        self._agreements: list[npt.NDArray[np.bool_]] = []

    def add(self, reference: Logits, logits: Logits, targets: npt.NDArray[np.int64]) -> None:
        """logits (T, V) of both models for the same positions; targets (T,): the tokens that come next, of the last
        position perhaps none, which is -1."""
        for start in range(0, len(logits), _CHUNK_ROWS):
            rows = slice(start, start + _CHUNK_ROWS)
            p, q = log_softmax(reference[rows]), log_softmax(logits[rows])
            self._divergences.append((np.exp(p) * (p - q)).sum(-1))
            self._agreements.append(p.argmax(-1) == q.argmax(-1))
            known = targets[rows] >= 0
            self._losses.append(-q[known, targets[rows][known]])

    def result(self) -> Quality:
        divergences, losses = np.concatenate(self._divergences), np.concatenate(self._losses)
        return Quality(
            perplexity=float(np.exp(losses.mean())),
            mean_kl=float(divergences.mean()),
            p99_kl=float(np.quantile(divergences, 0.99)),
            top1_agreement=float(np.concatenate(self._agreements).mean()),
            num_tokens=len(divergences),
        )


def log_softmax(logits: Logits) -> Values:
    x = logits.astype(np.float64)
    x -= x.max(-1, keepdims=True)
    result: Values = x - np.log(np.exp(x).sum(-1, keepdims=True))
    return result
