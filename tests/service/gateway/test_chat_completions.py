"""POST /v1/chat/completions through a real server, a real broker and the `openai` client."""

from __future__ import annotations

import logging
import re
from typing import Any

import openai
import pytest
from chat_client import BODY, TEXT, chunks_of, events_of
from conftest import RunningGateway, wait_for
from synthetic_worker import CACHED_TOKENS

# The shape of answers


def test_whole_answer(running: RunningGateway) -> None:
    answer = running.openai().chat.completions.create(**BODY)
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", TEXT, "stop")
    assert answer.id.startswith("chatcmpl-")
    assert (answer.object, answer.model) == ("chat.completion", "small")
    assert re.fullmatch(r"nibble-[^-]+-small-synthetic", answer.system_fingerprint or "")
    request = running.worker.seen[-1]
    num_generated = len(running.gateway.model.encode(TEXT)) + 1
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(request.prompt_token_ids)
    assert answer.usage.completion_tokens == num_generated
    assert answer.usage.total_tokens == len(request.prompt_token_ids) + num_generated
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == CACHED_TOKENS
    assert answer.usage.completion_tokens_details is not None
    assert answer.usage.completion_tokens_details.reasoning_tokens == 0


def test_cached_tokens_are_known_where_a_stop_string_ended_the_answer(running: RunningGateway) -> None:
    """The gateway ends it; the worker's last event is never seen."""
    running.reply_with("one two three four")
    answer = running.openai().chat.completions.create(**{**BODY, "stop": "two"})
    assert answer.choices[0].message.content == "one "
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == CACHED_TOKENS


