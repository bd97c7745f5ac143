"""ChatPlans for tests that begin after validation."""

from __future__ import annotations

from typing import Any

from nibble.engine.protocol import GenerationRequest, SamplingParams
from nibble.service.gateway.plan import Plan, choice_request_id


def make_plan(
    *,
    n: int = 1,
    stops: tuple[str, ...] = (),
    include_stop: bool = False,
    stop_token_ids: tuple[int, ...] = (),
    min_tokens: int = 0,
    logprobs: int | None = None,
    **options: Any,
) -> Plan:
    sampling = SamplingParams(max_tokens=100, stop_token_ids=stop_token_ids, min_tokens=min_tokens, logprobs=logprobs)
    requests = tuple(
        GenerationRequest(
            request_id=choice_request_id("chatcmpl-1", i), prompt_token_ids=[1, 2, 3], sampling=sampling, arrival_s=0.0
        )
        for i in range(n)
    )
    values: dict[str, Any] = {
        "request_id": "chatcmpl-1",
        "arrival_s": 0.0,
        "first_token_by_s": None,
        "requests": requests,
        "prompt_tokens": 3,
        "num_prompts": 1,
        "stops": stops,
        "include_stop": include_stop,
        "skip_special_tokens": True,
        "stream": False,
        "include_usage": False,
        "service_tier": "default",
        "ignored": (),
    }
    return Plan(**{**values, **options})
