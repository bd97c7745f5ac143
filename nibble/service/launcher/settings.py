"""Settings of the launcher: what `nibble serve` takes as options, or from the environment."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from nibble.service.settings import ProcessSettings


class LauncherSettings(ProcessSettings):
    """model_dir is a GGUF file, a directory or an id on the hub; without it the demo model is served.

    redis_url, where it is set, names a server to use instead of an embedded one. port 0 means any free port.
    """

    model_dir: Path | None = None
    model_name: str | None = None
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    num_workers: Annotated[int, Field(ge=1)] = 1
    cache_dir: Path = Field(default_factory=lambda: Path.home() / ".cache" / "nibble")

    @property
    def has_own_broker(self) -> bool:
        """Whether the launcher starts the broker's server itself."""
        return "redis_url" not in self.model_fields_set
