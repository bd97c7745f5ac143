"""Log probabilities in answers: chat and plain text, whole and streamed, through the `openai` client."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from conftest import RunningGateway
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import make_plan
from small_models import byte_level_tokenizer, sentencepiece_tokenizer
from synthetic_worker import logprob_of, records
from tokenizers import Tokenizer

from nibble.engine.protocol import FinishReason, TokenEvent
from nibble.service.gateway.choice import Choice
from nibble.service.gateway.detokenizer import detokenizer_factory, token_bytes_function
from nibble.service.gateway.errors import ServerFault
from nibble.service.gateway.logprobs import TokenLogprob

TEXT = "The quick brown 😀 fox — über 日本."
TOKENIZERS = {"byte_level": byte_level_tokenizer(), "sentencepiece": sentencepiece_tokenizer()}
BYTE_LEVEL = TOKENIZERS["byte_level"]
END = BYTE_LEVEL.token_to_id("<|im_end|>")


def push_all(
    ids: Sequence[int], reason: FinishReason, cuts: Sequence[int], **options: Any
) -> tuple[list[str], list[TokenLogprob]]:
    """Texts and log probabilities of a choice that is given these tokens in groups that end at the cuts."""
    plan = make_plan(logprobs=2, stop_token_ids=(END,), **options)
    choice = Choice(plan, detokenizer_factory(BYTE_LEVEL)(True))
    bounds = [0, *sorted(min(cut, len(ids)) for cut in cuts), len(ids)]
    texts: list[str] = []
    logprobs: list[TokenLogprob] = []
    for number, (start, end) in enumerate(pairwise(bounds)):
        if choice.finish_reason is not None:
            break
        event = TokenEvent(
            request_id="x",
            index=start,
            token_ids=list(ids[start:end]),
            finish_reason=reason if number == len(bounds) - 2 else None,
            logprobs=records(list(ids[start:end]), 2),
            prompt_logprobs=records(plan.requests[0].prompt_token_ids[1:], 2) if start == 0 else None,
        )
        texts.append(choice.push(event))
        taken = choice.take_logprobs()
        assert all(token.start <= len("".join(texts)) for token in taken), "told before its text"
        logprobs += taken
    return texts, logprobs


@settings(max_examples=200, deadline=None)
@given(
    ids=st.lists(st.integers(3, 300), max_size=20),
    is_stopped=st.booleans(),
    cuts=st.lists(st.integers(0, 21), max_size=8),
    stops=st.lists(st.text(alphabet="abe ", min_size=1, max_size=2), max_size=2),
    include_stop=st.booleans(),
    echoes=st.booleans(),
    is_text=st.booleans(),
)
def test_grouping_changes_nothing_and_no_token_is_told_that_is_not_shown(
    ids: list[int], is_stopped: bool, cuts: list[int], stops: list[str], include_stop: bool, echoes: bool, is_text: bool
) -> None:
    """But the one that ended a text."""
    all_ids = [*ids, END] if is_stopped else ids
    reason = FinishReason.STOP if is_stopped else FinishReason.LENGTH
    options: dict[str, Any] = {"stops": tuple(stops), "include_stop": include_stop}
    options |= {"echoes": echoes, "continues_prompt": is_text}
    texts, logprobs = push_all(all_ids, reason, cuts, **options)
    whole_texts, whole = push_all(all_ids, reason, [], **options)
    text = "".join(texts)
    assert (text, logprobs) == ("".join(whole_texts), whole)
    told = [token.token_id for token in logprobs]
    prompt = [1, 2, 3] if echoes else []
    visible = prompt + (all_ids if include_stop or is_text else ids)
    assert told == visible[: len(told)]
    if not stops:
        assert told == visible
    elif len(told) < len(visible):
        assert all(token.start < len(text) for token in logprobs), "a token of what a stop string cut off"
    for token in logprobs[bool(prompt) :]:
        assert token.logprob == logprob_of(token.token_id)
        assert token.top == ((token.token_id + 1, -0.25), (token.token_id + 2, -0.5))


def test_offsets_are_those_of_the_text() -> None:
    ids = BYTE_LEVEL.encode("fox 😀 fox", add_special_tokens=False).ids
    texts, logprobs = push_all(ids, FinishReason.LENGTH, range(len(ids)))
    starts = [token.start for token in logprobs]
    for i, token_id in enumerate(ids):
        own = BYTE_LEVEL.decode([token_id], skip_special_tokens=False)
        if "\ufffd" not in own:
            assert "".join(texts)[starts[i] : starts[i] + len(own)] == own
    assert starts == sorted(starts)


def test_what_the_worker_leaves_out_is_an_error() -> None:
    choice = Choice(make_plan(logprobs=1), detokenizer_factory(BYTE_LEVEL)(True))
    with pytest.raises(ServerFault, match="sent no log probabilities"):
        choice.push(TokenEvent(request_id="x", index=0, token_ids=[5]))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_bytes_of_tokens_make_the_text(name: str) -> None:
    tokenizer: Tokenizer = TOKENIZERS[name]
    token_bytes = token_bytes_function(tokenizer)
    ids = tokenizer.encode(TEXT, add_special_tokens=False).ids
    assert b"".join(token_bytes(token_id) for token_id in ids).decode().strip() == TEXT
    assert token_bytes(10**6) == b""


# Through the server


def chat(running: RunningGateway, **fields: Any) -> Any:
    messages = [{"role": "user", "content": TEXT}]
    return running.openai().chat.completions.create(model="small", messages=messages, **fields)


def check_entries(running: RunningGateway, entries: list[Any], count: int) -> None:
    model = running.gateway.model
    ids = model.encode(TEXT)
    assert b"".join(bytes(entry.bytes) for entry in entries) == TEXT.encode()
    assert [entry.logprob for entry in entries] == [logprob_of(token_id) for token_id in ids]
    for entry, token_id in zip(entries, ids, strict=True):
        assert bytes(entry.bytes) == model.token_bytes(token_id)
        assert entry.token == bytes(entry.bytes).decode(errors="replace")
        assert [top.logprob for top in entry.top_logprobs] == [-k / 4 for k in range(1, count + 1)]
        assert [bytes(top.bytes) for top in entry.top_logprobs] == [
            model.token_bytes(token_id + k) for k in range(1, count + 1)
        ]


@pytest.mark.parametrize("count", [0, 2, 20])
def test_chat_logprobs(running: RunningGateway, count: int) -> None:
    choice = chat(running, logprobs=True, top_logprobs=count).choices[0]
    assert choice.message.content == TEXT
    assert choice.logprobs.refusal is None
    check_entries(running, choice.logprobs.content, count)
    assert running.worker.seen[-1].sampling.logprobs == count


@pytest.mark.parametrize("tokens_per_step", [1, 3])
def test_streamed_chat_logprobs_are_those_of_the_whole_answer(running: RunningGateway, tokens_per_step: int) -> None:
    running.worker.tokens_per_step = tokens_per_step
    chunks = list(chat(running, logprobs=True, top_logprobs=2, stream=True))
    entries = [entry for chunk in chunks for entry in (chunk.choices[0].logprobs or Empty).content]
    check_entries(running, entries, 2)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == TEXT
    assert chunks[-1].choices[0].finish_reason == "stop"


class Empty:
    content: tuple[Any, ...] = ()


def test_no_logprobs_unless_asked_for(running: RunningGateway) -> None:
    assert chat(running).choices[0].logprobs is None
    assert running.worker.seen[-1].sampling.logprobs is None


def test_logprobs_of_what_a_stop_string_cut_off_are_not_told(running: RunningGateway) -> None:
    choice = chat(running, logprobs=True, stop=" fox").choices[0]
    assert choice.message.content == "The quick brown 😀"
    assert b"".join(bytes(entry.bytes) for entry in choice.logprobs.content).decode() == choice.message.content


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": 2}, "logprobs"),
        ({"frequency_penalty": 3}, "frequency_penalty"),
        ({"logit_bias": {"5": 200}}, "logit_bias.5"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
    ],
)
def test_limits_are_named(running: RunningGateway, fields: dict[str, Any], param: str) -> None:
    response = running.post({"model": "small", "messages": [{"role": "user", "content": "x"}], **fields})
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["type"]) == (400, param, "invalid_request_error")
