"""The bodies of POST /tokenize and /detokenize. vLLM's names and meaning; without `model` it is the served one."""

from __future__ import annotations

from typing import Annotated

from nibble.service.gateway.schema.chat import ChatCompletionRequest
from nibble.service.gateway.schema.sampling import MAX_IDS, Body, TokenId, items


class TokenizeTextRequest(Body):
    model: str | None = None
    prompt: str
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class TokenizeChatRequest(ChatCompletionRequest):
    """What the prompt of such a chat would be: any other field of the chat may be there too."""

    model: str = ""
    return_token_strs: bool | None = None


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: Annotated[list[TokenId], items(MAX_IDS)]
