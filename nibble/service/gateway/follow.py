"""Requests by their id, whichever gateway submitted them: to end them, or to give their answers again.

A client can tell no difference between an unknown id and one that belongs to another client.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from nibble.engine.protocol import FinishReason
from nibble.service.broker.errors import BrokerError, UnknownRequest
from nibble.service.broker.token_stream import TokenStream
from nibble.service.gateway.errors import InvalidRequest, from_broker, shown
from nibble.service.gateway.gateway import Gateway
from nibble.service.gateway.generation import Generation
from nibble.service.gateway.plan import choice_request_id
from nibble.service.gateway.recipe import Recipe, decode_recipe

# The first choice of a request can be known a moment before the others are.
_SUBMIT_S = 2.0
_RETRY_S = 0.02


@dataclass(frozen=True)
class Asker:
    """Who asks for which kind of request."""

    endpoint: str
    tenant: str


async def find(gateway: Gateway, request_id: str, asker: Asker) -> tuple[Recipe, TokenStream]:
    """Raises NotFound, Unavailable."""
    try:
        stream = await gateway.broker.attach(request_id)
    except BrokerError as error:
        raise from_broker(error) from error
    recipe = decode_recipe(stream.terms.context) if stream.terms.context else None
    if recipe is None or (recipe.endpoint, recipe.tenant) != (asker.endpoint, asker.tenant):
        stream.close()
        raise from_broker(UnknownRequest(request_id))
    return recipe, stream


async def cancel(gateway: Gateway, request_id: str, asker: Asker) -> Recipe:
    """End all its choices; its client is told so. Raises NotFound, Unavailable."""
    recipe, stream = await find(gateway, request_id, asker)
    stream.close()
    for choice in range(recipe.num_choices):
        await gateway.broker.abort(choice_request_id(request_id, choice), FinishReason.ABORT)
    return recipe


async def follow(
    gateway: Gateway, request_id: str, asker: Asker, after: Sequence[int] = ()
) -> tuple[Recipe, Generation]:
    """Its answer, from its beginning. Raises NotFound, Unavailable."""
    recipe, first = await find(gateway, request_id, asker)
    streams = [first]
    try:
        for choice in range(1, recipe.num_choices):
            streams.append(await _attach(gateway, choice_request_id(request_id, choice)))
    except BaseException as error:
        for stream in streams:
            stream.close()
        if isinstance(error, BrokerError):
            raise from_broker(error) from error
        raise
    requests = tuple(stream.request for stream in streams if stream.request is not None)
    plan = replace(recipe.plan, requests=requests)
    return recipe, Generation.follow(plan, gateway, streams, after)


def positions_in(event_id: str, request_id: str, num_choices: int) -> tuple[int, ...]:
    """The tokens of each choice that a client has who saw this event. Raises InvalidRequest."""
    name, _, positions = event_id.rpartition(":")
    numbers = positions.split(".")
    are_numbers = all(number.isascii() and number.isdigit() and len(number) < 10 for number in numbers)
    if name != request_id or len(numbers) != num_choices or not are_numbers:
        message = f"last-event-id: {shown(event_id)} is no event of {request_id}"
        raise InvalidRequest(message, param="last-event-id", code="invalid_event_id")
    return tuple(map(int, numbers))


async def _attach(gateway: Gateway, request_id: str) -> TokenStream:
    """Raises BrokerError."""
    end_s = time.monotonic() + _SUBMIT_S
    while True:
        try:
            return await gateway.broker.attach(request_id)
        except UnknownRequest:
            if time.monotonic() >= end_s:  # its gateway died before it had submitted them all
                raise
            await asyncio.sleep(_RETRY_S)
