"""lm-eval drives the service, on texts of its own (lm_eval_tasks/) and with no tokenizer but the service's.

What it finds is compared with what its own `hf` model finds: `transformers`, in float32, with the same GGUF file.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from running_service import RunningService

pytest.importorskip("lm_eval", reason="make test-conformance installs it")
pytestmark = [pytest.mark.conformance, pytest.mark.timeout(1200)]

TASKS = Path(__file__).parent / "lm_eval_tasks"
MAX_LENGTH = 256  # the first of the passages takes two windows of it
# Prompts are computed with products in bf16 and an INT8 KV cache (docs/models.md, "Fidelity"): at most 0.13 was seen in
# an ending of some tokens, and 0.6 % in a passage.
ENDING_TOLERANCE, PASSAGE_TOLERANCE = 0.3, 0.01
Answers = dict[tuple[str, int], list[Any]]  # what the requests of a task's document came to


@pytest.fixture(scope="module")
def service(run_service: Callable[..., Any]) -> Iterator[RunningService]:
    with run_service() as running:
        yield running


@pytest.fixture
def evaluate(tmp_path: Path) -> Callable[..., Answers]:
    def run(model: str, model_args: dict[str, Any], tasks: list[str], *options: str) -> Answers:
        """As one does at a terminal; nothing is downloaded."""
        out = tmp_path / model
        arguments = ",".join(f"{name}={value}" for name, value in model_args.items())
        command = [sys.executable, "-m", "lm_eval", "run", "--model", model, "--model_args", arguments, *options]
        command += ["--include_path", str(TASKS), "--tasks", ",".join(tasks), "--log_samples", "-o", str(out)]
        offline = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OPENAI_API_KEY": "none"}
        subprocess.run(command, env={**os.environ, **offline}, cwd=TASKS, check=True)
        answers = {}
        for task in tasks:
            (file,) = out.glob(f"*/samples_{task}_*.jsonl")
            samples = map(json.loads, file.read_text(encoding="utf-8").splitlines())
            answers |= {(task, sample["doc_id"]): sample["filtered_resps"] for sample in samples}
        return answers

    return run


def test_scores_and_texts_are_those_of_transformers(
    service: RunningService, evaluate: Callable[..., Answers], demo_gguf: Path, demo_checkpoint: Path
) -> None:
    tasks = ["nibble_choices", "nibble_passages", "nibble_continuations"]
    served = {"model": "demo", "base_url": f"{service.url}/v1/completions", "max_length": MAX_LENGTH}
    found = evaluate("local-completions", {**served, "num_concurrent": 2}, tasks, "--batch_size", "4")
    files = {"pretrained": demo_gguf.parent, "gguf_file": demo_gguf.name, "tokenizer": demo_checkpoint}
    expected = evaluate("hf", {**files, "dtype": "float32", "max_length": MAX_LENGTH}, tasks, "--device", "cpu")
    assert found.keys() == expected.keys()
    for (task, document), answers in expected.items():
        own = found[task, document]
        if task == "nibble_continuations":
            assert own == answers
        elif task == "nibble_passages":
            assert [float(score) for score in own] == pytest.approx(list(map(float, answers)), rel=PASSAGE_TOLERANCE)
        else:
            scores, reference = ([float(score) for score, _ in endings] for endings in (own, answers))
            assert scores == pytest.approx(reference, abs=ENDING_TOLERANCE)
            assert scores.index(max(scores)) == reference.index(max(reference))


def test_texts_of_chats_are_the_services_own(service: RunningService, evaluate: Callable[..., Answers]) -> None:
    task = "nibble_continuations"
    served = {"model": "demo", "base_url": f"{service.url}/v1/chat/completions"}
    found = evaluate("local-chat-completions", served, [task], "--apply_chat_template")
    client = service.client()
    for document, line in enumerate((TASKS / "continuations.jsonl").read_text(encoding="utf-8").splitlines()):
        messages: Any = [{"role": "user", "content": json.loads(line)["prompt"]}]
        answer = client.chat.completions.create(
            model="demo", messages=messages, temperature=0, max_tokens=16, stop=["\n"]
        )
        assert found[task, document] == [answer.choices[0].message.content]
        assert answer.choices[0].message.content
