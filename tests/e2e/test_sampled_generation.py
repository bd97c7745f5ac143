"""Sampling parameters and log probabilities through the whole service, with the demo model."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from running_service import RunningService
from tokenizers import Tokenizer

QUESTION = [{"role": "user", "content": "Tell me about the sea."}]
PENALTIES = {"frequency_penalty": 0.8, "presence_penalty": 0.2}
EXTRAS = {"repetition_penalty": 1.2, "bad_words": ["the"], "min_tokens": 5}


@pytest.fixture(scope="module")
def service(run_service: Callable[..., AbstractContextManager[RunningService]]) -> Iterator[RunningService]:
    with run_service() as running:
        yield running


def ask(service: RunningService, **options: Any) -> Any:
    body = {"model": "demo", "messages": QUESTION, "temperature": 0, "max_tokens": 30, **options}
    return service.client().chat.completions.create(**body)


def test_greedy_tokens_are_the_most_probable_ones(service: RunningService) -> None:
    choice = ask(service, logprobs=True, top_logprobs=3).choices[0]
    entries = choice.logprobs.content
    assert b"".join(bytes(entry.bytes) for entry in entries).decode() == choice.message.content
    for entry in entries:
        assert (entry.token, entry.logprob) == (entry.top_logprobs[0].token, entry.top_logprobs[0].logprob)
        assert 0 >= entry.logprob >= entry.top_logprobs[2].logprob
    assert ask(service).choices[0].message.content == choice.message.content


def test_every_parameter_changes_the_answer(service: RunningService, demo_checkpoint: Path) -> None:
    plain = ask(service).choices[0].message.content
    first = ask(service, max_tokens=1, logprobs=True).choices[0].logprobs.content[0]
    second_word = plain.split()[1]
    tokenizer = Tokenizer.from_file(str(demo_checkpoint / "tokenizer.json"))
    (banned,) = tokenizer.encode(first.token, add_special_tokens=False).ids
    texts = [
        ask(service, **options).choices[0].message.content
        for options in (
            {"logit_bias": {str(banned): -100}},
            {"frequency_penalty": 2, "presence_penalty": 1},
            {"extra_body": {"repetition_penalty": 1.5}},
            {"extra_body": {"bad_words": [second_word]}},
            {"extra_body": {"allowed_token_ids": [banned, banned + 1]}},
        )
    ]
    assert len({plain, *texts}) == 6
    assert not texts[0].startswith(first.token)
    assert not re.search(rf"\b{second_word}\b", texts[3])


def test_echoed_prompt_has_the_same_log_probabilities_as_the_generated_text(service: RunningService) -> None:
    client = service.client()
    options: dict[str, Any] = {"model": "demo", "temperature": 0, "logprobs": 1}
    written = client.completions.create(prompt="The capital of France is", max_tokens=12, **options).choices[0]
    text = "The capital of France is" + written.text
    read = client.completions.create(prompt=text, max_tokens=1, echo=True, **options).choices[0]
    count = len(written.logprobs.tokens)
    # Prompts are computed in another mode than generated tokens, and the cache is rounded.
    assert read.logprobs.tokens[-count - 1 : -1] == written.logprobs.tokens
    assert read.logprobs.token_logprobs[-count - 1 : -1] == pytest.approx(written.logprobs.token_logprobs, abs=0.3)


def test_a_killed_worker_changes_neither_penalties_nor_log_probabilities(
    run_service: Callable[..., AbstractContextManager[RunningService]],
) -> None:
    options: dict[str, Any] = {
        **PENALTIES,
        "extra_body": EXTRAS,
        "temperature": 0.9,
        "seed": 5,
        "max_tokens": 60,
        "logprobs": True,
        "top_logprobs": 2,
        "stream": True,
    }
    with run_service(NIBBLE_LEASE_S="1") as service:
        expected = collect(ask(service, **options), lambda: None)
        killed: list[int] = []

        def kill_once() -> None:
            if not killed:
                killed.append(service.workers()[0].pid)
                service.workers()[0].send_signal(signal.SIGKILL)

        assert collect(ask(service, **options), kill_once) == expected
        assert killed


def collect(chunks: Any, on_tenth: Callable[[], None]) -> tuple[str, list[tuple[str, float, tuple[str, ...]]]]:
    text, entries = "", []
    for number, chunk in enumerate(chunks):
        choice = chunk.choices[0]
        text += choice.delta.content or ""
        for entry in choice.logprobs.content if choice.logprobs else ():
            entries.append((entry.token, entry.logprob, tuple(top.token for top in entry.top_logprobs)))
        if number == 10:
            on_tenth()
    return text, entries
