"""Settings of the gateway process."""

from __future__ import annotations

import os
import secrets
import socket
from pathlib import Path
from typing import Annotated, Any

from pydantic import ByteSize, Field, field_validator
from pydantic_settings import NoDecode

from nibble.service.gateway.tool_styles import ReasoningParserName, ToolCallParserName
from nibble.service.settings import ProcessSettings


def _default_gateway_id() -> str:
    return f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"


class GatewaySettings(ProcessSettings):
    """Read once from NIBBLE_ variables in `__main__`."""

    model_dir: Path
    """A native directory, as `nibble convert` makes one, or the link to one that `nibble prepare` makes. A gateway
    reads the tokenizer and the configuration."""
    model_name: str | None = None
    """What clients call the model. By default the directory's name."""
    tool_call_parser: ToolCallParserName = ToolCallParserName.AUTO
    """How the model writes tool calls. `auto`: as its chat template tells."""
    reasoning_parser: ReasoningParserName = ReasoningParserName.AUTO
    """Whether `<think>` begins reasoning. `auto`: as the chat template tells."""
    gateway_id: str = Field(default_factory=_default_gateway_id)
    """Its name in logs and at the broker, which no other gateway may have. By default host name, process id and a
    random part."""
    host: str = "127.0.0.1"
    """Where it listens."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """0: any free port."""
    api_keys: Annotated[tuple[str, ...], NoDecode] = ()
    """Keys that clients must send. Without any, and without a file of keys, the service is open to all."""
    api_keys_file: Path | None = None
    """More keys, hashed, each with a name and limits; see [api.md](api.md)."""
    metrics_public: bool = False
    """`/metrics` needs no key."""
    cors_origins: Annotated[tuple[str, ...], NoDecode] = ()
    """Web pages from these origins may call; `*`: all."""
    vllm_metric_names: bool = True
    """Also export the metric names that dashboards and autoscalers for vLLM read."""
    max_queued_requests: Annotated[int, Field(ge=1)] = 1024
    """More are refused with 429."""
    default_max_tokens: Annotated[int, Field(ge=1)] | None = None
    """For requests that set no limit. By default what is left of the context."""
    cache_per_key: bool = False
    """Requests with different API keys share nothing in the prefix cache: the time to the first token would tell what
    others asked."""
    playground: bool = True
    """A page at `/` to chat with the model in a browser. It asks for the API key as a password if there are keys."""
    max_body_bytes: ByteSize = ByteSize(8 * 2**20)
    """Longer requests are refused with 413."""
    keep_alive_s: Annotated[float, Field(gt=0)] = 15.0
    """A comment is sent to a stream after so much silence, so that proxies keep the connection."""
    drain_s: Annotated[float, Field(ge=0)] = 30.0
    """Running answers may go on for so long after SIGTERM. 2 under `nibble serve`, unless it is set."""
    needs_worker: bool = True
    """Refuse requests while no worker lives. `false` where workers scale from zero."""
    no_worker_timeout_s: Annotated[float, Field(gt=0)] = 120.0
    """A queued request fails after so long without any worker."""
    max_attempts: Annotated[int, Field(ge=1)] = 3
    """A request that so many workers died with is given up."""
    log_ttl_s: Annotated[float, Field(gt=0)] = 600.0
    """How long the tokens of a finished request are kept, to be resumed or repeated."""
    response_ttl_s: Annotated[float, Field(gt=0)] = 3600.0
    """How long a response of `/v1/responses` is kept, and those that it goes on from."""

    @field_validator("api_keys", "cors_origins", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value
