"""openai-node, the official client for JavaScript: a streamed tool call, by chunks, folded, and as a response."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from conftest import RunningGateway

PROJECT = Path(__file__).parent / "openai_node"
CALL = {"name": "get_weather", "arguments": {"city": "Rome"}}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the client is installed, as package-lock.json says."""
    for tool in ("node", "npm"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool} on the PATH (on Debian and Ubuntu: apt install nodejs npm)")
    directory = shutil.copytree(
        PROJECT, tmp_path_factory.mktemp("node") / "project", ignore=shutil.ignore_patterns("node_modules")
    )
    command = ["npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts"]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"npm could not install the client: {done.stderr[-300:]}")
    return directory


@pytest.mark.conformance
def test_streamed_tool_call(running: RunningGateway, project: Path) -> None:
    running.reply_with(json.dumps(CALL))
    command = ["node", "stream.mjs", f"{running.url}/v1", "small"]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    seen: dict[str, Any] = json.loads(done.stdout)
    by_chunks, folded, as_response = called(seen["chunks"]), seen["message"]["tool_calls"], seen["response"]["output"]
    assert [call["function"]["name"] for call in (*by_chunks, *folded)] == [CALL["name"]] * 2
    assert [json.loads(call["function"]["arguments"]) for call in (*by_chunks, *folded)] == [CALL["arguments"]] * 2
    assert [(item["type"], item["name"], json.loads(item["arguments"])) for item in as_response] == [
        ("function_call", CALL["name"], CALL["arguments"])
    ]
    assert {name for name, _ in seen["events"]} == {CALL["name"]}
    assert "".join(delta for _, delta in seen["events"]) == folded[0]["function"]["arguments"]
    assert seen["chunks"][-2]["choices"][0]["finish_reason"] == "tool_calls"
    assert seen["chunks"][-1]["usage"]["completion_tokens"] > 1
    assert seen["types"][0] == "response.created"
    assert seen["types"][-1] == "response.completed"


def called(chunks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The calls that deltas amount to."""
    calls: list[dict[str, Any]] = []
    for chunk in chunks:
        for choice in chunk["choices"]:
            for part in choice["delta"].get("tool_calls", ()):
                if part["index"] == len(calls):
                    calls.append(part)
                else:
                    calls[part["index"]]["function"]["arguments"] += part["function"]["arguments"]
    return calls
