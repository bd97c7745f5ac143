"""Every architecture and option against `transformers` with the same weights: in fp16 and in 4 bits, in both modes."""

from __future__ import annotations

from pathlib import Path

import pytest
from architectures import ARCHITECTURES, check_logits, native_architecture

from nibble.kernels.cpu.backend import CPUKernels
from nibble.kernels.interface import Mode


@pytest.fixture(scope="module")
def kernels() -> CPUKernels:
    return CPUKernels()


@pytest.mark.parametrize("is_int4", [False, True], ids=["fp16", "int4"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_are_those_of_transformers(tmp_path: Path, kernels: CPUKernels, name: str, is_int4: bool) -> None:
    native, model = native_architecture(tmp_path, name, is_int4)
    for mode in Mode:
        # As in test_model.py; a head in INT8 (of quantised models) adds a relative 2^-8 per weight, at random.
        check_logits(kernels, native, model, mode, 2e-2 if mode is Mode.PREFILL or is_int4 else 1e-3)