def test_stream_shape(running: RunningGateway) -> None:
    response = running.post({**BODY, "stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-accel-buffering"] == "no"
    chunks = chunks_of(response)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert all(set(delta) == {"content"} for delta in deltas[1:-1]), "the role comes once"
    assert deltas[-1] == {}
    assert "".join(delta.get("content", "") for delta in deltas) == TEXT
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["stop"]
    assert all("usage" not in chunk for chunk in chunks)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({(chunk["id"], chunk["created"], chunk["system_fingerprint"]) for chunk in chunks}) == 1


def test_usage_in_the_stream_comes_last_and_is_null_before(running: RunningGateway) -> None:
    whole = running.post(BODY).json()
    chunks = chunks_of(running.post({**BODY, "stream": True, "stream_options": {"include_usage": True}}))
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == whole["usage"]
    assert all(chunk["usage"] is None for chunk in chunks[:-1])


def test_stream_with_the_official_client(running: RunningGateway) -> None:
    with running.openai().chat.completions.stream(**BODY) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == TEXT
    assert final.choices[0].finish_reason == "stop"


async def test_async_client_streams(running: RunningGateway) -> None:
    async with running.openai_async() as client:
        stream = await client.chat.completions.create(**BODY, stream=True)
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert text == TEXT


def test_event_ids_count_tokens(running: RunningGateway) -> None:
    events = events_of(running.post({**BODY, "stream": True, "stream_options": {"include_usage": True}}))
    request_id = events[0][1]["id"]
    positions = [int((event_id or "").removeprefix(f"{request_id}:")) for event_id, _ in events[:-1]]
    num_generated = events[-2][1]["usage"]["completion_tokens"]
    assert positions == sorted(set(positions)), "a client can tell what it has from the last id"
    assert (positions[0], positions[-2:]) == (0, [num_generated + 1, num_generated + 2])


def test_tokens_in_larger_groups_give_the_same_answer(running: RunningGateway) -> None:
    alone = running.post(BODY).json()
    running.worker.tokens_per_step = 5
    grouped = running.post(BODY).json()
    assert grouped["choices"] == alone["choices"]
    assert grouped["usage"] == alone["usage"]


def test_length_is_reported(running: RunningGateway) -> None:
    answer = running.post({**BODY, "max_tokens": 3}).json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 3
    assert TEXT.startswith(answer["choices"][0]["message"]["content"])


def test_character_that_never_completes_is_one_replacement_character(running: RunningGateway) -> None:
    tokens = running.gateway.model.encode("😀")[:-1]
    running.worker.reply = lambda request: [*tokens, running.end_of_turn]
    chunks = chunks_of(running.post({**BODY, "stream": True}))
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text == running.post(BODY).json()["choices"][0]["message"]["content"] == "\ufffd"


# Stop strings, several choices, seeds


@pytest.mark.parametrize("stream", [False, True])
def test_stop_string_ends_the_answer_and_the_generation(running: RunningGateway, stream: bool) -> None:
    running.reply_with("one two <|stop|> three " + "four " * 100)
    body = {**BODY, "stop": ["never", "<|stop|>"], "stream": stream}
    response = running.post(body)
    if stream:
        chunks = chunks_of(response)
        contents = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
        assert not any("<" in content for content in contents), "no part of the stop string leaks"
        answer, reason = "".join(contents), chunks[-1]["choices"][0]["finish_reason"]
        request_id = chunks[0]["id"]
    else:
        choice = response.json()["choices"][0]
        answer, reason, request_id = choice["message"]["content"], choice["finish_reason"], response.json()["id"]
    assert (answer, reason) == ("one two ", "stop")
    wait_for(lambda: request_id in running.worker.dropped)


def test_stop_string_can_be_shown(running: RunningGateway) -> None:
    running.reply_with("one two three")
    answer = running.post({**BODY, "stop": "wo", "include_stop_str_in_output": True}).json()
    assert answer["choices"][0]["message"]["content"] == "one two"


def test_n_choices_whole_and_streamed_agree(running: RunningGateway) -> None:
    body = {"model": "small", "messages": [{"role": "user", "content": "random 20"}], "n": 3, "seed": 11}
    whole = running.post(body).json()
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2]
    texts = [choice["message"]["content"] for choice in whole["choices"]]
    assert len(set(texts)) == 3, "each choice has its own seed"
    chunks = chunks_of(running.post({**body, "stream": True, "stream_options": {"include_usage": True}}))
    streamed = ["", "", ""]
    for chunk in chunks[:-1]:
        (choice,) = chunk["choices"]
        streamed[choice["index"]] += choice["delta"].get("content", "")
    assert streamed == texts
    assert chunks[-1]["usage"] == whole["usage"]
    assert whole["usage"]["completion_tokens"] == 3 * 21
    assert whole["usage"]["prompt_tokens"] == len(running.worker.seen[-1].prompt_token_ids), "the prompt counts once"


def test_seed_decides(running: RunningGateway) -> None:
    def text(**fields: Any) -> str:
        body = {"model": "small", "messages": [{"role": "user", "content": "random 20"}], **fields}
        return str(running.post(body).json()["choices"][0]["message"]["content"])

    assert text(seed=1) == text(seed=1) != text(seed=2)
    assert text() != text(), "without a seed one is drawn"


# Fields that are not honoured


def test_ignored_fields_are_reported(running: RunningGateway, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    extra = {"metadata": {"a": "b"}, "best_of": 2, "weird\r\nx: y": 1}
    response = running.post({**BODY, **extra})
    assert response.status_code == 200
    assert response.headers["x-nibble-ignored"] == "metadata,best_of,weird%0D%0Ax%3A%20y"
    assert running.post({**BODY, "stream": True, **extra}).headers["x-nibble-ignored"].startswith("metadata")
    assert "x-nibble-ignored" not in running.post(BODY).headers
    assert any("ignored=metadata,best_of" in record.getMessage() for record in caplog.records)


def test_unsupported_field_is_refused_by_name(running: RunningGateway) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        running.openai().chat.completions.create(**BODY, functions=[{"name": "f"}])
    assert raised.value.param == "functions"
    assert "functions is not supported; send tools" in str(raised.value)
