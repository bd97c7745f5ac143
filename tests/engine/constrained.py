"""Requests with a grammar for a tiny model, and what becomes of them."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from tiny_tokenizer import EOS

from nibble.engine.llm_engine import LLMEngine
from nibble.engine.protocol import FinishReason, GenerationRequest, GrammarKind, GrammarSpec, SamplingParams

VOCAB_SIZE = 300
BLOCK_BYTES = 2 * 2 * (2 * 64 * 32 + 2 * 64 * 4)  # two layers, two KV heads of 32
PLENTY = 64 * BLOCK_BYTES


class Output(NamedTuple):
    tokens: list[int]
    reason: FinishReason
    error: str | None = None
    error_fields: tuple[str, ...] = ()


def schema(value: Any) -> GrammarSpec:
    return GrammarSpec(GrammarKind.JSON_SCHEMA, json.dumps(value))


def request(
    request_id: str, grammar: GrammarSpec | None, num_prompt_tokens: int = 5, **sampling: Any
) -> GenerationRequest:
    params = {"max_tokens": 150, "temperature": 1.5, "stop_token_ids": (EOS,), **sampling}
    return GenerationRequest(
        request_id=request_id,
        prompt_token_ids=[3 + (len(request_id) + i) % 250 for i in range(num_prompt_tokens)],
        sampling=SamplingParams(**params),
        arrival_s=0.0,
        grammar=grammar,
    )


def run(engine: LLMEngine, *requests: GenerationRequest, generated: tuple[int, ...] = ()) -> dict[str, Output]:
    for item in requests:
        engine.add(item, generated)
    tokens: dict[str, list[int]] = {item.request_id: [] for item in requests}
    outputs = {}
    while engine.has_unfinished:
        for event in engine.step():
            assert event.index == len(generated) + len(tokens[event.request_id])
            tokens[event.request_id] += event.token_ids
            if event.finish_reason is not None:
                outputs[event.request_id] = Output(
                    tokens[event.request_id], event.finish_reason, event.error, event.error_fields
                )
    assert len(outputs) == len(requests)
    return outputs
