"""Which device a worker takes, and its defaults there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from nibble.service.settings import SettingsError
from nibble.service.worker import device
from nibble.service.worker.settings import WorkerSettings


def settings(**given: object) -> WorkerSettings:
    return WorkerSettings(model_dir=Path("/nowhere"), **given)  # type: ignore[arg-type]


def test_auto_takes_the_gpu_if_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "gpu_problem", lambda: None)
    assert device.uses_cuda(settings())
    assert not device.uses_cuda(settings(device="cpu"))


def test_without_a_usable_gpu_auto_takes_the_cpu_and_cuda_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "gpu_problem", lambda: "the NVIDIA driver sees no GPU")
    assert not device.uses_cuda(settings())
    with pytest.raises(SettingsError, match=r"NIBBLE_DEVICE: the NVIDIA driver sees no GPU \(got 'cuda'\)"):
        device.uses_cuda(settings(device="cuda"))


def test_a_gpu_has_larger_steps_and_a_kv_cache_of_what_is_left() -> None:
    limits = device.engine_limits(settings(gpu_memory_utilization=0.5), is_cuda=True)
    assert (limits.max_num_sequences, limits.max_num_batched_tokens) == (256, 2048)
    assert limits.kv_cache_bytes is None
    assert limits.memory_utilization == 0.5
    limits = device.engine_limits(settings(), is_cuda=False)
    assert (limits.max_num_sequences, limits.max_num_batched_tokens) == (64, 512)
    assert limits.kv_cache_bytes is not None


def test_what_is_set_comes_before_the_defaults_and_every_sequence_fits_into_a_step() -> None:
    given = settings(max_num_sequences=600, max_num_batched_tokens=100, kv_cache_bytes="1GiB")
    limits = device.engine_limits(given, is_cuda=True)
    assert (limits.max_num_sequences, limits.max_num_batched_tokens) == (600, 600)
    assert limits.kv_cache_bytes == 1 << 30


def test_a_step_may_take_longer_on_a_cpu() -> None:
    assert device.step_timeout_s(settings(), is_cuda=True) == 60
    assert device.step_timeout_s(settings(), is_cuda=False) == 300
    assert device.step_timeout_s(settings(step_timeout_s=7.5), is_cuda=False) == 7.5


def test_a_worker_imports_no_backend_before_it_knows_its_device() -> None:
    code = (
        "import sys, nibble.service.worker.__main__ as m; from nibble.service.worker import device; "
        "device.gpu_problem(); print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert not set(done.stdout.split()) & {"torch", "numba", "cupy"}
