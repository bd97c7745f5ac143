"""How far one model's predictions are from another's, over the positions of a text. All in nats."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

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
    """Adds up what becomes a `Quality`, chunk by chunk, on whichever device the logits are."""

    def __init__(self) -> None:
        self._losses: list[Tensor] = []
        self._divergences: list[Tensor] = []
        self._agreements: list[Tensor] = []

    def add(self, reference: Tensor, logits: Tensor, targets: Tensor) -> None:
        """logits float32 (T, V) of both models for the same positions; targets int64 (T,): the tokens that come next,
        of the last position perhaps none, which is -1. Everything has been computed when this returns."""
        targets = targets.to(logits.device)
        for start in range(0, len(logits), _CHUNK_ROWS):
            rows = slice(start, start + _CHUNK_ROWS)
            p, q = (each[rows].double().log_softmax(-1) for each in (reference, logits))
            next_tokens = targets[rows]
            losses = -q.gather(1, next_tokens.clamp(min=0)[:, None])[:, 0]
            self._divergences.append((p.exp() * (p - q)).sum(-1).cpu())
            self._agreements.append((p.argmax(-1) == q.argmax(-1)).cpu())
            self._losses.append(losses[next_tokens >= 0].cpu())

    def result(self) -> Quality:
        divergences = torch.cat(self._divergences).numpy()
        return Quality(
            perplexity=float(torch.cat(self._losses).mean().exp()),
            mean_kl=float(divergences.mean()),
            p99_kl=float(np.quantile(divergences, 0.99)),
            top1_agreement=float(torch.cat(self._agreements).double().mean()),
            num_tokens=len(divergences),
        )
