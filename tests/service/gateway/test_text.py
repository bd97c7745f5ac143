"""POST /v1/completions through a real server, a real broker and the `openai` client."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from conftest import RunningGateway
from small_models import CONTEXT_LENGTH
from synthetic_worker import logprob_of

ANSWER = " jumps 😀 over"
PROMPT = "The quick brown fox"


@pytest.fixture(autouse=True)
def _answers(running: RunningGateway) -> None:
    running.reply_with(ANSWER)


def complete(running: RunningGateway, prompt: Any = PROMPT, **fields: Any) -> Any:
    return running.openai().completions.create(**{"model": "small", "prompt": prompt, "max_tokens": 50, **fields})


def refusal(running: RunningGateway, **fields: Any) -> Any:
    response = httpx.post(f"{running.url}/v1/completions", json={"model": "small", **fields}, timeout=30)
    assert response.status_code == 400
    return response.json()["error"]


def test_whole_answer(running: RunningGateway) -> None:
    answer = complete(running)
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason, choice.index, choice.logprobs) == (ANSWER, "stop", 0, None)
    assert (answer.object, answer.model) == ("text_completion", "small")
    assert answer.id.startswith("cmpl-")
    request = running.worker.seen[-1]
    assert request.prompt_token_ids == running.gateway.model.encode(PROMPT, add_special_tokens=True)
    assert answer.usage.prompt_tokens == len(request.prompt_token_ids)
    assert answer.usage.completion_tokens == len(running.gateway.model.encode(ANSWER)) + 1


def test_stream_has_the_same_text(running: RunningGateway) -> None:
    chunks = list(complete(running, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == ANSWER
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens > 0
    assert all(chunk.object == "text_completion" for chunk in chunks)


def test_as_many_stop_strings_as_evaluation_tasks_have(running: RunningGateway) -> None:
    stops = [f"never {i}" for i in range(15)]
    answer = complete(running, stop=[*stops, " over"])
    assert answer.choices[0].text == ANSWER.removesuffix(" over")
    error = refusal(running, prompt=PROMPT, stop=[*stops, "a", "b"])
    assert (error["param"], "at most 16 items" in error["message"]) == ("stop", True)


def test_sixteen_tokens_unless_asked_for_more(running: RunningGateway) -> None:
    running.openai().completions.create(model="small", prompt=PROMPT)
    assert running.worker.seen[-1].sampling.max_tokens == 16


def test_prompts_may_be_ids_and_many(running: RunningGateway) -> None:
    ids = running.gateway.model.encode(PROMPT)
    assert complete(running, ids).choices[0].text == ANSWER
    assert running.worker.seen[-1].prompt_token_ids == ids
    answer = complete(running, [ids, ids[:2]], n=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage.prompt_tokens == len(ids) + 2
    seen = {request.request_id[-2:]: request for request in running.worker.seen[-4:]}
    assert sorted(len(request.prompt_token_ids) for request in seen.values()) == [2, 2, len(ids), len(ids)]
    assert len(complete(running, ["a", "b", "c"]).choices) == 3


def test_logprobs(running: RunningGateway) -> None:
    """The token that ended the answer has an entry too, without being a part of the text."""
    choice = complete(running, logprobs=2).choices[0]
    ids = [*running.gateway.model.encode(ANSWER), running.end_of_turn]
    check_logprobs(running, choice.text + "<|im_end|>", choice.logprobs, ids)
    assert choice.text == ANSWER


def check_logprobs(running: RunningGateway, text: str, logprobs: Any, ids: list[int]) -> None:
    token_bytes = running.gateway.model.token_bytes
    assert logprobs.token_logprobs == [logprob_of(token_id) for token_id in ids]
    for token, token_id, offset, top in zip(
        logprobs.tokens, ids, logprobs.text_offset, logprobs.top_logprobs, strict=True
    ):
        assert top[token] == logprob_of(token_id)
        assert len(top) == 3
        if token.startswith("bytes:"):
            assert token == "bytes:" + "".join(f"\\x{byte:02x}" for byte in token_bytes(token_id))
        else:
            assert text[offset : offset + len(token)] == token


def test_streamed_logprobs_are_those_of_the_whole_answer(running: RunningGateway) -> None:
    whole = complete(running, logprobs=2).choices[0].logprobs.model_dump()
    parts = [chunk.choices[0].logprobs for chunk in complete(running, logprobs=2, stream=True)]
    for name, values in whole.items():
        assert [value for part in parts if part for value in getattr(part, name)] == values


@pytest.mark.parametrize("stream", [False, True])
def test_echo_begins_with_the_prompt_and_its_logprobs(running: RunningGateway, stream: bool) -> None:
    """What evaluation harnesses ask for: of the entries, all but that of the one token asked for are the prompt's."""
    answer = complete(running, echo=True, logprobs=1, stream=stream)
    chunks = list(answer) if stream else [answer]
    parts = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
    text = "".join(chunk.choices[0].text for chunk in chunks)
    request = running.worker.seen[-1]
    ids = [*request.prompt_token_ids, *running.gateway.model.encode(ANSWER), running.end_of_turn]
    assert text == PROMPT + ANSWER
    logprobs = [value for part in parts for value in part.token_logprobs]
    assert logprobs == [None, *(logprob_of(token_id) for token_id in ids[1:])]
    assert parts[0].top_logprobs[0] is None
    offsets = [value for part in parts for value in part.text_offset]
    tokens = [value for part in parts for value in part.tokens]
    assert all(
        (text + "<|im_end|>")[offset : offset + len(token)] == token
        for offset, token in zip(offsets, tokens, strict=True)
        if not token.startswith("bytes:")
    )
    assert request.sampling.prompt_logprobs == 1


