"""POST /tokenize and /detokenize, in vLLM's shapes."""

from __future__ import annotations

from typing import Any

import httpx
import jinja2
import pytest
from conftest import RunningGateway
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import CONTEXT_LENGTH

from nibble.service.gateway.served_model import ServedModel

MESSAGES = [{"role": "user", "content": "The quick brown fox"}]


def post(running: RunningGateway, path: str, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(running.url + path, json=body)


def test_text(running: RunningGateway) -> None:
    answer = post(running, "/tokenize", {"prompt": "The quick 😀", "return_token_strs": True}).json()
    token_ids = running.gateway.model.encode("The quick 😀", add_special_tokens=True)
    assert answer["tokens"] == token_ids
    assert (answer["count"], answer["max_model_len"]) == (len(token_ids), CONTEXT_LENGTH)
    assert answer["token_strs"][0] == running.tokenizer.id_to_token(token_ids[0])
    assert post(running, "/tokenize", {"model": "small", "prompt": "x"}).json()["token_strs"] is None
    assert post(running, "/tokenize", {"prompt": ""}).json()["count"] == 0


def test_messages_are_what_a_chat_is_prompted_with(running: RunningGateway) -> None:
    chat = {"model": "small", "messages": MESSAGES, "temperature": 0.5}
    assert running.post(chat).status_code == 200
    answer = post(running, "/tokenize", chat).json()
    assert answer["tokens"] == running.worker.seen[-1].prompt_token_ids
    shorter = post(running, "/tokenize", {"messages": MESSAGES, "add_generation_prompt": False}).json()
    assert shorter["tokens"] == answer["tokens"][: shorter["count"]]
    assert shorter["count"] < answer["count"]


def test_prompt_over_the_context_is_counted(running: RunningGateway) -> None:
    answer = post(running, "/tokenize", {"prompt": "a " * CONTEXT_LENGTH * 2}).json()
    assert answer["count"] > CONTEXT_LENGTH
    huge = post(running, "/tokenize", {"prompt": "word " * 800_000})
    assert (huge.status_code, huge.json()["error"]["code"]) == (400, "context_length_exceeded")


def test_detokenize_gives_the_text_back_special_tokens_included(running: RunningGateway) -> None:
    tokens = post(running, "/tokenize", {"messages": MESSAGES}).json()["tokens"]
    text = post(running, "/detokenize", {"tokens": tokens}).json()["prompt"]
    assert text == "<|im_start|>user\nThe quick brown fox<|im_end|>\n<|im_start|>assistant\n"
    assert post(running, "/detokenize", {"tokens": []}).json() == {"prompt": ""}


def test_info_is_what_a_client_without_the_files_needs(running: RunningGateway) -> None:
    info = httpx.get(running.url + "/tokenizer_info").json()
    assert (info["bos_token"], info["eos_token"], info["pad_token"]) == (None, "<|im_end|>", None)
    template = jinja2.Environment(trim_blocks=True).from_string(info["chat_template"])
    prompt = template.render(messages=MESSAGES, add_generation_prompt=True)
    tokens = post(running, "/tokenize", {"messages": MESSAGES}).json()["tokens"]
    assert post(running, "/tokenize", {"prompt": prompt}).json()["tokens"] == tokens


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=40))
def test_every_text_survives_the_round_trip(served_model: ServedModel, text: str) -> None:
    assert served_model.tokenizer.decode(served_model.encode(text), skip_special_tokens=False) == text


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": 5}, 400, "prompt"),
        ("/tokenize", {"messages": []}, 400, "messages"),
        ("/tokenize", {"prompt": "x", "model": "other"}, 404, "model"),
        ("/tokenize", {"messages": MESSAGES, "model": "other"}, 404, "model"),
        ("/detokenize", {"tokens": [10**6]}, 400, "tokens"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens[0]"),
        ("/detokenize", {"tokens": "5"}, 400, "tokens"),
    ],
)
def test_bad_body_is_named(
    running: RunningGateway, path: str, body: dict[str, Any], status: int, param: str | None
) -> None:
    response = post(running, path, body)
    assert (response.status_code, response.json()["error"]["param"]) == (status, param)


def test_unknown_fields_are_reported(running: RunningGateway) -> None:
    response = post(running, "/tokenize", {"prompt": "x", "colour": 1})
    assert response.headers["x-nibble-ignored"] == "colour"
