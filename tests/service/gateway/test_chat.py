"""Chat requests that are refused, and fields without effect."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from typing import Any

import pytest
from chat_plans import MESSAGES, parse, plan, refusal, sampling
from pydantic import ValidationError
from small_models import CONTEXT_LENGTH

from nibble.service.gateway.chat import to_generation_requests
from nibble.service.gateway.chat_template import ChatTemplate
from nibble.service.gateway.errors import ContextLengthExceeded, InvalidRequest, NotFound
from nibble.service.gateway.plan import ClientContext
from nibble.service.gateway.served_model import ServedModel


def test_reported_fields(served_model: ServedModel) -> None:
    made = plan(
        served_model,
        stream=True,
        stream_options={"include_usage": True, "include_obfuscation": False},
        reasoning_effort="low",
        metadata={"a": "b"},
        store=True,
        best_of=3,
        nothing=None,
        chat_template_kwargs={"enable_thinking": False, "nothing": None},
        messages=[
            {"role": "user", "content": "x", "name": "ann", "weight": 0, "colour": "red", "copy": None},
            {"role": "assistant", "content": "y", "reasoning": "z", "annotations": [], "audio": None},
        ],
    )
    ignored = {"reasoning_effort", "metadata", "store", "best_of", "stream_options.include_obfuscation"}
    of_messages = {"messages.name", "messages.colour", "messages.reasoning"}
    assert set(made.ignored) == ignored | of_messages | {"chat_template_kwargs.enable_thinking"}
    assert made.include_usage
    knowing = "{{ enable_thinking }}{{ messages[0].name }}{{ messages[0].colour }}{{ messages[1].reasoning_content }}"
    model = dataclasses.replace(served_model, chat_template=ChatTemplate(knowing, {}))
    messages = [{"role": "user", "content": "x", "name": "ann", "colour": "red"}, {"role": "assistant", "content": "y"}]
    assert plan(model, messages=messages, chat_template_kwargs={"enable_thinking": False}).ignored == ()


@pytest.mark.parametrize(
    "fields",
    [
        {"frequency_penalty": 0, "presence_penalty": 0.0, "repetition_penalty": 1.0},
        {"logit_bias": {}, "logprobs": False, "top_logprobs": 0},
        {"tools": [], "tool_choice": "none", "functions": [], "function_call": "none"},
        {"response_format": {"type": "text"}, "modalities": ["text"], "audio": None, "web_search_options": None},
        {"frequency_penalty": None, "tools": None, "n": None, "stop": None, "stream_options": None, "metadata": None},
        {"metadata": {}, "store": False},
    ],
)
def test_neutral_values_are_accepted(served_model: ServedModel, fields: dict[str, Any]) -> None:
    assert plan(served_model, **fields).ignored == ()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("functions", [{"name": "f"}]),
        ("function_call", "auto"),
        ("modalities", ["text", "audio"]),
        ("audio", {"voice": "x", "format": "wav"}),
        ("web_search_options", {}),
    ],
)
def test_unsupported_field_is_named(served_model: ServedModel, field: str, value: object) -> None:
    error = refusal(served_model, **{field: value})
    assert isinstance(error, InvalidRequest)
    assert (error.param, error.code) == (field, "unsupported_parameter")
    assert f"{field} is not supported" in error.message


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages[0].content"),
        ({"messages": [*MESSAGES, {"role": "user", "content": [{"type": "text"}]}]}, "messages[1].content[0].text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0]",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "assistant", "content": "x", "audio": {"id": "1"}}]}, "messages[0].audio"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
        ({"max_tokens": 9, "max_completion_tokens": 8}, "max_tokens"),
        ({"stop_token_ids": [10**6]}, "stop_token_ids"),
        ({"stop_token_ids": list(range(257))}, "stop_token_ids"),
        ({"logit_bias": {"1000000": 1}}, "logit_bias"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"allowed_token_ids": [10**6]}, "allowed_token_ids"),
        ({"allowed_token_ids": [5], "logit_bias": {"5": -100}}, "allowed_token_ids"),
        ({"bad_words": [" "]}, "bad_words"),
        ({"bad_words": ["the quick brown fox jumps over the lazy dog " * 9]}, "bad_words"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"top_logprobs": 2, "logprobs": False}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
    ],
)
def test_what_contradicts_itself_is_refused(served_model: ServedModel, fields: dict[str, Any], param: str) -> None:
    error = refusal(served_model, **fields)
    assert (error.status, error.param) == (400, param)


def test_unknown_model(served_model: ServedModel) -> None:
    error = refusal(served_model, model="gpt-4o")
    assert isinstance(error, NotFound)
    assert (error.param, error.code) == ("model", "model_not_found")


def test_completion_that_does_not_fit_is_refused_with_numbers(served_model: ServedModel) -> None:
    room = sampling(served_model).max_tokens
    assert sampling(served_model, max_tokens=room).max_tokens == room
    error = refusal(served_model, max_tokens=room + 1)
    assert isinstance(error, ContextLengthExceeded)
    assert str(CONTEXT_LENGTH) in error.message
    assert str(CONTEXT_LENGTH + 1) in error.message


def test_prompt_that_does_not_fit_is_refused_with_numbers(served_model: ServedModel) -> None:
    words = "a b " * CONTEXT_LENGTH
    error = refusal(served_model, messages=[{"role": "user", "content": words}])
    assert isinstance(error, ContextLengthExceeded)
    assert str(CONTEXT_LENGTH) in error.message


def test_hopeless_prompt_is_refused_without_encoding_it(served_model: ServedModel) -> None:
    class Untouched:
        def encode_batch_fast(self, *_: object, **__: object) -> None:
            pytest.fail("encoded")

    model = dataclasses.replace(served_model, tokenizer=Untouched())
    assert isinstance(refusal(model, messages=[{"role": "user", "content": "x" * 10**6}]), ContextLengthExceeded)


async def test_long_prompt_does_not_hold_up_the_event_loop(served_model: ServedModel) -> None:
    model = dataclasses.replace(served_model, max_bytes_per_token=None)
    words = "The quick brown fox jumps. " * 60_000
    longest_s, last_s, is_done = 0.0, time.monotonic(), asyncio.Event()

    async def beat() -> None:
        nonlocal longest_s, last_s
        while not is_done.is_set():
            await asyncio.sleep(0)
            now_s = time.monotonic()
            longest_s, last_s = max(longest_s, now_s - last_s), now_s

    beating = asyncio.create_task(beat())
    started_s = time.monotonic()
    with pytest.raises(ContextLengthExceeded):
        await to_generation_requests(
            parse(messages=[{"role": "user", "content": words}]), model, ClientContext(request_id="x", arrival_s=0.0)
        )
    encoding_s = time.monotonic() - started_s
    is_done.set()
    await beating
    assert longest_s < encoding_s / 2, "the loop went on while the prompt was encoded"


def test_types_are_strict() -> None:
    for fields in ({"logprobs": 2}, {"top_logprobs": 21}, {"frequency_penalty": 2.5}, {"logit_bias": {"5": 101}}):
        with pytest.raises(ValidationError):
            parse(**fields)
    for fields in ({"temperature": "0.5"}, {"n": 1.5}, {"stream": "true"}, {"n": True}, {"messages": {}}):
        with pytest.raises(ValidationError):
            parse(**fields)
