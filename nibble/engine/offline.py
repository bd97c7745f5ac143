"""A batch of requests through an engine that serves nobody else, to the last token. Results are in input order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

from nibble.engine.errors import EngineError
from nibble.engine.llm_engine import LLMEngine
from nibble.engine.protocol import FinishReason, GenerationRequest, RequestMetrics, TokenEvent

OnEvent = Callable[[int, TokenEvent], bool]  # the request's place, what is new of it; True ends it


@dataclass
class Completion:
    """What became of one request. error: why, where finish_reason is ERROR; the others are not concerned."""

    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None  # None while it runs, which nobody sees but on_event
    error: str | None = None
    metrics: RequestMetrics | None = None
    logprobs: bytes = b""  # records as TokenEvent has them, where they were asked for
    prompt_logprobs: bytes = b""


def _go_on(index: int, event: TokenEvent) -> bool:
    return False


def generate(engine: LLMEngine, requests: Sequence[GenerationRequest], on_event: OnEvent = _go_on) -> list[Completion]:
    """Run all requests; their ids are distinct. The engine is idle before and after, whatever happens.

    A request that on_event ends has finish reason STOP. Raises RequestError before anything is computed if one can
    never run, EngineError if the engine is in use.
    """
    if engine.has_unfinished:
        raise EngineError("the engine is in use: it takes one batch at a time")
    for request in requests:
        engine.check(request)
    completions = [Completion() for _ in requests]
    index_of = {request.request_id: index for index, request in enumerate(requests)}
    assert len(index_of) == len(requests), "two requests have the same id"
    waiting = iter(requests)
    try:
        while _add(engine, waiting):
            for event in engine.step():
                index = index_of[event.request_id]
                _take(completions[index], event)
                if on_event(index, event) and event.finish_reason is None:
                    completions[index].finish_reason = FinishReason.STOP
                    engine.abort(event.request_id)
    finally:
        for name in index_of:
            engine.abort(name)
    return completions


def _add(engine: LLMEngine, waiting: Iterator[GenerationRequest]) -> bool:
    """As many as can start now: an engine looks at each of its requests in every step. False: all have ended."""
    for request in islice(waiting, max(engine.capacity, not engine.has_unfinished)):
        engine.add(request)
    return engine.has_unfinished


def _take(completion: Completion, event: TokenEvent) -> None:
    completion.token_ids += event.token_ids
    completion.finish_reason, completion.error = event.finish_reason, event.error
    completion.metrics = event.metrics or completion.metrics
    completion.logprobs += event.logprobs or b""
    completion.prompt_logprobs += event.prompt_logprobs or b""
