"""Two services, one that guesses tokens and one that does not: clients get the same from both."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import httpx
import openai
import pytest
from running_service import RunningService

TEXT = (
    "def area(width, height):\n    return width * height\n\n\n"
    "def volume(width, height, depth):\n    return area(width, height) * depth\n"
)
TASK = f"Repeat this code exactly, then repeat it once more:\n\n```python\n{TEXT}```"
SCHEMA = {
    "type": "object",
    "properties": {"first_function_name": {"type": "string", "maxLength": 20}, "number_of_functions": {"enum": [2]}},
    "required": ["first_function_name", "number_of_functions"],
    "additionalProperties": False,
}


def requests() -> list[dict[str, Any]]:
    """Copying with everything that looks at single tokens: stop strings, log probabilities, seeds, grammars."""
    json_schema = {"name": "answer", "schema": SCHEMA, "strict": True}
    variants: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 0, "logprobs": True, "top_logprobs": 3},
        {"temperature": 0, "stop": ["depth):", "never"]},
        {"temperature": 0, "stop": ["* depth"], "logprobs": True, "max_tokens": 200},
        {"temperature": 0.6, "seed": 3, "n": 2},
        {"temperature": 0.6, "seed": 4, "logprobs": True, "frequency_penalty": 0.3},
        {"temperature": 0.6, "seed": 5, "response_format": {"type": "json_schema", "json_schema": json_schema}},
        {"temperature": 0, "max_tokens": 33},
    ]
    messages = [{"role": "user", "content": TASK}]
    return [{"model": "demo", "messages": messages, "max_tokens": 120, **variant} for variant in variants]


@pytest.fixture(scope="module", params=["off", "ngram"])
def service(
    request: pytest.FixtureRequest, run_service: Callable[..., AbstractContextManager[RunningService]]
) -> Iterator[tuple[str, RunningService]]:
    with run_service(NIBBLE_SPECULATION=request.param) as service:
        yield request.param, service


ANSWERS: dict[str, list[Any]] = {}  # of each service


def test_answers_are_the_same_and_so_are_streams(service: tuple[str, RunningService]) -> None:
    name, running = service
    with running.client() as client:
        whole = [client.chat.completions.create(**body).model_dump() for body in requests()]
    streamed = asyncio.run(stream_all(running))
    for answer, pieces in zip(whole, streamed, strict=True):
        assert [content(choice) for choice in answer["choices"]] == pieces
    ANSWERS[name] = [(answer["choices"], answer["usage"]["completion_tokens"]) for answer in whole]
    first = next(iter(ANSWERS.values()))
    assert ANSWERS[name] == first
    assert json.loads(whole[6]["choices"][0]["message"]["content"])["number_of_functions"] == 2
    assert (accepted(running) > 200) == (name == "ngram")


def content(choice: dict[str, Any]) -> tuple[str, str, list[float]]:
    tokens = (choice["logprobs"] or {}).get("content") or []
    return choice["message"]["content"], choice["finish_reason"], [token["logprob"] for token in tokens]


async def stream_all(running: RunningService) -> list[list[tuple[str, str, list[float]]]]:
    async with running.async_client() as client:
        return await asyncio.gather(*(stream(client, body) for body in requests()))


async def stream(client: openai.AsyncOpenAI, body: dict[str, Any]) -> list[tuple[str, str, list[float]]]:
    num_choices = body.get("n", 1)
    texts, reasons = [""] * num_choices, [""] * num_choices
    logprobs: list[list[float]] = [[] for _ in range(num_choices)]
    async for chunk in await client.chat.completions.create(**body, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
            if choice.logprobs is not None:
                logprobs[choice.index] += [token.logprob for token in choice.logprobs.content or []]
    return list(zip(texts, reasons, logprobs, strict=True))


def accepted(running: RunningService) -> int:
    text = httpx.get(f"http://127.0.0.1:{running.metrics_port}/metrics").text
    match = re.search(r"^nibble_accepted_draft_tokens_total\{.*\} (\S+)$", text, re.MULTILINE)
    assert match, text
    return int(float(match[1]))
