"""What a text must be: compiled before anything is queued, refused by name, and handed to the worker as it is."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import RunningGateway

from nibble.engine.protocol import GrammarKind, GrammarSpec
from nibble.grammar.compiler import GrammarCompiler
from nibble.service.gateway.errors import InvalidRequest, Unavailable
from nibble.service.gateway.schema.chat import ChatCompletionRequest
from nibble.service.gateway.structured_output import NUM_THREADS, GrammarChecker

BODY: dict[str, Any] = {"model": "small", "messages": [{"role": "user", "content": "hi"}]}
SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"type": "null"}}, "required": ["b"]}


def json_schema(schema: Any, **options: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, **options}}


@pytest.mark.parametrize(
    ("fields", "kind", "text"),
    [
        ({"response_format": {"type": "json_object"}}, GrammarKind.JSON_OBJECT, ""),
        ({"response_format": json_schema(SCHEMA, strict=True)}, GrammarKind.JSON_SCHEMA, SCHEMA),
        ({"response_format": json_schema(SCHEMA)}, GrammarKind.JSON_SCHEMA, SCHEMA),
        ({"structured_outputs": {"json": SCHEMA}}, GrammarKind.JSON_SCHEMA, SCHEMA),
        ({"structured_outputs": {"json_object": True, "regex": None}}, GrammarKind.JSON_OBJECT, ""),
        ({"structured_outputs": {"regex": "a+é"}}, GrammarKind.REGEX, "a+é"),
        ({"structured_outputs": {"choice": ["é", "b"]}}, GrammarKind.CHOICE, ["é", "b"]),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, GrammarKind.LARK, 'start: "a"'),
        ({"guided_json": json.dumps(SCHEMA)}, GrammarKind.JSON_SCHEMA, SCHEMA),
        ({"guided_regex": "a+"}, GrammarKind.REGEX, "a+"),
        ({"guided_choice": ["a"]}, GrammarKind.CHOICE, ["a"]),
        ({"guided_grammar": 'start: "a"'}, GrammarKind.LARK, 'start: "a"'),
    ],
)
@pytest.mark.parametrize("path", ["chat/completions", "completions"])
def test_the_worker_gets_the_grammar_of_every_choice(
    running: RunningGateway, fields: dict[str, Any], kind: GrammarKind, text: Any, path: str
) -> None:
    num_seen = len(running.worker.seen)
    body = {**BODY, "prompt": "hi"} if path == "completions" else BODY
    running.worker.reply = lambda request: [10, running.end_of_turn]
    response = httpx.post(f"{running.url}/v1/{path}", json={**body, "n": 2, **fields}, timeout=30)
    assert response.status_code == 200, response.text
    specs = [request.grammar for request in running.worker.seen[num_seen:]]
    assert len(specs) == 2
    for spec in specs:
        assert spec is not None
        assert spec.kind is kind
        assert (spec.text if isinstance(text, str) else json.loads(spec.text)) == text
        if isinstance(text, dict):
            assert list(json.loads(spec.text)["properties"]) == ["b", "a"], "the order of properties is the text's"


@pytest.mark.parametrize(
    "fields", [{}, {"response_format": {"type": "text"}}, {"structured_outputs": {"choice": None}}]
)
def test_free_text_has_no_grammar(running: RunningGateway, fields: dict[str, Any]) -> None:
    assert running.post({**BODY, **fields}).status_code == 200
    assert running.worker.seen[-1].grammar is None


SCHEMA_FIELD = "response_format.json_schema.schema"


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"response_format": json_schema({"items": {"uniqueItems": True}})}, SCHEMA_FIELD, "uniqueItems at #/items"),
        ({"response_format": json_schema({"type": "text"})}, SCHEMA_FIELD, "Invalid type: text"),
        ({"response_format": json_schema({"pattern": "(", "type": "string"})}, SCHEMA_FIELD, "unclosed group"),
        ({"response_format": json_schema({"x": "y" * 140_000})}, SCHEMA_FIELD, "the limit is 131072"),
        ({"response_format": json_schema({"$ref": "#"})}, SCHEMA_FIELD, "no text fits it"),
        ({"structured_outputs": {"regex": "a(b"}}, "structured_outputs.regex", "unclosed group"),
        ({"structured_outputs": {"regex": "a" * 9000}}, "structured_outputs.regex", "9000 bytes, the limit is 8192"),
        ({"structured_outputs": {"regex": "\ud800"}}, "structured_outputs.regex", ""),
        ({"structured_outputs": {"grammar": 'start: "a'}}, "structured_outputs.grammar", "1(10): lexer error"),
        ({"structured_outputs": {"grammar": "start: b"}}, "structured_outputs.grammar", "b"),
        (
            {"structured_outputs": {"grammar": 'start: a "b"\na[temperature=0.5]: /x+/'}},
            "structured_outputs.grammar",
            "temperature at line 2 cannot be enforced",
        ),
        (
            {"guided_grammar": 'start: %json {"x-guidance": {"lenient": true}, "uniqueItems": true}'},
            "guided_grammar",
            "uniqueItems",
        ),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "one string or more"),
        ({"guided_choice": ["a", ""]}, "guided_choice", "choice 1 is not a string of one character or more"),
        ({"guided_json": "{"}, "guided_json", "it is not JSON"),
        ({"guided_json": '{"const": "\\ud800"}'}, "guided_json", ""),
        ({"guided_json": "[" * 50_000}, "guided_json", "it is not JSON"),
    ],
)
def test_what_cannot_be_enforced_is_refused_before_it_is_queued(
    running: RunningGateway, fields: dict[str, Any], param: str, message: str
) -> None:
    num_seen = len(running.worker.seen)
    response = httpx.post(f"{running.url}/v1/chat/completions", content=json.dumps({**BODY, **fields}), timeout=30)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    if "\\ud800" not in json.dumps(fields):  # some of which are not even text
        assert (error["param"], error["code"]) == (param, "invalid_grammar")
    assert message in error["message"]
    assert len(running.worker.seen) == num_seen


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, SCHEMA_FIELD),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
            "response_format.json_schema.name",
        ),
        ({"response_format": {**json_schema(SCHEMA), "type": "text"}}, "response_format.json_schema"),
        ({"response_format": json_schema({}, name="a b")}, "response_format.json_schema.name"),
        ({"response_format": {"type": "json_object", "schema": {}}}, "response_format.schema"),
        ({"response_format": {"type": "structural_tag"}}, "response_format.type"),
        ({"response_format": json_schema({}, examples=[1])}, "response_format.json_schema.examples"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag"),
        ({"structured_outputs": {"regex": "a", "whitespace_pattern": " "}}, "structured_outputs.whitespace_pattern"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs.choice"),
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex"),
        ({"structured_outputs": {"choice": [1]}}, "structured_outputs.choice[0]"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(running: RunningGateway, fields: dict[str, Any], param: str) -> None:
    response = running.post({**BODY, **fields})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


def test_a_description_is_reported(running: RunningGateway) -> None:
    response = running.post({**BODY, "response_format": json_schema({}, description="D")})
    assert response.headers["x-nibble-ignored"] == "response_format.json_schema.description"


class SlowCompiler(GrammarCompiler):
    """Compiles nothing, until it is let."""

    def __init__(self) -> None:
        super().__init__(Path("none"), 1)
        self.gate = threading.Event()
        self.num_checks = 0

    def check(self, spec: GrammarSpec) -> None:
        self.num_checks += 1
        self.gate.wait(30)


def asking(pattern: str) -> ChatCompletionRequest:
    return ChatCompletionRequest.model_validate({**BODY, "guided_regex": pattern})


async def test_a_grammar_that_takes_too_long_is_refused_and_blocks_no_other_kind_of_work() -> None:
    compiler = SlowCompiler()
    checker = GrammarChecker(compiler, timeout_s=0.2)
    slow = [asyncio.create_task(checker.grammar_of(asking(f"{i}"))) for i in range(NUM_THREADS)]
    await asyncio.sleep(0.05)
    with pytest.raises(Unavailable, match="too many grammars are being compiled"):
        await checker.grammar_of(asking("another"))
    for task in slow:
        with pytest.raises(InvalidRequest, match=r"guided_regex: it takes longer than 0\.2 s to compile"):
            await task
    compiler.gate.set()
    assert await checker.grammar_of(asking("another")) == GrammarSpec(GrammarKind.REGEX, "another")


async def test_a_verdict_is_remembered() -> None:
    compiler = SlowCompiler()
    compiler.gate.set()
    checker = GrammarChecker(compiler)
    for _ in range(3):
        await checker.grammar_of(asking("a"))
    assert compiler.num_checks == 1


def test_without_a_usable_tokenizer_the_gateway_starts_and_refuses(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    checker = GrammarChecker(GrammarCompiler(tmp_path / "tokenizer.json", 10))
    checker.warm_up()
    with pytest.raises(InvalidRequest, match="text of this model's tokenizer cannot be constrained"):
        asyncio.run(checker.grammar_of(asking("a")))
