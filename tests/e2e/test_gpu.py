"""The whole service with workers on a GPU: many streams at once, a client that leaves, a worker that dies.

At most 64 tokens a step: more prompt tokens at once go through cuBLAS, whose rounding depends on how many they are, and
then a near-tie may fall the other way than in the same request alone.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
from running_service import RunningService
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
        "NIBBLE_MAX_NUM_BATCHED_TOKENS": "64",
        "NIBBLE_LEASE_S": "2",
    }
    with run_service(num_workers=2, **variables) as running:
        yield running


def bodies() -> list[dict[str, Any]]:
    """64 requests of different lengths; every fourth one is sampled, with a seed."""
    result = []
    for index in range(NUM_STREAMS):
        subject = SUBJECTS[index % 8]
        options: dict[str, Any] = {"max_tokens": 16 + 2 * index}
        if index % 4 == 3:
            options |= {"temperature": 0.8, "top_p": 0.9, "seed": index}
        if index % 4 == 2:
            options["stop"] = ["."]
        result.append(request(f"Write {1 + index // 8} sentences about {subject}.", **options))
    return result


@pytest.fixture(scope="module")
def alone(service: RunningService) -> list[Answer]:
    """The answers one by one."""
    client = service.client()
    return [complete(client, body) for body in bodies()]


def test_the_workers_compute_on_the_gpu(service: RunningService) -> None:
    assert sum("cuda: " in line for line in service.lines) == 2  # in the launcher's table


def test_64_streams_at_once_get_what_each_gets_alone(service: RunningService, alone: list[Answer]) -> None:
    assert len({answer.text for answer in alone}) > NUM_STREAMS // 2  # answers, not one and the same
    assert asyncio.run(stream_all(service, bodies())) == alone


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
