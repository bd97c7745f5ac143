"""llm-comply, a tester of the API's formats, against a running gateway. The worker answers what each test asks for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import RunningGateway

from nibble.engine.protocol import GenerationRequest

# What these tests ask for is refused (images) or not there (compaction, which llm-comply calls advisory).
LEFT_OUT = {"chat-image-input", "image-input", "compact-response", "compact-missing-model"}
SKIPPED = {"chat-reasoning-summary", "reasoning-summary"}  # by llm-comply, for models of most names
NUM_TESTS = {"openai-chat": 9, "open-responses": 13}


@pytest.mark.conformance
@pytest.mark.parametrize("api_format", NUM_TESTS)
def test_formats_comply(running: RunningGateway, api_format: str) -> None:
    answer_as_asked(running)
    results = report(running, api_format)
    assert len(results) == NUM_TESTS[api_format]
    judged = [result for result in results if result["id"] not in LEFT_OUT]
    assert {result["id"] for result in judged if result["status"] != "passed"} <= SKIPPED
    assert [result for result in judged if result.get("warnings") or result["status"] == "failed"] == []


def answer_as_asked(running: RunningGateway) -> None:
    """A call where one is required, which a grammar tells, else a text."""
    encode = running.gateway.model.encode
    call = [*encode('{"name": "get_weather", "arguments": {"location": "Rome"}}'), running.end_of_turn]
    text = [*encode("hello there friend"), running.end_of_turn]

    def reply(request: GenerationRequest) -> list[int]:
        return text if request.grammar is None else call

    running.worker.reply = reply


def report(running: RunningGateway, api_format: str) -> list[dict[str, Any]]:
    tool = Path(sys.executable).with_name("llm-comply")
    command = [str(tool), "--json", "--format", api_format, "-u", f"{running.url}/v1", "-k", "none", "-m", "small"]
    done = subprocess.run(command, capture_output=True, text=True)
    results: list[dict[str, Any]] = json.loads(done.stdout)["results"]
    return results
