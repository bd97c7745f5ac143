"""The body of POST /v1/responses. Strict types; null means absent; unknown fields are kept, to be reported.

Which of them are honoured: `response_request.py`.
Source: https://platform.openai.com/docs/api-reference/responses/create and the `openai` package's types.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from nibble.service.gateway.schema.chat import MAX_TOOLS
from nibble.service.gateway.schema.sampling import MAX_LOGPROBS, Body, items, members

MAX_METADATA = 16
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=MAX_METADATA)
]


class ItemPart(Body):
    type: str
    text: str | None = None
    refusal: str | None = None


Parts = Annotated[list[ItemPart], items()]


class Item(Body):
    """One of an input: a message, or something that an earlier response put out, or its answer."""

    type: str | None = None  # absent: a message
    id: str | None = None
    status: str | None = None
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | Parts | None = None
    summary: Parts | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | Parts | None = None


class TextFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")] | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class TextConfig(Body):
    format: TextFormat | None = None
    verbosity: str | None = None


class Reasoning(Body):
    effort: str | None = None
    summary: str | None = None


class ResponseStreamOptions(Body):
    include_obfuscation: bool | None = None


class ResponseRequest(Body):
    model: str
    input: str | Annotated[list[Item], items(least=1)]
    instructions: str | None = None
    previous_response_id: str | None = None

    # how tokens are drawn, and when to end
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None

    # what comes back
    text: TextConfig | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    include: Annotated[list[str], items()] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    store: bool | None = None
    metadata: Annotated[Metadata, members(MAX_METADATA)] | None = None
    background: bool | None = None
    background_options: dict[str, Any] | None = None
    image: dict[str, Any] | None = None
    moderation: dict[str, Any] | None = None

    # tools and reasoning
    tools: Annotated[list[dict[str, Any]], items(MAX_TOOLS)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    max_tool_calls: Annotated[int, Field(ge=1)] | None = None
    reasoning: Reasoning | None = None

    # where the prompt comes from
    truncation: Literal["auto", "disabled"] | None = None
    conversation: str | dict[str, Any] | None = None
    prompt: dict[str, Any] | None = None
    context_management: Annotated[list[dict[str, Any]], items()] | None = None

    # who asks, and how urgently
    service_tier: Literal["auto", "default", "flex", "scale", "priority", "standard"] | None = None
    user: Annotated[str, Field(max_length=256)] | None = None
    safety_identifier: Annotated[str, Field(max_length=256)] | None = None
    prompt_cache_key: Annotated[str, Field(max_length=256)] | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    access_programs: dict[str, Any] | None = None
