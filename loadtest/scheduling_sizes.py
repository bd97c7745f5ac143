"""How large the workloads of `loadtest.scheduling` are."""

from __future__ import annotations

import msgspec


class Sizes(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens, and numbers of requests."""

    system_tokens: int
    question_tokens: int
    answer_tokens: int
    num_questions: int
    num_turns: int
    num_at_once: int
    num_streams: int
    long_tokens: int
    num_long: int
    budgets: tuple[int, ...]
    num_storm: int
    storm_prompt_tokens: int
    storm_output_tokens: int
    prefix_budget: int = 512


CPU_SIZES = Sizes(
    system_tokens=1000,
    question_tokens=40,
    answer_tokens=24,
    num_questions=16,
    num_turns=5,
    num_at_once=4,
    num_streams=4,
    long_tokens=2048,
    num_long=3,
    budgets=(64, 128, 256, 512, 2048 + 4),
    num_storm=12,
    storm_prompt_tokens=150,
    storm_output_tokens=200,
)
GPU_SIZES = Sizes(
    system_tokens=4000,
    question_tokens=100,
    answer_tokens=64,
    num_questions=48,
    num_turns=4,
    num_at_once=32,
    num_streams=32,
    long_tokens=8000,
    num_long=5,
    budgets=(512, 1024, 2048, 8000 + 32),
    num_storm=64,
    storm_prompt_tokens=400,
    storm_output_tokens=400,
    prefix_budget=2048,
)
