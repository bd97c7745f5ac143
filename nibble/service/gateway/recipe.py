"""How the tokens of a request become its answer: what a gateway needs to follow a request that it did not submit.

Kept by the broker beside the token log. An answer is a pure function of both, so any gateway can give it again, or
from any event on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import msgspec

from nibble.service.gateway.completion import Identity
from nibble.service.gateway.plan import Plan


@dataclass(frozen=True)
class Recipe:
    """plan: without its requests, which the broker has. endpoint: the one that made it. tenant: whose it is."""

    endpoint: str
    tenant: str
    num_choices: int
    plan: Plan
    identity: Identity

    @classmethod
    def of(cls, endpoint: str, tenant: str, plan: Plan, identity: Identity) -> Recipe:
        return cls(endpoint, tenant, len(plan.requests), replace(plan, requests=()), identity)


encode_recipe = msgspec.msgpack.Encoder().encode
decode_recipe = msgspec.msgpack.Decoder(Recipe).decode
