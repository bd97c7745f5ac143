"""The JSON of one choice, in a chunk of a stream and in a whole answer: that of chat, and that of plain text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from nibble.service.gateway.answer_parser import Answer, Parts
from nibble.service.gateway.logprobs import TokenLogprob
from nibble.service.gateway.tool_call_parser import CallDelta

Logprobs = Sequence[TokenLogprob]


class Shape(Protocol):
    """`logprobs` is None where none were asked for; parts None: there are no more."""

    chunk_object: str
    whole_object: str

    def opening(self, choice: int) -> dict[str, Any] | None:
        """The first chunk's choice, before there is any text."""

    def chunk(
        self, choice: int, parts: Parts | None, logprobs: Logprobs | None, finish_reason: str | None
    ) -> dict[str, Any]: ...

    def whole(self, choice: int, answer: Answer, logprobs: Logprobs | None, finish_reason: str) -> dict[str, Any]: ...


class ChatShape:
    """Source: https://platform.openai.com/docs/api-reference/chat."""

    chunk_object = "chat.completion.chunk"
    whole_object = "chat.completion"

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self._token_bytes = token_bytes

    def opening(self, choice: int) -> dict[str, Any] | None:
        return self._chunk(choice, {"role": "assistant", "content": ""}, None, None)

    def chunk(
        self, choice: int, parts: Parts | None, logprobs: Logprobs | None, finish_reason: str | None
    ) -> dict[str, Any]:
        return self._chunk(choice, {} if parts is None else _delta(parts), logprobs, finish_reason)

    def whole(self, choice: int, answer: Answer, logprobs: Logprobs | None, finish_reason: str) -> dict[str, Any]:
        return {
            "index": choice,
            "message": _message(answer),
            "logprobs": self._logprobs(logprobs),
            "finish_reason": finish_reason,
        }

    def _chunk(
        self, choice: int, delta: dict[str, Any], logprobs: Logprobs | None, finish_reason: str | None
    ) -> dict[str, Any]:
        return {
            "index": choice,
            "delta": delta,
            "logprobs": self._logprobs(logprobs),
            "finish_reason": finish_reason,
        }

    def _logprobs(self, logprobs: Logprobs | None) -> dict[str, Any] | None:
        if logprobs is None:
            return None
        content = [
            {
                **self._token(token.token_id, token.logprob),
                "top_logprobs": [self._token(token_id, logprob) for token_id, logprob in token.top],
            }
            for token in logprobs
        ]
        return {"content": content, "refusal": None}

    def _token(self, token_id: int, logprob: float | None) -> dict[str, Any]:
        own_bytes = self._token_bytes(token_id)
        return {"token": own_bytes.decode(errors="replace"), "logprob": logprob, "bytes": list(own_bytes)}


def _delta(parts: Parts) -> dict[str, Any]:
    reasoning, content, calls = parts
    delta: dict[str, Any] = {"content": content} if content or not (reasoning or calls) else {}
    if reasoning:
        delta |= {"reasoning_content": reasoning, "reasoning": reasoning}
    if calls:
        delta["tool_calls"] = [_call_delta(call) for call in calls]
    return delta


def _call_delta(call: CallDelta) -> dict[str, Any]:
    if call.name is None:
        return {"index": call.call, "function": {"arguments": call.arguments}}
    function = {"name": call.name, "arguments": call.arguments}
    return {"index": call.call, "id": call.id, "type": "function", "function": function}


def _message(answer: Answer) -> dict[str, Any]:
    content = None if answer.calls and not answer.content else answer.content
    message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None, "annotations": []}
    if answer.reasoning:
        message |= {"reasoning_content": answer.reasoning, "reasoning": answer.reasoning}
    if answer.calls:
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in answer.calls
        ]
    return message


class TextShape:
    """Source: https://platform.openai.com/docs/api-reference/completions."""

    chunk_object = whole_object = "text_completion"

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self._token_bytes = token_bytes

    def opening(self, choice: int) -> dict[str, Any] | None:
        return None

    def chunk(
        self, choice: int, parts: Parts | None, logprobs: Logprobs | None, finish_reason: str | None
    ) -> dict[str, Any]:
        return {
            "index": choice,
            "text": parts.content if parts is not None else "",
            "logprobs": self._logprobs(logprobs),
            "finish_reason": finish_reason,
        }

    def whole(self, choice: int, answer: Answer, logprobs: Logprobs | None, finish_reason: str) -> dict[str, Any]:
        return self.chunk(choice, Parts("", answer.content, ()), logprobs, finish_reason)

    def _logprobs(self, logprobs: Logprobs | None) -> dict[str, Any] | None:
        if logprobs is None:
            return None
        return {
            "text_offset": [token.start for token in logprobs],
            "tokens": [self._token(token.token_id) for token in logprobs],
            "token_logprobs": [token.logprob for token in logprobs],
            "top_logprobs": [self._top(token) for token in logprobs],
        }

    def _top(self, token: TokenLogprob) -> dict[str, float] | None:
        """The token itself is always among them."""
        if token.logprob is None:
            return None
        top = {self._token(token_id): logprob for token_id, logprob in reversed(token.top)}
        return {**top, self._token(token.token_id): token.logprob}

    def _token(self, token_id: int) -> str:
        """A part of a character is written as bytes: as text, all of them would be one."""
        own_bytes = self._token_bytes(token_id)
        try:
            return own_bytes.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in own_bytes)
