"""The whole service with workers on a GPU: many streams at once, a client that leaves, a worker that dies.

Texts are compared with those of the same requests one by one. Decode gives the same bits in any batch; prefill of many
prompts at once goes through another matrix product than that of a short one alone, so that a near-tie may fall the
other way: most texts must be equal, all must be whole.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
from running_service import RunningService
from test_generation import Answer, complete, request, stream_all, wait_until

pytestmark = pytest.mark.gpu

SUBJECTS = ("sea", "moon", "bread", "trains", "bees", "chess", "rain", "Rome")
NUM_STREAMS = 64
LEAST_EQUAL = 3 / 4


@pytest.fixture(scope="module")
def service(run_service: Callable[..., AbstractContextManager[RunningService]]) -> Iterator[RunningService]:
    with run_service(num_workers=2, NIBBLE_DEVICE="cuda", NIBBLE_KV_CACHE_BYTES="1GiB", NIBBLE_LEASE_S="2") as running:
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


def check(answers: list[Answer], alone: list[Answer]) -> None:
    assert all(answer.text and answer.finish_reason in ("stop", "length") for answer in answers)
    equal = sum(answer == other for answer, other in zip(answers, alone, strict=True))
    sys.stdout.write(f"{equal} of {len(alone)} texts are equal\n")
    assert equal >= LEAST_EQUAL * len(alone)


def test_64_streams_at_once_get_what_each_gets_alone(service: RunningService, alone: list[Answer]) -> None:
    assert len({answer.text for answer in alone}) > NUM_STREAMS // 2  # answers, not one and the same
    check(asyncio.run(stream_all(service, bodies())), alone)


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

    check(asyncio.run(stream_all(service, bodies(), on_piece=kill_once)), alone)
    assert not victim.is_running()
    service.wait_for_line("worker-1 started again")