def test_a_first_token_that_ends_the_answer_has_an_entry(running: RunningGateway) -> None:
    running.worker.reply = lambda request: [running.end_of_turn]
    ids = running.gateway.model.encode(PROMPT)
    choice = complete(running, ids, echo=True, logprobs=1, max_tokens=1).choices[0]
    assert choice.text == PROMPT
    assert choice.logprobs.token_logprobs[1:] == [logprob_of(token_id) for token_id in [*ids[1:], running.end_of_turn]]
    assert choice.logprobs.tokens[-1] == "<|im_end|>"
    assert choice.logprobs.text_offset[-1] == len(PROMPT)


def test_echo_alone(running: RunningGateway) -> None:
    assert complete(running, echo=True).choices[0].text == PROMPT + ANSWER
    assert running.worker.seen[-1].sampling.prompt_logprobs is None


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("echo", [False, True])
def test_no_tokens_but_those_of_the_prompt(running: RunningGateway, stream: bool, echo: bool) -> None:
    """How texts are scored."""
    answer = complete(running, echo=echo, logprobs=1, max_tokens=0, stream=stream, stop="fox")
    chunks = list(answer) if stream else [answer]
    parts = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
    assert "".join(chunk.choices[0].text for chunk in chunks) == (PROMPT if echo else "")
    ids = running.worker.seen[-1].prompt_token_ids if echo else []
    assert [value for part in parts for value in part.token_logprobs] == [
        logprob_of(token_id) if i else None for i, token_id in enumerate(ids)
    ]
    assert chunks[-1].choices[0].finish_reason == "length"
    assert stream or answer.usage.completion_tokens == 0
    assert running.worker.seen[-1].sampling.max_tokens == 1


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [10**6]}, "prompt"),
        ({"prompt": [[1], []]}, "prompt[1]"),
        ({"prompt": [1.5]}, "prompt[0]"),
        ({"prompt": "x " * 2 * CONTEXT_LENGTH}, "prompt"),
        ({"prompt": "x", "max_tokens": CONTEXT_LENGTH}, "prompt"),
        ({"prompt": "x", "logprobs": 21}, "logprobs"),
        ({"prompt": "x", "logprobs": True}, "logprobs"),
        ({"prompt": "x", "max_tokens": -1}, "max_tokens"),
        ({"prompt": "x", "suffix": "y"}, "suffix"),
        ({"prompt": "x", "best_of": 3}, "best_of"),
        ({"prompt": ["x"] * 100, "n": 2}, "n"),
    ],
)
def test_bad_input_is_named(running: RunningGateway, fields: dict[str, Any], param: str) -> None:
    assert refusal(running, **fields)["param"] == param
