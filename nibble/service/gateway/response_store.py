"""Finished responses, kept by the broker for a while: to be retrieved, and to be gone on from."""

from __future__ import annotations

import logging
from typing import Any

import orjson

from nibble.service.broker.errors import BrokerError
from nibble.service.broker.gateway_side import DELETED_RESPONSE
from nibble.service.gateway.errors import InvalidRequest, NotFound, from_broker, shown
from nibble.service.gateway.gateway import Gateway
from nibble.service.gateway.recipe import Recipe

logger = logging.getLogger(__name__)

MAX_HISTORY = 1000  # responses before one

Record = dict[str, Any]  # tenant, response, input (its items, with ids)


async def save(gateway: Gateway, recipe: Recipe, response: dict[str, Any]) -> None:
    """Unless its client did not want it. Never raises: the answer is not at fault."""
    asked = orjson.loads(recipe.plan.response)
    if not asked["store"]:
        return
    record = orjson.dumps({"tenant": recipe.tenant, "response": response, "input": asked["input"]})
    previous_id = response["previous_response_id"] or ""
    try:
        await gateway.broker.store_response(response["id"], record, previous_id, gateway.settings.response_ttl_s)
    except BrokerError as error:
        logger.warning("request_id=%s response not stored: %s", response["id"], error)


async def load(gateway: Gateway, response_id: str, tenant: str) -> Record | None:
    """None: it is not kept (yet). Raises NotFound where it was deleted or is another client's, Unavailable."""
    (found,) = await _records(gateway, response_id, 1)
    if found is not None and found["tenant"] != tenant:
        raise not_found(response_id)
    return found


async def history(gateway: Gateway, response_id: str, tenant: str) -> list[dict[str, Any]]:
    """Items of a response and all before it, oldest first. Raises InvalidRequest, Unavailable."""
    records = await _records(gateway, response_id, MAX_HISTORY + 1)
    items: list[dict[str, Any]] = []
    for record in reversed(records):
        if record is None or record["tenant"] != tenant:
            message = f"the response {shown(response_id)}, or one before it, is not known (any more)"
            raise InvalidRequest(message, param="previous_response_id", code="previous_response_not_found")
        items += [*record["input"], *record["response"]["output"]]
    if len(records) > MAX_HISTORY:
        message = f"more than {MAX_HISTORY} responses go on from each other"
        raise InvalidRequest(message, param="previous_response_id")
    return items


async def delete(gateway: Gateway, response_id: str) -> None:
    """Raises Unavailable."""
    try:
        await gateway.broker.delete_response(response_id, gateway.settings.response_ttl_s)
    except BrokerError as error:
        raise from_broker(error) from error


def not_found(response_id: str) -> NotFound:
    return NotFound(f"the response {shown(response_id)} is not known (any more)", code="response_not_found")


async def _records(gateway: Gateway, response_id: str, limit: int) -> list[Record | None]:
    try:
        records = await gateway.broker.read_responses(response_id, limit)
    except BrokerError as error:
        raise from_broker(error) from error
    return [_decoded(record) for record in records]


def _decoded(record: bytes) -> Record | None:
    if record == DELETED_RESPONSE:
        return {"tenant": None}  # nobody's
    return orjson.loads(record) if record else None
