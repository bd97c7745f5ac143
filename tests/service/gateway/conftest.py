"""A gateway as clients meet it: real uvicorn on a loopback port, a real Valkey, a worker with predictable tokens."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import tool_cases
import uvicorn
from opentelemetry.trace import Tracer
from small_models import byte_level_tokenizer, sentencepiece_tokenizer, write_model
from synthetic_worker import SyntheticWorker
from tokenizers import AddedToken, Tokenizer

from nibble.engine.protocol import GenerationRequest
from nibble.service.broker.embedded import EmbeddedValkey
from nibble.service.gateway.__main__ import GatewayServer
from nibble.service.gateway.app import create_app, create_gateway
from nibble.service.gateway.gateway import Gateway
from nibble.service.gateway.http_protocol import GatewayProtocol
from nibble.service.gateway.served_model import ServedModel, load_served_model
from nibble.service.gateway.settings import GatewaySettings


@dataclass
class RunningGateway:
    """A gateway process in a thread, and the worker behind it."""

    url: str
    gateway: Gateway
    worker: SyntheticWorker
    tokenizer: Tokenizer

    def openai(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, **options)

    def openai_async(self, **options: Any) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, **options)

    def post(self, body: dict[str, Any], **headers: str) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/chat/completions", json=body, headers=headers, timeout=30)

    def reply_with(self, text: str) -> None:
        """Let the worker answer with this text and end the turn."""
        tokens = [*self.tokenizer.encode(text, add_special_tokens=False).ids, self.end_of_turn]
        self.worker.reply = lambda request: tokens

    @property
    def end_of_turn(self) -> int:
        return min(self.gateway.model.eos_token_ids)


@pytest.fixture(scope="session")
def byte_level() -> Tokenizer:
    return byte_level_tokenizer()


@pytest.fixture(scope="session")
def sentencepiece() -> Tokenizer:
    return sentencepiece_tokenizer()


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory, byte_level: Tokenizer) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "small", byte_level, "<|im_end|>")


@pytest.fixture(scope="session")
def served_model(model_dir: Path) -> ServedModel:
    return load_served_model(model_dir)


@pytest.fixture(scope="module", params=["markers are tokens", "markers are text"])
def tool_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    tokenizer = byte_level_tokenizer()
    if request.param == "markers are tokens":
        tokenizer.add_special_tokens([AddedToken(marker, special=True) for marker in tool_cases.MARKERS[2:]])
        tokenizer.add_tokens([AddedToken(marker, special=False) for marker in tool_cases.MARKERS[:2]])
    directory = write_model(tmp_path_factory.mktemp("tools") / "small", tokenizer, "<|im_end|>")
    return dataclasses.replace(load_served_model(directory), context_length=tool_cases.ROOM)


@pytest.fixture(scope="module")
def chatml(model_dir: Path) -> ServedModel:
    """Its template knows no tools."""
    return dataclasses.replace(load_served_model(model_dir), context_length=tool_cases.ROOM)


@pytest.fixture(scope="session")
def run_gateway(valkey: EmbeddedValkey, model_dir: Path) -> Callable[..., Any]:
    """`with run_gateway(api_keys=...) as running:` a gateway of its own, for tests that need other settings."""

    @contextmanager
    def run(
        *, has_worker: bool = True, namespace: str | None = None, tracer: Tracer | None = None, **options: Any
    ) -> Iterator[RunningGateway]:
        namespace = namespace or f"test-{secrets.token_hex(4)}"
        values = {"redis_url": valkey.url, "model_dir": model_dir, "drain_s": 5.0, **options}
        gateway = create_gateway(GatewaySettings(namespace=namespace, **values))
        gateway.tracer = tracer
        worker = SyntheticWorker(values["redis_url"], namespace, echo(gateway.model))
        if has_worker:
            worker.start()
            assert worker.is_ready.wait(10)
        try:
            with _serving(gateway) as url:
                yield RunningGateway(url, gateway, worker, gateway.model.tokenizer)
        finally:
            if has_worker:
                worker.stop()

    return run


@pytest.fixture(scope="module")
def shared_gateway(run_gateway: Callable[..., Any]) -> Iterator[RunningGateway]:
    with run_gateway() as running:
        yield running


@pytest.fixture
def running(shared_gateway: RunningGateway) -> Iterator[RunningGateway]:
    """The module's gateway, its worker back to echoing after each test."""
    yield shared_gateway
    shared_gateway.worker.reply = echo(shared_gateway.gateway.model)
    shared_gateway.worker.tokens_per_step = 1
    shared_gateway.worker.gate.set()


def echo(model: ServedModel) -> Callable[[GenerationRequest], list[int]]:
    """The last user message, then the end of the turn; `random N` asks for N tokens drawn from the request's seed."""

    def reply(request: GenerationRequest) -> list[int]:
        prompt = model.tokenizer.decode(request.prompt_token_ids, skip_special_tokens=False)
        said: str = re.findall(r"<\|im_start\|>user\n(.*?)<\|im_end\|>", prompt, re.DOTALL)[-1]
        end = min(model.eos_token_ids)
        if said.startswith("random "):
            draw = random.Random(request.sampling.seed)
            return [*(draw.randrange(10, 200) for _ in range(int(said.split()[1]))), end]
        if said.startswith("fail"):
            raise ValueError(said)
        return [*model.encode(said), end]

    return reply


@contextmanager
def _serving(gateway: Gateway) -> Iterator[str]:
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        create_app(gateway), loop="uvloop", http=GatewayProtocol, ws="none", log_config=None, access_log=False
    )
    server = GatewayServer(config, gateway)

    def serve() -> None:  # the loop lives in this thread alone: the test's own may run one
        with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
            runner.run(server.serve(sockets=[listener]))

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        _wait_until_up(server, thread)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=20)
    assert not thread.is_alive(), "the gateway did not stop"
    listener.close()


def _wait_until_up(server: uvicorn.Server, thread: threading.Thread) -> None:
    pause = threading.Event()
    while not server.started:
        assert thread.is_alive(), "the gateway did not start"
        pause.wait(0.005)


def wait_for(condition: Callable[[], object], timeout_s: float = 10) -> None:
    """Until a condition holds that another thread brings about."""
    end_s = time.monotonic() + timeout_s
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < end_s, "it did not happen in time"
        pause.wait(0.005)
