"""/v1/responses: POST to create one; by its id GET, GET .../input_items, POST .../cancel, DELETE."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import orjson
from fastapi import APIRouter, Request
from pydantic import ValidationError
from starlette.responses import Response

from nibble.service.gateway import response_store
from nibble.service.gateway.errors import ApiError, InvalidRequest, NotFound, from_validation, shown
from nibble.service.gateway.field_support import ignored_header
from nibble.service.gateway.follow import cancel, follow, positions_in
from nibble.service.gateway.gateway import Gateway
from nibble.service.gateway.generation import Generation
from nibble.service.gateway.plan import ClientContext, Plan
from nibble.service.gateway.recipe import Recipe
from nibble.service.gateway.response_builder import ResponseBuilder, ResponseEncoder
from nibble.service.gateway.response_request import to_response_plan
from nibble.service.gateway.responses import CompletionResponse, StreamResponse
from nibble.service.gateway.routes.answer import Answer, Endpoint, answer, asker_of
from nibble.service.gateway.routes.body import body_schema, gateway_of, json_response
from nibble.service.gateway.schema.responses import ResponseRequest
from nibble.service.gateway.served_model import ServedModel

router = APIRouter(tags=["responses"])

MAX_LISTED, _DEFAULT_LISTED = 100, 20
_QUERY = [
    {"name": "stream", "in": "query", "schema": {"type": "boolean"}},
    {"name": "starting_after", "in": "query", "schema": {"type": "integer", "minimum": 0, "maximum": 999_999_999}},
]
_FLAGS = {"true": True, "1": True, "false": False, "0": False}


async def _plan(body: bytes, gateway: Gateway, model: ServedModel, client: ClientContext) -> Plan:
    try:
        request = ResponseRequest.model_validate_json(body)
    except ValidationError as error:
        raise from_validation(error) from error
    before: list[dict[str, Any]] = []
    if request.previous_response_id is not None:
        before = await response_store.history(gateway, request.previous_response_id, client.tenant)
    return await to_response_plan(request, before, model, client)


def _respond(answer: Answer) -> Response:
    generation = answer.generation
    if generation.plan.stream:
        return _stream(answer)
    builder = _builder(answer.gateway, answer.recipe, generation)

    async def fold() -> bytes:
        await _build(builder, generation)
        await _save(answer, builder)
        return orjson.dumps(builder.response)

    return CompletionResponse(generation, fold, answer.headers)


def _stream(answer: Answer) -> Response:
    gateway, generation = answer.gateway, answer.generation
    builder = _builder(gateway, answer.recipe, generation)
    encoder = ResponseEncoder(builder, answer.after[0] if answer.after else -1)

    async def save() -> None:
        await _save(answer, builder)

    return StreamResponse(generation, encoder, answer.headers, gateway.settings.keep_alive_s, before_end=save)


async def _save(answer: Answer, builder: ResponseBuilder) -> None:
    """Of one who only follows, what it amounts to if they leave is not what the response is."""
    if answer.generation.is_owner or builder.response["status"] in ("completed", "incomplete"):
        await response_store.save(answer.gateway, answer.recipe, builder.response)


_RESPONSE = Endpoint("response", "resp_", _plan, _respond)


@router.post("/v1/responses", openapi_extra=body_schema(ResponseRequest))
async def create_response(request: Request) -> Response:
    """Answer an input, whole or as server-sent events, and keep the answer for a while."""
    return await answer(request, _RESPONSE)


@router.post("/v1/responses/compact", include_in_schema=False)
@router.post("/v1/responses/input_tokens", include_in_schema=False)
async def not_there(request: Request) -> Response:
    """Without this, it would be a response with that id."""
    raise NotFound(f"unknown URL: POST {request.url.path}", code="unknown_url")


@router.get("/v1/responses/{response_id}", openapi_extra={"parameters": _QUERY})
async def retrieve_response(response_id: str, request: Request) -> Response:
    """A response that is kept, or as far as it is known while it is generated.

    With the query `stream=true` its events, from the first one or after the one of the number `starting_after` on.
    """
    query = request.query_params
    wanted, starting_after = query.get("stream", "false"), query.get("starting_after")
    if wanted not in _FLAGS:
        raise InvalidRequest(f"stream: should be true or false (got {shown(wanted)})", param="stream")
    ignored = ignored_header(tuple(name for name in query if name not in ("stream", "starting_after")))
    headers = {"x-nibble-ignored": ignored} if ignored else {}
    if _FLAGS[wanted]:
        return await _streamed_again(request, response_id, _last_number(request, response_id), headers)
    if starting_after is not None:
        raise InvalidRequest("starting_after is only allowed when stream is true", param="starting_after")
    return json_response((await _record(request, response_id))["response"], headers=headers)


def _last_number(request: Request, response_id: str) -> tuple[int, ...]:
    """Of the last event that the client has; () if none. Raises InvalidRequest."""
    number, event_id = request.query_params.get("starting_after"), request.headers.get("last-event-id")
    if number is None:
        return positions_in(event_id, response_id, 1) if event_id else ()
    if not (number.isascii() and number.isdigit() and len(number) < 10):
        message = f"starting_after: should be the number of an event (got {shown(number)})"
        raise InvalidRequest(message, param="starting_after")
    return (int(number),)


async def _streamed_again(
    request: Request, response_id: str, after: tuple[int, ...], headers: Mapping[str, str]
) -> Response:
    """Made of its tokens again, which are not kept as long as the response itself. Raises NotFound, Unavailable."""
    gateway, asker = gateway_of(request), asker_of(request, _RESPONSE)
    stored = await response_store.load(gateway, response_id, asker.tenant)
    try:
        recipe, generation = await follow(gateway, response_id, asker)
    except NotFound as error:
        if stored is None:
            raise response_store.not_found(response_id) from error
        message = f"the events of the response {shown(response_id)} are not kept any more, the response itself is"
        raise NotFound(message, param="stream", code="response_events_not_found") from error
    if not orjson.loads(recipe.plan.response)["store"]:
        await generation.close()
        raise response_store.not_found(response_id)
    return _stream(Answer(gateway, recipe, generation, headers, after))


@router.get("/v1/responses/{response_id}/input_items")
async def list_input_items(response_id: str, request: Request) -> Response:
    """The items of a response's own input, the last one first unless `order` is asc."""
    record = await _record(request, response_id)
    order, limit = request.query_params.get("order", "desc"), request.query_params.get("limit", str(_DEFAULT_LISTED))
    if order not in ("asc", "desc"):
        raise InvalidRequest(f"order: should be asc or desc (got {shown(order)})", param="order")
    if not (limit.isascii() and limit.isdigit() and 1 <= int(limit[:9]) <= MAX_LISTED):
        raise InvalidRequest(f"limit: should be from 1 to {MAX_LISTED} (got {shown(limit)})", param="limit")
    items = record["input"] if order == "asc" else record["input"][::-1]
    ids = [item["id"] for item in items]
    if (after := request.query_params.get("after")) is not None:
        if after not in ids:
            raise InvalidRequest(f"after: there is no item {shown(after)}", param="after")
        items = items[ids.index(after) + 1 :]
    page = items[: int(limit)]
    first, last = (page[0]["id"], page[-1]["id"]) if page else (None, None)
    listed = {"object": "list", "data": page, "has_more": len(page) < len(items), "first_id": first, "last_id": last}
    return json_response(listed)


