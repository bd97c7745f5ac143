"""Every architecture and option on the GPU against `transformers` with the same weights: in fp16 and in 4 bits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from architectures import ARCHITECTURES, check_logits, native_architecture

from nibble.kernels.interface import Mode

if TYPE_CHECKING:
    from nibble.kernels.cuda.backend import CUDAKernels

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def kernels() -> CUDAKernels:
    pytest.importorskip("cupy")
    from nibble.kernels.cuda.backend import CUDAKernels

    return CUDAKernels(workspace_bytes=256 << 20)


@pytest.mark.parametrize("is_int4", [False, True], ids=["fp16", "int4"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_are_those_of_transformers(tmp_path: Path, kernels: CUDAKernels, name: str, is_int4: bool) -> None:
    native, model = native_architecture(tmp_path, name, is_int4)
    for mode in Mode:
        check_logits(kernels, native, model, mode, 2e-2)  # activations are fp16; random weights make sharp attention
