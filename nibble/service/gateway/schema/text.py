"""The body of POST /v1/completions; what it shares with chat is in `sampling.py`.

Source: https://platform.openai.com/docs/api-reference/completions/create.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from nibble.service.gateway.schema.sampling import (
    MAX_CHOICES,
    MAX_IDS,
    MAX_LOGPROBS,
    MAX_TEXT_STOPS,
    SamplingBody,
    StopString,
    TokenId,
    items,
)

TokenIds = Annotated[list[TokenId], items(MAX_IDS, 1)]
MAX_PROMPTS = MAX_CHOICES


class CompletionRequest(SamplingBody):
    prompt: (
        str | TokenIds | Annotated[list[str], items(MAX_PROMPTS, 1)] | Annotated[list[TokenIds], items(MAX_PROMPTS, 1)]
    )
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    stop: StopString | Annotated[list[StopString], items(MAX_TEXT_STOPS)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1)] | None = None
    suffix: str | None = None
    add_special_tokens: bool | None = None
