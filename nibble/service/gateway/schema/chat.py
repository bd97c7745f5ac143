"""The body of POST /v1/chat/completions: every field of the OpenAI API and the widely used extras, with their types.

What it shares with other endpoints is in `sampling.py` beside it. Which fields are honoured is decided in the gateway's
`chat.py`, `sampling.py` and `field_support.py`. Types are strict (no "0.5" for 0.5); null means absent. Unknown fields
are kept, so that they can be reported.
Source: https://platform.openai.com/docs/api-reference/chat/create and the `openai` package's types.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from nibble.service.gateway.schema.sampling import MAX_ITEMS, MAX_LOGPROBS, Body, SamplingBody, items, members

MAX_TOOLS = 128


class ContentPart(Body):
    type: str
    text: str | None = None
    refusal: str | None = None


class FunctionCall(Body):
    name: str
    arguments: str  # JSON, as the model wrote it


class ToolCall(Body):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[ContentPart], items()] | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], items()] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None  # another name of the same
    audio: dict[str, Any] | None = None
    function_call: dict[str, Any] | None = None


class FunctionDefinition(Body):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: FunctionDefinition


class FunctionName(Body):
    name: str


class ToolReference(Body):
    type: Literal["function"]
    function: FunctionName


class AllowedTools(Body):
    mode: Literal["auto", "required"]
    tools: Annotated[list[ToolReference], items(MAX_TOOLS, 1)]


class ToolChoice(Body):
    type: Literal["function", "allowed_tools"]
    function: FunctionName | None = None
    allowed_tools: AllowedTools | None = None


class ChatCompletionRequest(SamplingBody):
    messages: Annotated[list[Message], items(least=1)]
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    # what comes back
    modalities: Annotated[list[str], items()] | None = None
    audio: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None

    # how the prompt is made
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    tools: Annotated[list[Tool], items(MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    functions: Annotated[list[dict[str, Any]], items()] | None = None
    function_call: str | dict[str, Any] | None = None
    web_search_options: dict[str, Any] | None = None
    prediction: dict[str, Any] | None = None
    moderation: dict[str, Any] | None = None

    # who asks
    safety_identifier: Annotated[str, Field(max_length=256)] | None = None
    prompt_cache_key: Annotated[str, Field(max_length=256)] | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    metadata: Annotated[dict[str, str], members(MAX_ITEMS)] | None = None
    store: bool | None = None
