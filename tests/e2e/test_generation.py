"""The whole service with real clients: what they get does not depend on who else is being served, or on a crash."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import httpx
import openai
import psutil
import pytest
from running_service import RunningService

SUBJECTS = ("sea", "moon", "bread", "trains", "bees", "chess", "rain", "Rome")
QUESTIONS = (
    "Tell me about {}.",
    "Write one line on {}.",
    "List three facts about {}.",
    "Why do people like {}? Answer at length, with examples from everyday life.",
)
STOPS = (None, ["."], ["\n\n", "!"], [" the"])


class Answer(NamedTuple):
    """What a client got."""

    text: str
    finish_reason: str | None


def prompts() -> list[dict[str, Any]]:
    """32 greedy requests of different lengths, with and without stop strings."""
    requests = []
    for index in range(32):
        question = QUESTIONS[index // 8].format(SUBJECTS[index % 8])
        requests.append(request(question, max_tokens=6 + index, stop=STOPS[index % 4]))
    return requests


def request(question: str, **options: Any) -> dict[str, Any]:
    return {"model": "demo", "messages": [{"role": "user", "content": question}], "temperature": 0, **options}


def complete(client: openai.OpenAI, body: dict[str, Any]) -> Answer:
    choice = client.chat.completions.create(**body).choices[0]
    return Answer(choice.message.content or "", choice.finish_reason)


async def stream(
    client: openai.AsyncOpenAI, body: dict[str, Any], on_piece: Callable[[], None] = lambda: None
) -> Answer:
    pieces, finish_reason = [], None
    async for chunk in await client.chat.completions.create(**body, stream=True):
        choice = chunk.choices[0]
        pieces.append(choice.delta.content or "")
        finish_reason = choice.finish_reason or finish_reason
        on_piece()
    return Answer("".join(pieces), finish_reason)


async def stream_all(service: RunningService, bodies: list[dict[str, Any]], **options: Any) -> list[Answer]:
    async with service.async_client() as client:
        return await asyncio.gather(*(stream(client, body, **options) for body in bodies))


def wait_until(condition: Callable[[], bool], timeout_s: float = 10.0) -> float:
    """The seconds it took."""
    start_s = time.monotonic()
    pause = threading.Event()
    while not condition():
        assert time.monotonic() - start_s < timeout_s, "it did not happen in time"
        pause.wait(0.01)
    return time.monotonic() - start_s


@pytest.fixture(scope="module")
def service(run_service: Callable[..., AbstractContextManager[RunningService]]) -> Iterator[RunningService]:
    with run_service() as service:
        yield service


@pytest.fixture(scope="module")
def one_by_one(service: RunningService) -> list[Answer]:
    """Each answer when nobody else is being served."""
    with service.client() as client:
        return [complete(client, body) for body in prompts()]


def test_concurrent_streams_get_the_text_they_get_alone(service: RunningService, one_by_one: list[Answer]) -> None:
    assert {answer.finish_reason for answer in one_by_one} == {"stop", "length"}
    assert asyncio.run(stream_all(service, prompts())) == one_by_one


def test_a_repeated_prompt_is_found_computed_and_gives_the_same_text(service: RunningService) -> None:
    question = "Describe each of these in a word: " + ", ".join(SUBJECTS * 12)
    with service.client() as client:
        answers = [client.chat.completions.create(**request(question, max_tokens=12, n=2)) for _ in range(2)]
    cached = []
    for answer in answers:
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        cached.append(answer.usage.prompt_tokens_details.cached_tokens)
    num_prompt_tokens = answers[0].usage.prompt_tokens if answers[0].usage else 0
    assert num_prompt_tokens > 200
    assert cached == [0, (num_prompt_tokens - 1) // 64 * 64]
    assert len({choice.message.content for answer in answers for choice in answer.choices}) == 1


def test_a_prompt_that_the_kv_cache_cannot_hold_is_a_bad_request(service: RunningService) -> None:
    """It would fit into the model's own context of 8192 tokens."""
    with service.client() as client:
        limit = client.models.list().data[0].model_extra["max_model_len"]  # type: ignore[index]  # not OpenAI's
        assert limit < 6000
        with pytest.raises(openai.BadRequestError) as raised:
            complete(client, request("word " * 6000))
        assert raised.value.code == "context_length_exceeded"
        assert str(limit) in str(raised.value)


