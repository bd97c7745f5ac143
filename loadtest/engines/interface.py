"""What `engine_speed` asks of each engine that it compares. All get the same random token ids."""

from __future__ import annotations

from typing import Protocol


class SpeedEngine(Protocol):
    """One loaded model. Times are wall seconds of the computation alone; every token is chosen greedily."""

    vocab_size: int

    def prefill(self, prompt: list[int]) -> float:
        """Seconds from a prompt to its first token."""

    def decode(self, prompts: list[list[int]], num_tokens: int) -> float:
        """Seconds for num_tokens further tokens of every prompt, after each one's first token, as one batch."""


class EngineNotInstalled(Exception):
    """The message says which package is missing."""
