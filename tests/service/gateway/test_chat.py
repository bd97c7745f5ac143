"""From a chat request to generation requests: what each field does, and what is refused."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import time
from typing import Any

import pytest
from pydantic import ValidationError
from small_models import CONTEXT_LENGTH, VOCAB_ROOM
from tokenizers import Tokenizer

from nibble.engine.protocol import SamplingParams
from nibble.service.broker.gateway_calls import MAX_PRIORITY
from nibble.service.gateway.chat import to_generation_requests
from nibble.service.gateway.chat_template import ChatTemplate
from nibble.service.gateway.errors import ApiError, ContextLengthExceeded, InvalidRequest, NotFound
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


def test_prompt_is_the_rendered_template(served_model: ServedModel, byte_level: Tokenizer) -> None:
    ids = plan(served_model).requests[0].prompt_token_ids
    text = "<|im_start|>user\nThe quick brown fox<|im_end|>\n<|im_start|>assistant\n"
    assert byte_level.decode(ids, skip_special_tokens=False) == text
    assert ids[0] == byte_level.token_to_id("<|im_start|>"), "the template's markers are single tokens"


def test_defaults(served_model: ServedModel) -> None:
    made = plan(served_model)
    request = made.requests[0]
    params = request.sampling
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (1.0, 1.0, 0, 0.0)
    assert set(params.stop_token_ids) == served_model.eos_token_ids
    assert len(request.prompt_token_ids) + params.max_tokens == CONTEXT_LENGTH, "fills the context, and no more"
    assert (request.priority, request.tenant, request.arrival_s, request.deadline_s) == (0, "", 5.0, None)
    assert (made.stream, made.include_usage, made.stops, made.ignored) == (False, False, (), ())


@pytest.mark.parametrize(
    ("field", "value", "attribute", "expected"),
    [
        ("temperature", 0, "temperature", 0.0),
        ("temperature", 2, "temperature", 2.0),
        ("top_p", 0.25, "top_p", 0.25),
        ("top_k", 40, "top_k", 40),
        ("top_k", -1, "top_k", 0),
        ("top_k", 2**31 - 1, "top_k", 2**31 - 1),
        ("min_p", 0.125, "min_p", 0.125),
        ("seed", 7, "seed", 7),
        ("seed", -1, "seed", 2**64 - 1),
        ("seed", 2**64 - 1, "seed", 2**64 - 1),
        ("frequency_penalty", 0.5, "frequency_penalty", 0.5),
        ("presence_penalty", -2, "presence_penalty", -2.0),
        ("repetition_penalty", 1.25, "repetition_penalty", 1.25),
        ("logit_bias", {"5": 1.5, "7": -99}, "logit_bias", ((5, 1.5), (7, -99.0))),
        ("logit_bias", {"5": -100}, "logit_bias", ((5, -math.inf),)),
        ("allowed_token_ids", [5, 7], "allowed_token_ids", (5, 7)),
        ("logprobs", True, "logprobs", 0),
        ("logprobs", False, "logprobs", None),
        ("max_tokens", 9, "max_tokens", 9),
        ("max_completion_tokens", 9, "max_tokens", 9),
        ("min_tokens", 4, "min_tokens", 4),
        ("ignore_eos", True, "stop_token_ids", ()),
    ],
)
def test_field_reaches_the_engine(
    served_model: ServedModel, field: str, value: object, attribute: str, expected: object
) -> None:
    assert getattr(sampling(served_model, **{field: value}), attribute) == expected


def test_stop_token_ids_join_the_end_of_sequence(served_model: ServedModel) -> None:
    assert set(sampling(served_model, stop_token_ids=[9, 5]).stop_token_ids) == {5, 9} | served_model.eos_token_ids
    assert sampling(served_model, stop_token_ids=[5], ignore_eos=True).stop_token_ids == (5,)


def test_missing_seed_is_drawn(served_model: ServedModel) -> None:
    seeds = {sampling(served_model).seed for _ in range(8)}
    assert len(seeds) == 8
    assert all(0 <= seed < 2**64 for seed in seeds)


def test_choices_have_their_own_names_and_seeds(served_model: ServedModel) -> None:
    first, again = (plan(served_model, n=3, seed=5).requests for _ in range(2))
    assert [request.request_id for request in first] == ["chatcmpl-1", "chatcmpl-1.1", "chatcmpl-1.2"]
    seeds = [request.sampling.seed for request in first]
    assert seeds[0] == 5, "the first choice is the one that n=1 gives"
    assert len(set(seeds)) == 3
    assert seeds == [request.sampling.seed for request in again]


def test_default_max_tokens_of_the_deployment(served_model: ServedModel) -> None:
    client = ClientContext(request_id="x", arrival_s=0.0, default_max_tokens=11)
    assert plan(served_model, client).requests[0].sampling.max_tokens == 11
    client = dataclasses.replace(client, default_max_tokens=10**6)
    params = plan(served_model, client).requests[0]
    assert params.sampling.max_tokens == CONTEXT_LENGTH - len(params.prompt_token_ids)


@pytest.mark.parametrize(
    ("fields", "tenant"),
    [
        ({"user": "ann"}, "ann"),
        ({"user": "ann", "safety_identifier": "bob"}, "bob"),
        ({"prompt_cache_key": "key"}, "key"),
        ({}, ""),
    ],
)
def test_tenant_is_who_asks(served_model: ServedModel, fields: dict[str, str], tenant: str) -> None:
    assert plan(served_model, **fields).requests[0].tenant == tenant
    keyed = plan(served_model, ClientContext(request_id="x", arrival_s=0.0, tenant="0a1b"), **fields)
    assert keyed.requests[0].tenant == (f"0a1b:{tenant}" if tenant else "0a1b")


def test_service_tier_orders_the_queue(served_model: ServedModel) -> None:
    tiers = ["priority", "auto", "flex"]
    plans = [plan(served_model, service_tier=tier) for tier in tiers]
    priorities = [made.requests[0].priority for made in plans]
    assert priorities == sorted(priorities)
    assert len(set(priorities)) == 3
    assert [made.service_tier for made in plans] == ["priority", "default", "flex"]


def test_a_priority_orders_within_a_tier_and_beyond(served_model: ServedModel) -> None:
    assert plan(served_model, priority=-3).requests[0].priority == -3
    flex = plan(served_model, service_tier="flex").requests[0].priority
    assert plan(served_model, service_tier="flex", priority=2).requests[0].priority == flex + 2
    extremes = [plan(served_model, service_tier=t, priority=p) for t, p in (("flex", 4000), ("priority", -4000))]
    assert all(abs(made.requests[0].priority) <= MAX_PRIORITY for made in extremes), "the queue takes it"


def test_a_salt_separates_caches_within_an_api_keys_own(served_model: ServedModel) -> None:
    def salt(scope: str = "", **fields: str) -> str:
        client = ClientContext(request_id="x", arrival_s=0.0, tenant="0a1b", cache_scope=scope)
        return plan(served_model, client, **fields).requests[0].cache_salt

    assert salt() == salt(user="ann") == ""
    assert len({salt(), salt(cache_salt="a"), salt("0a1b"), salt("0a1b", cache_salt="a"), salt(cache_salt="0a1b")}) == 5


@pytest.mark.parametrize(("stop", "expected"), [("x", ("x",)), (["a", "b"], ("a", "b")), ([], ()), (None, ())])
def test_stop_strings(served_model: ServedModel, stop: object, expected: tuple[str, ...]) -> None:
    assert plan(served_model, stop=stop).stops == expected


def test_text_parts_are_joined(served_model: ServedModel) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert "user\none\ntwo<" in prompt(served_model, messages=[{"role": "user", "content": parts}])


def test_developer_is_system_for_a_template_that_does_not_know_it(served_model: ServedModel) -> None:
    messages = [{"role": "developer", "content": "be brief"}, *MESSAGES]
    assert prompt(served_model, messages=messages).startswith("<|im_start|>system\nbe brief")
    template = ChatTemplate("{{ messages[0].role }}{# developer #}", {})
    knowing = dataclasses.replace(served_model, chat_template=template)
    assert prompt(knowing, messages=messages) == "developer"


def test_tool_arguments_reach_the_template_as_objects(served_model: ServedModel) -> None:
    source = "{# tools #}{{ messages[0].tool_calls[0].function.arguments.city }}|{{ messages[1].content }}"
    template = ChatTemplate(source, {})
    model = dataclasses.replace(served_model, chat_template=template)
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"city": "Rome"}'}}
    messages = [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "sunny"},
    ]
    assert prompt(model, messages=messages) == "Rome|sunny"
    call["function"] = {"name": "f", "arguments": "{city"}
    assert prompt(model, messages=messages) == "|sunny"


def test_arguments_that_are_no_json_reach_the_template_as_text(served_model: ServedModel) -> None:
    """Without a grammar a model can write such, and the conversation goes on."""
    calls = [
        {"id": str(i), "type": "function", "function": {"name": "f", "arguments": text}}
        for i, text in enumerate(("{city", ""))
    ]
    messages = [
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "tool_call_id": "0", "content": "these are no arguments"},
    ]
    for source in (
        "{# tools #}{% for call in messages[0].tool_calls %}{{ call.function.arguments | tojson }};{% endfor %}",
        "{# tools #}{% for call in messages[0].tool_calls %}{{ '' + call.function.arguments }};{% endfor %}",
    ):
        text = prompt(dataclasses.replace(served_model, chat_template=ChatTemplate(source, {})), messages=messages)
        assert "{city" in text
        assert text.endswith("{};")
    assert "{city" in prompt(served_model, messages=messages)


def test_generation_prompt_and_continuation(served_model: ServedModel) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "It jumps"}]
    assert prompt(served_model, add_generation_prompt=False).endswith("fox<|im_end|>\n")
    assert prompt(served_model, messages=messages, continue_final_message=True).endswith("assistant\nIt jumps")
    error = refusal(served_model, messages=messages, continue_final_message=True, add_generation_prompt=True)
    assert error.param == "continue_final_message"


def test_template_variables_are_passed_on(served_model: ServedModel) -> None:
    model = dataclasses.replace(served_model, chat_template=ChatTemplate("{{ enable_thinking }}", {}))
    assert prompt(model, chat_template_kwargs={"enable_thinking": False}) == "False"
    error = refusal(model, chat_template_kwargs={"messages": []})
    assert error.param == "chat_template_kwargs.messages"


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


def test_refusals_are_what_the_assistant_said(served_model: ServedModel) -> None:
    for said in (
        {"content": None, "refusal": "I won't."},
        {"content": [{"type": "refusal", "refusal": "I won't."}]},
        {"content": [{"type": "text", "text": "I"}, {"type": "refusal", "refusal": "won't."}]},
    ):
        messages = [*MESSAGES, {"role": "assistant", **said}, {"role": "user", "content": "Why?"}]
        text = prompt(served_model, messages=messages)
        assert "assistant\nI won't.<|im_end|>" in text.replace("I\nwon't", "I won't")
    part = [{"type": "refusal", "refusal": "no"}]
    assert refusal(served_model, messages=[{"role": "user", "content": part}]).param == "messages[0].content[0]"
    part = [{"type": "refusal"}]
    error = refusal(served_model, messages=[*MESSAGES, {"role": "assistant", "content": part}])
    assert error.param == f"messages[{len(MESSAGES)}].content[0].refusal"


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


def test_top_logprobs_are_counted(served_model: ServedModel) -> None:
    assert sampling(served_model, logprobs=True, top_logprobs=20).logprobs == 20
    assert plan(served_model, logprobs=True, top_logprobs=3).num_logprobs == 3


def test_bad_words_are_forbidden_with_and_without_a_space_before(served_model: ServedModel) -> None:
    words = sampling(served_model, bad_words=["fox"]).bad_words_token_ids
    assert words[0] == tuple(served_model.encode("fox"))
    assert {served_model.tokenizer.decode(word).strip() for word in words} == {"fox"}


def test_ids_of_a_padded_vocabulary_can_stop(served_model: ServedModel) -> None:
    last = served_model.tokenizer.get_vocab_size() + VOCAB_ROOM - 1
    assert last in sampling(served_model, stop_token_ids=[last]).stop_token_ids
    assert refusal(served_model, stop_token_ids=[last + 1]).param == "stop_token_ids"


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


def test_model_without_template(served_model: ServedModel) -> None:
    assert refusal(dataclasses.replace(served_model, chat_template=None)).code == "no_chat_template"


def test_template_that_refuses_is_a_bad_request(served_model: ServedModel) -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", {})
    error = refusal(dataclasses.replace(served_model, chat_template=template))
    assert (error.status, error.param) == (400, "messages")
    assert "roles must alternate" in error.message


def test_types_are_strict() -> None:
    for fields in ({"logprobs": 2}, {"top_logprobs": 21}, {"frequency_penalty": 2.5}, {"logit_bias": {"5": 101}}):
        with pytest.raises(ValidationError):
            parse(**fields)
    for fields in ({"temperature": "0.5"}, {"n": 1.5}, {"stream": "true"}, {"n": True}, {"messages": {}}):
        with pytest.raises(ValidationError):
            parse(**fields)
