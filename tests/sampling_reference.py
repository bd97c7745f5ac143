"""Adjusted logits and log probabilities in float64, straight from the rules of `kernels/sampling.py`."""

from __future__ import annotations

import numpy as np

from nibble.kernels.slots import SlotContent


def adjusted(logits: np.ndarray, content: SlotContent, prompt: list[int], generated: list[int]) -> np.ndarray:
    """One row of `adjust_logits`, from the whole token lists: bans, biases, then penalties."""
    x = logits.astype(np.float64)
    for token in range(len(x)):
        x[token] += dict(content.biases).get(token, 0.0)
        if token in prompt or token in generated:
            x[token] = x[token] / content.repetition if x[token] > 0 else x[token] * content.repetition
        if count := generated.count(token):
            x[token] -= content.frequency * count + content.presence
        is_stopped = len(generated) < content.min_tokens and token in content.stop_ids
        is_bad = any([*generated, token][-len(word) :] == list(word) for word in content.bad_words)
        if is_stopped or is_bad or (content.allowed is not None and token not in content.allowed):
            x[token] = -np.inf
    return x


def logprobs(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.float64)
    return x - x.max() - np.log(np.exp(x - x.max()).sum())
