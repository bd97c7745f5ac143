"""Answers in the shape of chat completions and of text completions: whole, or in chunks."""

from __future__ import annotations

from collections.abc import Callable

from starlette.responses import Response

from nibble.service.gateway.completion import ChunkEncoder, fold
from nibble.service.gateway.responses import CompletionResponse, StreamResponse
from nibble.service.gateway.routes.answer import Answer
from nibble.service.gateway.shapes import Shape

ShapeMaker = Callable[[Callable[[int], bytes]], Shape]


def respond(make_shape: ShapeMaker) -> Callable[[Answer], Response]:
    """As the request asks for it."""

    def make(answer: Answer) -> Response:
        generation, identity = answer.generation, answer.recipe.identity
        if generation.plan.stream:
            return stream(make_shape)(answer)
        shape = make_shape(answer.gateway.model.token_bytes)
        return CompletionResponse(generation, lambda: fold(generation, identity, shape), answer.headers)

    return make


def stream(make_shape: ShapeMaker) -> Callable[[Answer], Response]:
    """As server-sent events, however it was asked for."""

    def make(answer: Answer) -> Response:
        plan = answer.generation.plan
        encoder = ChunkEncoder(
            answer.recipe.identity,
            make_shape(answer.gateway.model.token_bytes),
            len(plan.requests),
            include_usage=plan.include_usage,
            has_logprobs=plan.num_logprobs is not None,
            after=answer.after,
        )
        return StreamResponse(answer.generation, encoder, answer.headers, answer.gateway.settings.keep_alive_s)

    return make
