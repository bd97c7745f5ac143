"""schemathesis on our own OpenAPI document: no 5xx, and answers are what the document says.

Not that everything which fits the schemas is accepted: templates, the vocabulary and the context say no to more.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import RunningGateway


@pytest.mark.conformance
@pytest.mark.timeout(600)
def test_document_describes_what_is_served(running: RunningGateway) -> None:
    tokens = [*running.gateway.model.encode("hello"), running.end_of_turn]
    running.worker.reply = lambda request: tokens
    tool = Path(sys.executable).with_name("schemathesis")
    options = ["--max-examples=40", "--seed=1", "--no-color", "--exclude-checks=positive_data_acceptance"]
    command = [str(tool), "run", f"{running.url}/openapi.json", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert running.gateway.metrics.responses[200] > 50
