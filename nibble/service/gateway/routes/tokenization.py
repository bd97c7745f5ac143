"""POST /tokenize: a text or the messages of a chat to token ids; POST /detokenize: back; GET /tokenizer_info."""

from __future__ import annotations

import asyncio
from typing import TypeVar

import msgspec
from fastapi import APIRouter, Request
from pydantic import BaseModel, ValidationError
from starlette.responses import Response

from nibble.service.broker.errors import BrokerError
from nibble.service.gateway.chat import prompt_token_ids
from nibble.service.gateway.errors import InvalidRequest, from_validation, model_not_found
from nibble.service.gateway.field_support import ignored_header, set_extras
from nibble.service.gateway.routes.body import body_schema, gateway_of, json_response, read_body
from nibble.service.gateway.schema.tokenization import DetokenizeRequest, TokenizeChatRequest, TokenizeTextRequest
from nibble.service.gateway.served_model import ServedModel
from nibble.service.gateway.text import encode

router = APIRouter(tags=["tokenization"])

T = TypeVar("T", bound=BaseModel)


class _Kind(msgspec.Struct):
    messages: msgspec.Raw = msgspec.Raw(b"null")


@router.post("/tokenize", openapi_extra=body_schema(TokenizeTextRequest, TokenizeChatRequest))
async def tokenize(request: Request) -> Response:
    """The token ids of a prompt, or of the prompt that messages make."""
    gateway = gateway_of(request)
    body = await read_body(request, gateway.settings.max_body_bytes)
    asked: TokenizeTextRequest | TokenizeChatRequest
    asked = _validated(body, TokenizeChatRequest) if _has_messages(body) else _validated(body, TokenizeTextRequest)
    _check_model(asked.model, gateway.model)
    if isinstance(asked, TokenizeChatRequest):
        token_ids = await prompt_token_ids(asked, gateway.model)
    else:
        token_ids = await encode(asked.prompt, gateway.model, asked.add_special_tokens is not False)
    try:
        context_length = (await gateway.fleet()).model.context_length
    except BrokerError:  # a token is a token all the same
        context_length = gateway.model.context_length
    texts = [gateway.model.tokenizer.id_to_token(token_id) for token_id in token_ids]
    answer = {
        "count": len(token_ids),
        "max_model_len": context_length,
        "tokens": token_ids,
        "token_strs": texts if asked.return_token_strs else None,
    }
    return _answer(answer, asked)


@router.post("/detokenize", openapi_extra=body_schema(DetokenizeRequest))
async def detokenize(request: Request) -> Response:
    """The text of token ids, special tokens included."""
    gateway = gateway_of(request)
    asked = _validated(await read_body(request, gateway.settings.max_body_bytes), DetokenizeRequest)
    model = gateway.model
    _check_model(asked.model, model)
    if asked.tokens and max(asked.tokens) >= model.vocab_size:
        message = f"tokens: token id {max(asked.tokens)} is outside the vocabulary of {model.vocab_size}"
        raise InvalidRequest(message, param="tokens")
    text = await asyncio.to_thread(model.tokenizer.decode, asked.tokens, skip_special_tokens=False)
    return _answer({"prompt": text}, asked)


@router.get("/tokenizer_info")
async def tokenizer_info(request: Request) -> Response:
    """What a client needs beside these two to do without the tokenizer's files."""
    model = gateway_of(request).model
    special_tokens = {name: model.special_tokens.get(name) for name in ("bos_token", "eos_token", "pad_token")}
    template = model.chat_template
    return json_response({**special_tokens, "chat_template": template.source if template else None})


def _has_messages(body: bytes) -> bool:
    try:
        return msgspec.json.decode(body, type=_Kind).messages != msgspec.Raw(b"null")
    except msgspec.MsgspecError:  # validation says what is wrong
        return False


def _validated(body: bytes, model: type[T]) -> T:
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise from_validation(error) from error


def _check_model(name: str | None, model: ServedModel) -> None:
    if name and name != model.name:
        raise model_not_found(name)


def _answer(value: dict[str, object], asked: BaseModel) -> Response:
    response = json_response(value)
    if ignored := set_extras(asked.model_extra):
        response.headers["x-nibble-ignored"] = ignored_header(tuple(ignored))
    return response
