"""Traces of the shipped docker-compose.yml, with a collector beside it as docs/deploy.md has it."""

from __future__ import annotations

import json
import re
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml
from compose_service import START_TIMEOUT_S, Service
from docker_commands import ROOT, Compose, wait_until

pytestmark = [pytest.mark.compose, pytest.mark.timeout(1500)]

EXPORT_S = 30.0


def documented_override() -> dict[str, Any]:
    """The example in docs/deploy.md."""
    (block,) = re.findall(
        r"```yaml\n(# docker-compose.override.yml\n.*?)```", (ROOT / "docs" / "deploy.md").read_text(), re.S
    )
    return dict(yaml.safe_load(block))


def test_gateway_and_worker_say_their_part_of_one_trace(service: Service, port: int, tmp_path: Path) -> None:
    override = documented_override()
    override["services"]["collector"] |= {
        "image": "nibble-gateway",
        "command": ["python", "/collector.py"],
        "volumes": [f"{Path(__file__).with_name('collector.py')}:/collector.py:ro"],
        "ports": [f"127.0.0.1:{port}:4318"],
        "healthcheck": {"disable": True},
    }
    file = tmp_path / "override.yml"
    file.write_text(yaml.safe_dump(override))
    compose = Compose(service.compose.project, {**service.compose.variables, "NIBBLE_TRACING": "true"}, [file])
    compose(
        *("up", "--no-build", "--wait", "--wait-timeout", START_TIMEOUT_S, "collector", "proxy", "gateway", "worker")
    )
    answer = service.client().chat.completions.create(
        model="SmolLM2-135M-Instruct", messages=[{"role": "user", "content": "Hello!"}], max_tokens=4
    )
    assert answer.choices[0].message.content

    def spans() -> dict[str, dict[str, str]]:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/spans", timeout=10) as response:
            return {span["service.name"]: span for span in json.load(response)}

    wait_until(lambda: set(spans()) == {"nibble-gateway", "nibble-worker"}, EXPORT_S, spans)
    whole, work = spans()["nibble-gateway"], spans()["nibble-worker"]
    assert (whole["name"], work["name"]) == ("chat SmolLM2-135M-Instruct", "generate SmolLM2-135M-Instruct")
    assert work["trace_id"] == whole["trace_id"]
    assert work["parent_span_id"] == whole["span_id"]
