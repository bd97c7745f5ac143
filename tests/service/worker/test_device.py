"""Which device a worker takes, and its defaults there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nibble.engine.limits import SpeculationMethod
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


class Driver:
    """What is asked of libcuda."""

    def __init__(self, num_gpus: int = 1, version: int = 13000, capability: tuple[int, int] = (9, 0)) -> None:
        self._num_gpus, self._version, self._capability = num_gpus, version, capability

    def cuInit(self, flags: int) -> int:
        return 0 if self._num_gpus else 100  # CUDA_ERROR_NO_DEVICE

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = self._num_gpus
        return 0

    def cuDriverGetVersion(self, version: Any) -> int:
        version._obj.value = self._version
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, index: int) -> int:
        value._obj.value = self._capability[attribute - 75]
        return 0


@pytest.mark.parametrize(
    ("driver", "problem"),
    [
        (Driver(num_gpus=0), "the NVIDIA driver sees no GPU"),
        (Driver(version=12080), "the NVIDIA driver is for CUDA 12.8, the least is 13.0"),
        (Driver(capability=(7, 5)), "the GPU has compute capability 7.5, the least is 8.0"),
        (Driver(version=13020, capability=(12, 0)), None),
    ],
)
def test_what_keeps_a_gpu_from_being_used(monkeypatch: pytest.MonkeyPatch, driver: Driver, problem: str | None) -> None:
    monkeypatch.setattr(device.ctypes, "CDLL", lambda name: driver)
    monkeypatch.setattr(device.importlib.util, "find_spec", lambda name: object())
    assert device.gpu_problem() == problem


def test_a_gpu_has_larger_steps_and_a_kv_cache_of_what_is_left() -> None:
    limits = device.engine_limits(settings(gpu_memory_utilization=0.5), is_cuda=True)
    assert (limits.max_num_sequences, limits.max_num_batched_tokens) == (256, 2048)
    assert limits.kv_cache_bytes is None
    assert limits.memory_utilization == 0.5
    assert limits.swap_bytes == 1 << 30
    assert device.engine_limits(settings(swap_bytes=0), is_cuda=True).swap_bytes == 0
    limits = device.engine_limits(settings(), is_cuda=False)
    assert limits.swap_bytes == 0
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


def test_drafts_come_from_the_text_and_from_a_model_where_one_is_given(tmp_path: Path) -> None:
    for is_cuda in (False, True):
        assert device.engine_limits(settings(), is_cuda).speculation is SpeculationMethod.NGRAM
    assert device.engine_limits(settings(speculation="off"), is_cuda=True).speculation is SpeculationMethod.OFF
    given = device.engine_limits(
        settings(speculation="draft_model", draft_model_dir=tmp_path, num_drafts=3), is_cuda=True
    )
    assert (given.speculation, given.draft_model_dir, given.num_drafts) == ("draft_model", tmp_path, 3)
    for wrong in ({"speculation": "draft_model"}, {"draft_model_dir": tmp_path}):
        with pytest.raises(SettingsError, match="NIBBLE_DRAFT_MODEL_DIR: it goes with NIBBLE_SPECULATION=draft_model"):
            device.engine_limits(settings(**wrong), is_cuda=False)
