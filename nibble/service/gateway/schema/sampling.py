"""Fields that all endpoints share which generate text: how tokens are drawn, when they end, how they come back."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from nibble.engine.protocol import MAX_BAD_WORDS_TOKENS, MAX_COUNT, MAX_PENALTY, MIN_REPETITION_PENALTY
from nibble.engine.protocol import MAX_LOGPROBS as ENGINE_MAX_LOGPROBS

# OpenAI's own range is that of a signed 64-bit integer; the engine's key is unsigned, so both are taken.
MIN_SEED, MAX_SEED = -(2**63), 2**64 - 1
MAX_CHOICES = 128
MAX_STOPS = 4  # of a chat, as OpenAI has it
MAX_TEXT_STOPS = 16  # OpenAI has the same of a text; evaluation tasks send more
MAX_STOP_CHARS = 4096
MAX_LOGPROBS = ENGINE_MAX_LOGPROBS
MAX_BIAS = 100
MAX_ITEMS = 4096  # of lists that no other limit holds for: messages, parts of them
MAX_IDS = 1 << 20
MAX_CHOICE_TEXTS = 1 << 15
MAX_PRIORITY = 4000  # with what a service tier adds, within what the queue takes


def items(most: int = MAX_ITEMS, least: int | None = None) -> Any:
    """How many a list may have. All lists of a body have this: pydantic looks at all of a list and notes each error,
    which takes seconds for a body of some megabytes, and no other client is served in that time."""
    return Field(min_length=least, max_length=most, fail_fast=True)


def members(most: int) -> BeforeValidator:
    """The same of a mapping; pydantic's own limit is looked at last."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > most:
            raise ValueError(f"object should have at most {most} members, not {len(value)}")
        return value

    return BeforeValidator(check)


StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
LogitBias = dict[str, Annotated[float, Field(ge=-MAX_BIAS, le=MAX_BIAS)]]
TokenId = Annotated[int, Field(ge=0)]


class Body(BaseModel):
    """Base of what comes in as JSON."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True, allow_inf_nan=False)


class StreamOptions(Body):
    include_usage: bool | None = None


class JsonSchemaFormat(Body):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(Body):
    """vLLM's."""

    json_schema: Annotated[dict[str, Any] | str | None, Field(alias="json")] = None
    json_object: bool | None = None
    regex: str | None = None
    choice: Annotated[list[str], items(MAX_CHOICE_TEXTS)] | None = None
    grammar: str | None = None


class SamplingBody(Body):
    model: str

    # how tokens are drawn
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=MAX_COUNT)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=MIN_SEED, le=MAX_SEED)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(ge=MIN_REPETITION_PENALTY, le=MAX_PENALTY)] | None = None
    logit_bias: Annotated[LogitBias, members(MAX_ITEMS)] | None = None
    allowed_token_ids: Annotated[list[TokenId], items(MAX_IDS)] | None = None
    bad_words: Annotated[list[StopString], items(MAX_BAD_WORDS_TOKENS)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None

    # when to end
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    stop: StopString | Annotated[list[StopString], items(MAX_STOPS)] | None = None
    stop_token_ids: Annotated[list[TokenId], items(MAX_IDS)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None

    # what the text must be
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: Annotated[list[str], items(MAX_CHOICE_TEXTS)] | None = None
    guided_grammar: str | None = None

    # what comes back
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    skip_special_tokens: bool | None = None

    # who asks, and how urgently
    service_tier: Literal["auto", "default", "flex", "scale", "priority", "standard"] | None = None
    priority: Annotated[int, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] | None = None
    user: Annotated[str, Field(max_length=256)] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None
