"""Structured output through the whole service, with the demo model and the `openai` client."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Annotated, Any, Literal

import jsonschema
import openai
import pytest
from pydantic import BaseModel, Field
from running_service import RunningService

QUESTION = [{"role": "user", "content": "Describe a person from Vienna, as JSON."}]


class Address(BaseModel):
    street: str = Field(max_length=30)
    zip: str = Field(pattern=r"^\d{4}$")


class Person(BaseModel):
    name: str = Field(max_length=20)
    age: int = Field(ge=0, le=120)
    role: Literal["student", "nurse", "baker"]
    address: Address | None
    friends: list[Annotated[str, Field(max_length=12)]] = Field(max_length=2)


SCHEMA = openai.lib._pydantic.to_strict_json_schema(Person)
FORMAT = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}


@pytest.fixture(scope="module")
def service(run_service: Callable[..., AbstractContextManager[RunningService]]) -> Iterator[RunningService]:
    with run_service() as running:
        yield running


def ask(service: RunningService, **options: Any) -> Any:
    body = {"model": "demo", "messages": QUESTION, "max_tokens": 300, "seed": 1, **options}
    return service.client().chat.completions.create(**body)


def test_parse_returns_the_pydantic_model(service: RunningService) -> None:
    parsed = service.client().chat.completions.parse(
        model="demo", messages=QUESTION, response_format=Person, max_tokens=300, temperature=0
    )
    assert isinstance(parsed.choices[0].message.parsed, Person)
    assert parsed.choices[0].finish_reason == "stop"


def test_every_choice_fits_at_high_temperature_with_logprobs(service: RunningService) -> None:
    answer = ask(service, response_format=FORMAT, n=4, temperature=1.5, logprobs=True, top_logprobs=2)
    for choice in answer.choices:
        jsonschema.validate(json.loads(choice.message.content), SCHEMA)
        assert b"".join(bytes(entry.bytes) for entry in choice.logprobs.content).decode() == choice.message.content
    assert len({choice.message.content for choice in answer.choices}) > 1


def test_a_stream_is_the_whole_answer(service: RunningService) -> None:
    whole = ask(service, response_format=FORMAT).choices[0]
    chunks = [chunk.choices[0] for chunk in ask(service, response_format=FORMAT, stream=True)]
    assert "".join(chunk.delta.content or "" for chunk in chunks) == whole.message.content
    assert chunks[-1].finish_reason == whole.finish_reason == "stop"


def test_json_object(service: RunningService) -> None:
    answer = ask(service, response_format={"type": "json_object"}, temperature=0, max_tokens=120).choices[0]
    if answer.finish_reason == "stop":
        assert isinstance(json.loads(answer.message.content), dict)
    assert answer.message.content.startswith("{")


def test_regex_choice_and_grammar(service: RunningService) -> None:
    def text(**wanted: Any) -> str:
        content: str = ask(service, extra_body={"structured_outputs": wanted}).choices[0].message.content
        return content

    assert re.fullmatch(r"(Mr|Ms)\. [A-Z][a-z]{2,8}", text(regex=r"(Mr|Ms)\. [A-Z][a-z]{2,8}"))
    assert text(choice=["Graz", "Zürich", "東京"]) in ("Graz", "Zürich", "東京")
    sum_text = text(grammar='start: NUMBER (" + " NUMBER){2}\nNUMBER: /[1-9][0-9]?/')
    assert re.fullmatch(r"\d+( \+ \d+){2}", sum_text)


def test_a_stop_string_and_a_limit_cut_it(service: RunningService) -> None:
    whole = ask(service, response_format=FORMAT).choices[0].message.content
    stopped = ask(service, response_format=FORMAT, stop=['"age']).choices[0]
    assert (stopped.message.content, stopped.finish_reason) == (whole[: whole.index('"age')], "stop")
    cut = ask(service, response_format=FORMAT, max_tokens=5).choices[0]
    assert cut.finish_reason == "length"
    assert whole.startswith(cut.message.content)


def test_a_schema_that_cannot_be_enforced_is_refused(service: RunningService) -> None:
    schema = {"type": "object", "properties": {"tags": {"type": "array", "uniqueItems": True}}}
    with pytest.raises(openai.BadRequestError) as caught:
        ask(service, response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})
    assert caught.value.param == "response_format.json_schema.schema"
    assert "uniqueItems at #/properties/tags cannot be enforced" in caught.value.message


def test_a_killed_worker_s_grammar_goes_on_elsewhere(
    run_service: Callable[..., AbstractContextManager[RunningService]],
) -> None:
    digits = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "minItems": 40, "maxItems": 40}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": digits}}
    options: dict[str, Any] = {"response_format": wanted, "temperature": 1.5}
    with run_service(NIBBLE_LEASE_S="1") as service:
        expected = ask(service, **options).choices[0].message.content
        text = ""
        for number, chunk in enumerate(ask(service, **options, stream=True)):
            text += chunk.choices[0].delta.content or ""
            if number == 20:
                service.workers()[0].send_signal(signal.SIGKILL)
        assert text == expected
        jsonschema.validate(json.loads(text), digits)
