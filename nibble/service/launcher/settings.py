"""Settings of the launcher: what `nibble serve` takes as options, or from the environment."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from nibble.service.settings import ProcessSettings


class LauncherSettings(ProcessSettings):
    """Options come before variables. Fields that the gateway and the worker have too go to them."""

    model_dir: Path | None = None
    """A GGUF file, a directory, or an id on the hub. By default the demo model."""
    model_name: str | None = None
    """What clients call the model. By default its file's or repository's name."""
    host: str = "127.0.0.1"
    """Where the gateway listens."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """0: any free port."""
    num_workers: Annotated[int, Field(ge=1)] = 1
    """Worker processes on this machine. They share its cores evenly."""
    cache_dir: Path = Field(default_factory=lambda: Path.home() / ".cache" / "nibble")
    """Demo model, conversions, the embedded server's log. By default `~/.cache/nibble`."""

    @property
    def has_own_broker(self) -> bool:
        """Whether the launcher starts the broker's server itself."""
        return "redis_url" not in self.model_fields_set
