"""What an engine counts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class EngineStats:
    """Counters since the start, and gauges of the last step."""

    num_running: int = 0
    num_waiting: int = 0
    kv_cache_usage: float = 0.0
    num_steps: int = 0
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    num_preemptions: int = 0
    num_cache_queries: int = 0
    num_cache_hits: int = 0
    num_nonfinite_logits: int = 0
    num_draft_tokens: int = 0  # verified
    num_accepted_tokens: int = 0  # ... and right
    step_bytes: int = 0
    step_s: float = 0.0
