"""What `make sanitize-gpu` runs under the sanitizer's tools runs, and leaves no kernel out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from nibble.kernels.cuda.backend import CUDAKernels

pytestmark = pytest.mark.gpu


def test_every_kernel_has_a_small_case(kernels: CUDAKernels) -> None:
    command = [sys.executable, "-m", "tests.kernels.cuda.sanitize"]  # a process of its own: it replaces the allocator
    subprocess.run(command, cwd=Path(__file__).parents[3], check=True)