@router.post("/v1/responses/{response_id}/cancel")
async def cancel_response(response_id: str, request: Request) -> Response:
    """End a response that is being generated; its client is told so. One that has ended stays as it is."""
    with contextlib.suppress(NotFound):  # its tokens are not kept as long as the response itself
        await cancel(gateway_of(request), response_id, asker_of(request, _RESPONSE))
    return json_response((await _record(request, response_id))["response"])


@router.delete("/v1/responses/{response_id}")
async def delete_response(response_id: str, request: Request) -> Response:
    """Forget a response; one that is being generated is ended first."""
    gateway, asker = gateway_of(request), asker_of(request, _RESPONSE)
    is_stored = await response_store.load(gateway, response_id, asker.tenant) is not None
    try:
        await cancel(gateway, response_id, asker)
    except NotFound as error:
        if not is_stored:
            raise response_store.not_found(response_id) from error
    await response_store.delete(gateway, response_id)
    return json_response({"id": response_id, "object": "response", "deleted": True})


async def _record(request: Request, response_id: str) -> response_store.Record:
    """What is kept; else, of one whose gateway has not kept it (yet), what its tokens amount to. Raises NotFound."""
    gateway, asker = gateway_of(request), asker_of(request, _RESPONSE)
    stored = await response_store.load(gateway, response_id, asker.tenant)
    if stored is not None:
        return stored
    try:
        recipe, generation = await follow(gateway, response_id, asker)
    except NotFound as error:
        raise response_store.not_found(response_id) from error
    asked = orjson.loads(recipe.plan.response)
    builder = _builder(gateway, recipe, generation)
    try:
        if not asked["store"]:
            raise response_store.not_found(response_id)
        if generation.is_complete:
            await _build(builder, generation)
    except NotFound:
        raise
    except ApiError as error:
        builder.fail(error, generation.usage())
    finally:
        await generation.close()
    return {"tenant": recipe.tenant, "response": builder.response, "input": asked["input"]}


def _builder(gateway: Gateway, recipe: Recipe, generation: Generation) -> ResponseBuilder:
    skeleton = orjson.loads(recipe.plan.response)["response"]
    return ResponseBuilder(skeleton, gateway.model.token_bytes, has_logprobs=generation.plan.num_logprobs is not None)


async def _build(builder: ResponseBuilder, generation: Generation) -> None:
    await generation.run(builder.add)
    builder.end(generation.usage())
