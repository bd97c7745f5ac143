"""What all processes' settings share: the NIBBLE_ prefix, and that a misspelt variable is an error.

Each process has one frozen subclass in its own `settings.py`, read once in its `__main__`. Processes of one deployment
often share one environment, so a variable is misspelt only if no process knows it: `KNOWN_VARIABLES` lists them all.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import ByteSize, TypeAdapter, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

PREFIX = "NIBBLE_"

# Every variable that some process reads; tests/service/test_settings.py compares it with the Settings classes.
KNOWN_VARIABLES = frozenset(
    {
        # all processes
        "NIBBLE_REDIS_URL",
        "NIBBLE_NAMESPACE",
        "NIBBLE_MODEL_DIR",
        "NIBBLE_MODEL_NAME",
        "NIBBLE_LOG_LEVEL",
        "NIBBLE_TRACING",
        # worker
        "NIBBLE_WORKER_ID",
        "NIBBLE_DEVICE",
        "NIBBLE_NUM_THREADS",
        "NIBBLE_MAX_NUM_SEQUENCES",
        "NIBBLE_MAX_NUM_BATCHED_TOKENS",
        "NIBBLE_KV_CACHE_BYTES",
        "NIBBLE_PREFIX_CACHE",
        "NIBBLE_SPECULATION",
        "NIBBLE_NUM_DRAFTS",
        "NIBBLE_SWAP_BYTES",
        "NIBBLE_DRAFT_MODEL_DIR",
        "NIBBLE_GPU_MEMORY_UTILIZATION",
        "NIBBLE_KERNEL_CACHE_DIR",
        "NIBBLE_KV_DTYPE",
        "NIBBLE_LEASE_S",
        "NIBBLE_STEP_TIMEOUT_S",
        "NIBBLE_METRICS_HOST",
        "NIBBLE_METRICS_PORT",
        "NIBBLE_VLLM_METRIC_NAMES",
        # gateway
        "NIBBLE_GATEWAY_ID",
        "NIBBLE_HOST",
        "NIBBLE_PORT",
        "NIBBLE_TOOL_CALL_PARSER",
        "NIBBLE_REASONING_PARSER",
        "NIBBLE_API_KEYS",
        "NIBBLE_API_KEYS_FILE",
        "NIBBLE_CORS_ORIGINS",
        "NIBBLE_METRICS_PUBLIC",
        "NIBBLE_MAX_QUEUED_REQUESTS",
        "NIBBLE_DEFAULT_MAX_TOKENS",
        "NIBBLE_MAX_BODY_BYTES",
        "NIBBLE_KEEP_ALIVE_S",
        "NIBBLE_DRAIN_S",
        "NIBBLE_CACHE_PER_KEY",
        "NIBBLE_PLAYGROUND",
        "NIBBLE_NEEDS_WORKER",
        "NIBBLE_NO_WORKER_TIMEOUT_S",
        "NIBBLE_MAX_ATTEMPTS",
        "NIBBLE_LOG_TTL_S",
        "NIBBLE_RESPONSE_TTL_S",
        # launcher
        "NIBBLE_CACHE_DIR",
        "NIBBLE_NUM_WORKERS",
    }
)


class SettingsError(ValueError):
    """A variable is unknown or its value is not acceptable. The message is one line that names it."""


class ProcessSettings(BaseSettings):
    """Base of each process's settings. The string below a field is its row in docs/configuration.md."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid")

    redis_url: str = "redis://127.0.0.1:6379/0"
    """The server that gateways and workers share. `nibble serve` starts one itself unless this is set."""
    namespace: str = "nibble"
    """Deployments with different names may share a server."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """What is logged, to standard error."""
    tracing: bool = False
    """OpenTelemetry traces, see [operations.md](operations.md#traces). Needs the extra `tracing`."""

    @classmethod
    def from_environment(cls, **given: Any) -> Self:
        """Read the process environment; `given` values come before it. Raises SettingsError."""
        check_variable_names(os.environ)
        try:
            return cls(**given)
        except ValidationError as error:
            first = error.errors()[0]
            name = PREFIX + ".".join(str(part) for part in first["loc"]).upper()
            raise SettingsError(f"{name}: {first['msg']} (got {first.get('input')!r})") from error


def parse_bytes(text: str) -> int:
    """`24GiB`, `1.5GB` or a number of bytes. Raises SettingsError."""
    try:
        return int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        raise SettingsError(f"{text!r} is no amount of memory such as 24GiB") from None


def check_variable_names(environment: Mapping[str, str]) -> None:
    """Raise SettingsError for the first NIBBLE_ variable that no process reads."""
    for name in sorted(environment):
        if name.startswith(PREFIX) and name not in KNOWN_VARIABLES:
            close = difflib.get_close_matches(name, KNOWN_VARIABLES, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise SettingsError(f"{name}: no such setting{hint}")
