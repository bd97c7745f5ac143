"""The whole service with workers on a GPU: all kinds of requests at once, a client that leaves, a worker that dies."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
from running_service import RunningService
from test_constrained_generation import FORMAT, Person
from test_generation import Answer, complete, request, stream_all, wait_until

pytestmark = pytest.mark.gpu

SUBJECTS = ("sea", "moon", "bread", "trains", "bees", "chess", "rain", "Rome")
NUM_STREAMS = 64


@pytest.fixture(scope="module")
def service(run_service: Callable[..., AbstractContextManager[RunningService]]) -> Iterator[RunningService]:
    variables = {
        "NIBBLE_DEVICE": "cuda",
        "NIBBLE_KV_CACHE_BYTES": "1GiB",
        "NIBBLE_MAX_NUM_SEQUENCES": "64",
        "NIBBLE_LEASE_S": "2",
    }
    with run_service(num_workers=2, **variables) as running:
        yield running


def bodies() -> list[dict[str, Any]]:
    """64 requests of different lengths: greedy, sampled with a seed, with stop strings, a schema or penalties."""
    result = []
    for index in range(NUM_STREAMS):
        subject = SUBJECTS[index % 8]
        options: dict[str, Any] = {"max_tokens": 16 + 2 * index}
        if index % 4 == 3:
            options |= {"temperature": 0.8, "top_p": 0.9, "seed": index}
        if index % 4 == 2:
            options["stop"] = ["."]
        if index % 8 == 1:
            options |= {"response_format": FORMAT, "temperature": 1.5, "seed": index}
        if index % 8 == 5:
            options |= {"frequency_penalty": 0.8, "presence_penalty": 0.2, "logit_bias": {"28": -5}}
        result.append(request(f"Write {1 + index // 8} sentences about {subject}.", **options))
    return result


@pytest.fixture(scope="module")
def alone(service: RunningService) -> list[Answer]:
    """The answers one by one."""
    client = service.client()
    return [complete(client, body) for body in bodies()]


def test_the_workers_compute_on_the_gpu(service: RunningService) -> None:
    for name in ("worker-1", "worker-2"):
        service.wait_for_line(rf"^{name} .*event=worker_ready .*device='cuda: ")


def test_64_streams_at_once_get_what_each_gets_alone(service: RunningService, alone: list[Answer]) -> None:
    assert len({answer.text for answer in alone}) > NUM_STREAMS // 2  # answers, not one and the same
    assert asyncio.run(stream_all(service, bodies())) == alone


def test_every_choice_fits_its_schema_at_high_temperature(service: RunningService) -> None:
    question = [{"role": "user", "content": "Describe a person from Vienna, as JSON."}]
    answer = service.client().chat.completions.parse(
        model="demo", messages=question, response_format=Person, max_tokens=300, n=3, temperature=1.5, seed=1
    )
    assert all(isinstance(choice.message.parsed, Person) for choice in answer.choices)
    assert len({choice.message.content for choice in answer.choices}) == 3


def test_penalties_change_the_answer_and_its_log_probabilities_spell_it(service: RunningService) -> None:
    client, body = service.client(), request("Tell me about the sea.", max_tokens=40)
    plain, penalised = (
        client.chat.completions.create(**body, **options, logprobs=True, top_logprobs=3).choices[0]
        for options in ({}, {"frequency_penalty": 2.0, "presence_penalty": 1.0})
    )
    assert plain.message.content != penalised.message.content
    for choice in (plain, penalised):
        assert choice.logprobs is not None
        entries = choice.logprobs.content or []
        assert b"".join(bytes(entry.bytes or []) for entry in entries).decode() == choice.message.content
        assert all(0 >= top.logprob >= entry.top_logprobs[2].logprob for entry in entries for top in entry.top_logprobs)
    for entry in plain.logprobs.content or []:  # what is greedy without penalties
        assert (entry.token, entry.logprob) == (entry.top_logprobs[0].token, entry.top_logprobs[0].logprob)


def test_a_repeated_prompt_is_found_computed_and_gives_the_same_choices(service: RunningService) -> None:
    """Asked three times, one of two workers gets it again."""
    question = "Describe each of these in a word: " + ", ".join(SUBJECTS * 12)
    body = request(question, max_tokens=12, n=3) | {"temperature": 0.8, "seed": 3}
    answers = [service.client().chat.completions.create(**body) for _ in range(3)]
    choices = {tuple(choice.message.content for choice in answer.choices) for answer in answers}
    assert len(choices) == 1
    assert len(set(choices.pop())) > 1
    num_cached = [answer.usage.prompt_tokens_details.cached_tokens for answer in answers]
    assert num_cached[0] == 0
    assert max(num_cached) == (answers[0].usage.prompt_tokens - 1) // 64 * 64 > 128


def test_a_client_that_leaves_frees_its_sequence(service: RunningService) -> None:
    async def leave() -> None:
        async with service.async_client() as client:
            answer = await client.chat.completions.create(
                **request("Count to one thousand.", max_tokens=1500), stream=True
            )
            async for _ in answer:
                break
            await answer.close()

    asyncio.run(leave())
    wait_until(lambda: service.running_sequences(0) + service.running_sequences(1) == 0)


def test_streams_survive_the_death_of_a_worker(service: RunningService, alone: list[Answer]) -> None:
    victim = service.workers()[0]
    num_pieces = 0

    def kill_once() -> None:
        nonlocal num_pieces
        num_pieces += 1
        if num_pieces == 5 * NUM_STREAMS:
            victim.send_signal(signal.SIGKILL)

    assert asyncio.run(stream_all(service, bodies(), on_piece=kill_once)) == alone
    assert not victim.is_running()
    service.wait_for_line("worker-1 started again")