def test_cancelled_stream_frees_its_sequence(service: RunningService) -> None:
    """Beside another one that goes on: its steps refresh the gauge."""

    async def cancel_one_of_two() -> Answer:
        async with service.async_client() as client:
            other = asyncio.create_task(stream(client, request("Tell me a long story.", max_tokens=150)))
            cancelled = await client.chat.completions.create(**request("Count to 500.", max_tokens=400), stream=True)
            num_pieces = 0
            async for _ in cancelled:
                num_pieces += 1
                if num_pieces == 20:
                    break
            assert service.running_sequences() == 2
            await cancelled.close()
            await asyncio.to_thread(wait_until, lambda: service.running_sequences() < 2, 2.0)
            assert not other.done(), "the other stream was over too early to tell"
            return await other

    assert asyncio.run(cancel_one_of_two()).text


def test_idle_worker_reports_no_running_sequence(service: RunningService) -> None:
    with (
        service.client() as client,
        client.chat.completions.create(**request("Count to 500.", max_tokens=400), stream=True) as cancelled,
    ):
        for _ in zip(range(10), cancelled, strict=False):
            pass
    wait_until(lambda: service.running_sequences() == 0, 2.0)


def test_terminal_chat_shows_the_same_text(service: RunningService) -> None:
    with service.client() as client:
        expected = complete(client, request("Tell me about the sea.", max_tokens=20)).text
    command = [sys.executable, "-m", "nibble.cli", "chat", "--url", service.url, "--temperature=0", "--max-tokens=20"]
    shown = subprocess.run(
        command, input="Tell me about the sea.\n", capture_output=True, text=True, timeout=60, check=True
    )
    assert f"> {expected}\n" in shown.stdout


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 400),
        (b'{"model": "demo", "messages": []}', 400),
        (b'{"model": "other", "messages": [{"role": "user", "content": "x"}]}', 404),
        (b'{"model": "demo", "messages": [{"role": "user", "content": "' + b"word " * 20000 + b'"}]}', 400),
        (b'{"model": "demo", "temperature": -1, "messages": [{"role": "user", "content": "x"}]}', 400),
        (b"\xff\xfe\x00", 400),
    ],
)
def test_bad_input_is_refused_and_the_service_goes_on(service: RunningService, body: bytes, status: int) -> None:
    answer = httpx.post(f"{service.url}/v1/chat/completions", content=body)
    assert answer.status_code == status
    assert answer.json()["error"]["message"]
    with service.client() as client:
        assert complete(client, request("Say hello.", max_tokens=4)).text


def test_killed_worker_is_replaced_without_a_lost_or_repeated_piece(
    run_service: Callable[..., AbstractContextManager[RunningService]], one_by_one: list[Answer]
) -> None:
    num_pieces = 0
    with run_service(num_workers=2, NIBBLE_LEASE_S="2") as service:
        victim = service.workers()[0]

        def kill_once() -> None:
            nonlocal num_pieces
            num_pieces += 1
            if num_pieces == 100:
                victim.send_signal(signal.SIGKILL)

        assert asyncio.run(stream_all(service, prompts(), on_piece=kill_once)) == one_by_one
        assert not victim.is_running()
        service.wait_for_line(r"worker-1 \(pid \d+\) was killed by SIGKILL; it starts again")
        service.wait_for_line("worker-1 started again")
        wait_until(lambda: len(service.workers()) == 2)


def test_killed_valkey_is_started_again_and_streams_go_on(
    run_service: Callable[..., AbstractContextManager[RunningService]], one_by_one: list[Answer]
) -> None:
    num_pieces = 0
    with run_service() as service:
        (valkey,) = (child for child in service.descendants() if "valkey" in child.name())

        def kill_once() -> None:
            nonlocal num_pieces
            num_pieces += 1
            if num_pieces == 50:
                valkey.send_signal(signal.SIGKILL)

        assert asyncio.run(stream_all(service, prompts()[:8], on_piece=kill_once)) == one_by_one[:8]
        assert not psutil.pid_exists(valkey.pid)
