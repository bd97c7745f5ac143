"""From chat requests to plans, for tests of what becomes of their fields."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from nibble.engine.protocol import SamplingParams
from nibble.service.gateway.chat import to_generation_requests
from nibble.service.gateway.errors import ApiError
from nibble.service.gateway.plan import ClientContext, Plan
from nibble.service.gateway.schema.chat import ChatCompletionRequest
from nibble.service.gateway.served_model import ServedModel

MESSAGES = [{"role": "user", "content": "The quick brown fox"}]


def parse(**fields: Any) -> ChatCompletionRequest:
    return ChatCompletionRequest.model_validate_json(json.dumps({"model": "small", "messages": MESSAGES, **fields}))


def plan(model: ServedModel, client: ClientContext | None = None, /, **fields: Any) -> Plan:
    client = client or ClientContext(request_id="chatcmpl-1", arrival_s=5.0)
    return asyncio.run(to_generation_requests(parse(**fields), model, client))


def sampling(model: ServedModel, **fields: Any) -> SamplingParams:
    return plan(model, **fields).requests[0].sampling


def prompt(model: ServedModel, **fields: Any) -> str:
    ids = plan(model, **fields).requests[0].prompt_token_ids
    return model.tokenizer.decode(ids, skip_special_tokens=False)


def refusal(model: ServedModel, /, **fields: Any) -> ApiError:
    with pytest.raises(ApiError) as raised:
        plan(model, **fields)
    return raised.value
