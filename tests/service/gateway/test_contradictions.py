"""Parameters that leave no token: refused before they are queued, or once it shows that nothing can follow.

The real engine on the CPU, under the real worker loop, broker and gateway.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest
from conftest import RunningGateway
from real_worker import real_worker
from small_models import CONTEXT_LENGTH, VOCAB_ROOM, write_model
from tiny_models import make_tiny_llama
from tokenizers import Tokenizer

from nibble.engine.limits import EngineLimits
from nibble.engine.llm_engine import LLMEngine
from nibble.kernels.cpu.backend import CPUKernels

END = "<|im_end|>"
Service = tuple[RunningGateway, LLMEngine]


@pytest.fixture(scope="module")
def service(
    tmp_path_factory: pytest.TempPathFactory, byte_level: Tokenizer, run_gateway: Callable[..., Any]
) -> Iterator[Service]:
    directory = tmp_path_factory.mktemp("whole")
    vocab_size = byte_level.get_vocab_size() + VOCAB_ROOM
    make_tiny_llama(directory, vocab_size=vocab_size, max_context_tokens=CONTEXT_LENGTH)
    write_model(directory, byte_level, END)
    kernels = CPUKernels(num_threads=2)
    with run_gateway(has_worker=False, model_dir=directory) as running:
        engine = LLMEngine.from_checkpoint(directory, kernels, EngineLimits(1 << 22, max_num_sequences=8))
        with real_worker(running, engine, "whole"):
            yield running, engine
    kernels.close()


def post(service: Service, path: str, **fields: Any) -> httpx.Response:
    client = service[0]
    body = {"model": client.gateway.model.name, "max_tokens": 40, "seed": 1, **fields}
    body |= {"messages": [{"role": "user", "content": "hi"}]} if path == "chat/completions" else {"prompt": "hi"}
    return httpx.post(f"{client.url}/v1/{path}", json=body, timeout=60)


def ids(service: Service, text: str) -> list[int]:
    return service[0].gateway.model.encode(text)


def ban(service: Service, text: str) -> dict[str, int]:
    return {str(token_id): -100 for token_id in ids(service, text)}


@pytest.mark.parametrize("path", ["chat/completions", "completions"])
def test_what_can_be_told_at_once_is_refused_before_it_is_queued(service: Service, path: str) -> None:
    num_steps = service[1].stats.num_steps
    for fields, param, causes in [
        ({"response_format": {"type": "json_object"}, "bad_words": ["{"]}, "bad_words", "bad_words"),
        ({"guided_choice": ["xyz"], "logit_bias": ban(service, "xyz")}, "logit_bias", "logit_bias"),
        (
            {"guided_regex": "[0-9]+", "allowed_token_ids": ids(service, "7x"), "logit_bias": ban(service, "7")},
            "allowed_token_ids",
            "allowed_token_ids and logit_bias",
        ),
    ]:
        response = post(service, path, **fields)
        assert response.status_code == 400, response.text
        error = response.json()["error"]
        assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, "no_token_left")
        assert f"{causes} and the grammar of the text forbid all" in error["message"]
    assert service[1].stats.num_steps == num_steps


def test_what_shows_later_ends_the_answer_with_the_same_error(service: Service) -> None:
    response = post(service, "chat/completions", guided_choice=["xyz"], logit_bias=ban(service, "z"), n=3)
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["param"], error["code"]) == ("logit_bias", "no_token_left")
    assert error["message"].startswith("after 2 tokens there is no token to generate: logit_bias and the grammar")
    assert service[1].stats.num_nonfinite_logits == 0


def test_a_stream_has_the_text_before_the_error(service: Service) -> None:
    client = service[0].openai()
    stream = client.completions.create(
        model=service[0].gateway.model.name,
        prompt="hi",
        stream=True,
        extra_body={"guided_choice": ["xyz"], "bad_words": ["yz"]},
    )
    chunks = []
    with pytest.raises(openai.APIError, match="after 2 tokens there is no token to generate: bad_words") as caught:
        chunks.extend(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == "xy"
    assert caught.value.code == "no_token_left"
    again = httpx.get(f"{service[0].url}/v1/completions/{chunks[0].id}/stream", timeout=30).text
    assert '"code":"no_token_left"' in again
    assert service[1].stats.num_nonfinite_logits == 0


def test_without_a_grammar_too(service: Service) -> None:
    first, second = ids(service, "xy")
    response = post(
        service, "completions", allowed_token_ids=[first, second], bad_words=["xx", "xy", "yx", "yy"], ignore_eos=True
    )
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["message"].endswith("allowed_token_ids and bad_words forbid all of them")


def test_a_complete_text_ends_where_its_end_token_is_banned(service: Service) -> None:
    response = post(
        service, "completions", guided_regex="x(yz)*", logit_bias={**ban(service, "y"), **ban(service, END)}
    )
    (choice,) = response.json()["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("x", "stop")
