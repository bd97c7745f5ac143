"""Fixtures of the engine's tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM


@pytest.fixture(scope="session")
def demo_reference(demo_gguf: Path) -> torch.nn.Module:
    """The demo model as `transformers` loads it: every weight dequantised to float32."""
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(
        demo_gguf.parent, gguf_file=demo_gguf.name, dtype=torch.float32
    )
    return model.eval()
