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
    """Read once from NIBBLE_ variables in `__main__`.

    model_name: what clients call the model, the directory's name by default. tool_call_parser, reasoning_parser:
    how the model writes calls and reasoning (tool_styles.py), by default as its chat template tells. api_keys:
    separated by commas; none, and no api_keys_file (those are hashed, and may have limits: api_keys.py), means that
    no key is asked for. metrics_public: /metrics needs no key. cors_origins: separated by commas; pages from there
    may call from a browser. default_max_tokens: for requests that set none, which otherwise may fill the context.
    cache_per_key: requests with different API keys share nothing in the prefix cache, whose hits can be told by the
    time to the first token. playground: whether there is a page at /. drain_s: how long running answers may go on
    after SIGTERM. keep_alive_s: an SSE comment is sent after that much silence, so that proxies keep the
    connection. needs_worker: refuse requests while no worker is alive; false where workers scale from zero.
    response_ttl_s: how long a response of /v1/responses is kept, and those that it goes on from. The others are
    those of GatewayBroker.
    """

    model_dir: Path
    model_name: str | None = None
    tool_call_parser: ToolCallParserName = ToolCallParserName.AUTO
    reasoning_parser: ReasoningParserName = ReasoningParserName.AUTO
    gateway_id: str = Field(default_factory=_default_gateway_id)
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    api_keys: Annotated[tuple[str, ...], NoDecode] = ()
    api_keys_file: Path | None = None
    metrics_public: bool = False
    cors_origins: Annotated[tuple[str, ...], NoDecode] = ()
    vllm_metric_names: bool = True
    max_queued_requests: Annotated[int, Field(ge=1)] = 1024
    default_max_tokens: Annotated[int, Field(ge=1)] | None = None
    cache_per_key: bool = False
    playground: bool = True
    max_body_bytes: ByteSize = ByteSize(8 * 2**20)
    keep_alive_s: Annotated[float, Field(gt=0)] = 15.0
    drain_s: Annotated[float, Field(ge=0)] = 30.0
    needs_worker: bool = True
    no_worker_timeout_s: Annotated[float, Field(gt=0)] = 120.0
    max_attempts: Annotated[int, Field(ge=1)] = 3
    log_ttl_s: Annotated[float, Field(gt=0)] = 600.0
    response_ttl_s: Annotated[float, Field(gt=0)] = 3600.0

    @field_validator("api_keys", "cors_origins", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value
