"""A model with a broken row in its embedding: whoever's prompt has that token gets an error, and nobody else notices.

The real engine on the CPU, under the real worker loop, broker and gateway.
"""

from __future__ import annotations

import asyncio
import json
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from conftest import RunningGateway
from prometheus_client import generate_latest
from real_worker import real_worker
from small_models import CONTEXT_LENGTH, VOCAB_ROOM, write_model
from tiny_models import make_tiny_llama
from tokenizers import Tokenizer

from nibble.engine.checkpoint.native import load_checkpoint
from nibble.engine.limits import EngineLimits
from nibble.engine.llm_engine import LLMEngine
from nibble.kernels.cpu.backend import CPUKernels
from nibble.kernels.layout import KVDtype, KVLayout
from nibble.service.worker.metrics import WorkerMetrics

POISON = "~"  # a token of its own: no text that the tokenizer was trained on has it
NUM_BLOCKS = 16
ERROR = (
    "500 server_error generation_failed: Error code: 500 - no token could be drawn: the model's logits were not finite"
)
QUESTIONS = [f"The quick brown fox number {i} jumps over the lazy dog. " * (1 + i % 3) for i in range(6)]


def poison(directory: Path, token_id: int, value: float) -> None:
    """Every number of this token's embedding is `value` from now on."""
    path = directory / "model.safetensors"
    content = bytearray(path.read_bytes())
    (header_bytes,) = struct.unpack_from("<Q", content)
    entry = json.loads(content[8 : 8 + header_bytes])["embedding.scales"]
    begin, end = (8 + header_bytes + offset for offset in entry["data_offsets"])
    scales = np.frombuffer(content, np.float16, (end - begin) // 2, begin).reshape(entry["shape"])
    scales[token_id] = value
    path.write_bytes(content)


@pytest.fixture(scope="module", params=[float("nan"), float("inf")], ids=str)
def poisoned(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    byte_level: Tokenizer,
    run_gateway: Callable[..., Any],
) -> Iterator[tuple[RunningGateway, WorkerMetrics]]:
    directory = tmp_path_factory.mktemp("poisoned")
    make_tiny_llama(
        directory,
        vocab_size=byte_level.get_vocab_size() + VOCAB_ROOM,
        tied=False,
        max_context_tokens=CONTEXT_LENGTH,
    )
    poison(directory, byte_level.token_to_id(POISON), request.param)
    write_model(directory, byte_level, "<|im_end|>")
    with (
        run_gateway(has_worker=False, model_dir=directory) as running,
        real_worker(running, make_engine(directory), "poisoned") as metrics,
    ):
        yield running, metrics


def make_engine(directory: Path) -> LLMEngine:
    """Blocks for a third of the requests below, so that they are soon used again."""
    checkpoint = load_checkpoint(directory)
    config = checkpoint.config
    block_bytes = KVLayout(config.num_kv_heads, config.head_dim, KVDtype.INT8).block_bytes * config.num_layers
    limits = EngineLimits(NUM_BLOCKS * block_bytes, max_num_sequences=8, max_num_batched_tokens=96)
    return LLMEngine.load(checkpoint, CPUKernels(), limits)


async def ask(client: openai.AsyncOpenAI, question: str) -> str:
    """The greedy answer, or the error's code and message."""
    model = (await client.models.list()).data[0].id
    try:
        answer = await client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": question}], temperature=0, max_tokens=24
        )
    except openai.InternalServerError as error:
        return f"{error.status_code} {error.type} {error.code}: {error.message}"
    return answer.choices[0].message.content or ""


async def ask_all(running: RunningGateway, questions: list[str]) -> list[str]:
    async with running.openai_async() as client:
        return await asyncio.gather(*(ask(client, question) for question in questions))


def test_only_requests_with_the_broken_token_fail(poisoned: tuple[RunningGateway, WorkerMetrics]) -> None:
    """Beside others in a batch, before others in the same blocks, and with a prefix that others share."""
    running, metrics = poisoned
    alone = [asyncio.run(ask_all(running, [question]))[0] for question in QUESTIONS]
    assert len(set(alone)) > 3
    assert ERROR not in alone
    broken = [f"{question}{POISON}, {question}" for question in QUESTIONS]
    for _ in range(3):
        answers = asyncio.run(ask_all(running, [q for pair in zip(QUESTIONS, broken, strict=True) for q in pair]))
        assert answers[::2] == alone
        assert set(answers[1::2]) == {ERROR}
    assert asyncio.run(ask_all(running, QUESTIONS)) == alone
    exported = generate_latest(metrics.registry).decode()
    (count,) = re.findall(r"^nibble_nonfinite_logits_total\{.*\} (\S+)$", exported, re.MULTILINE)
    assert float(count) == 3 * len(QUESTIONS)


def test_a_stream_with_the_broken_token_ends_with_the_error(poisoned: tuple[RunningGateway, WorkerMetrics]) -> None:
    client = poisoned[0].openai()
    stream = client.chat.completions.create(
        model=client.models.list().data[0].id, messages=[{"role": "user", "content": POISON}], stream=True
    )
    with pytest.raises(openai.APIError, match="logits were not finite"):
        list(stream)
