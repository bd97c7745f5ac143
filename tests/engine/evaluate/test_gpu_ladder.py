"""The ladder on a GPU measures what it measures on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hf_models import VOCAB_SIZE, random_hf_model, save_hf_model

from nibble.engine.evaluate.checkpoints import make_pair
from nibble.engine.evaluate.ladder import Settings, measure, rungs_of
from nibble.engine.quantize.options import Method, Options
from nibble.engine.quantize.quantize import quantize
from nibble.kernels.cpu.backend import CPUKernels

if TYPE_CHECKING:
    from nibble.kernels.cuda.backend import CUDAKernels

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def kernels() -> CUDAKernels:
    pytest.importorskip("cupy")
    from nibble.kernels.cuda.backend import CUDAKernels

    return CUDAKernels(workspace_bytes=256 << 20)


def test_quality_is_that_of_the_cpu(tmp_path: Path, kernels: CUDAKernels) -> None:
    """Of sequences that are not a whole number of chunks."""

    def silent(stage: str, done: float) -> None:
        pass

    source = save_hf_model(random_hf_model("llama", max_position_embeddings=1024), tmp_path / "source")
    options = Options(Method.RTN, group_size=32, device="cpu")
    pair = make_pair(source, None, tmp_path / "cache", lambda out: quantize(source, out, options, silent), silent)
    rungs = rungs_of(pair)
    sequences = np.random.default_rng(0).integers(0, VOCAB_SIZE, (2, 700)).astype(np.int32)
    gpu, cpu = (measure(rungs, sequences, each, Settings(8), silent) for each in (kernels, CPUKernels()))
    for ours, theirs in zip(gpu, cpu, strict=True):
        assert ours.quality.num_tokens == theirs.quality.num_tokens == 1400
        assert ours.quality.perplexity == pytest.approx(theirs.quality.perplexity, rel=1e-2)
        assert ours.quality.mean_kl == pytest.approx(theirs.quality.mean_kl, rel=0.2, abs=1e-4)
        assert ours.quality.top1_agreement == pytest.approx(theirs.quality.top1_agreement, abs=0.02)
