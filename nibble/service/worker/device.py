"""Which backend a worker computes on, and what it may use there. Each is imported only where it is used."""

from __future__ import annotations

import ctypes
import importlib.util
import logging
from pathlib import Path

from nibble.engine.limits import EngineLimits, SpeculationMethod
from nibble.kernels.interface import Kernels
from nibble.kernels.layout import KVDtype
from nibble.service.settings import SettingsError
from nibble.service.worker.settings import WorkerSettings

logger = logging.getLogger(__name__)

LEAST_CAPABILITY = (8, 0)
LEAST_CUDA = 13000  # of the driver: what CuPy and the compiler of the kernels are of
CPU_DEFAULTS = (64, 512)  # sequences, tokens of a step
# Four times as many prefill 5 % faster, but others wait 160 ms, not 92, beside a prompt of 8k (docs/performance.md).
CUDA_DEFAULTS = (256, 2048)
# s; a step takes milliseconds on a GPU, where only a kernel's compilation takes longer. A CPU may need minutes for a
# large model's full step, and half a minute to compile everything (before the first step, but for rare variants).
CUDA_STEP_TIMEOUT_S, CPU_STEP_TIMEOUT_S = 60.0, 300.0
CUDA_SWAP_BYTES = 1 << 30  # a CPU's blocks are in the machine's memory already
KV_CACHE_SHARE = 0.25  # of the machine's free memory, where kv_cache_bytes is not set on a CPU
KV_CACHE_MAX_BYTES = 2 << 30  # ... and at most this: more blocks than the sequences can fill are of no use

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*


def uses_cuda(settings: WorkerSettings) -> bool:
    """Whether to compute on the GPU. Raises SettingsError where it is asked for and cannot be used."""
    if settings.device == "cpu":
        return False
    problem = gpu_problem()
    if problem is None:
        return True
    if settings.device == "cuda":
        raise SettingsError(f"NIBBLE_DEVICE: {problem} (got 'cuda')")
    logger.info("event=no_gpu reason=%r", problem)
    return False


def gpu_problem() -> str | None:
    """Why no GPU can be used, or None. Asks the driver alone: CuPy takes a while to import."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "there is no NVIDIA driver"
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or count.value == 0:
        return "the NVIDIA driver sees no GPU"
    version = ctypes.c_int()
    driver.cuDriverGetVersion(ctypes.byref(version))
    if version.value < LEAST_CUDA:
        return f"the NVIDIA driver is for CUDA {version.value // 1000}.{version.value % 1000 // 10}, the least is 13.0"
    major, minor = ctypes.c_int(), ctypes.c_int()
    driver.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, 0)
    driver.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, 0)
    if (major.value, minor.value) < LEAST_CAPABILITY:
        return f"the GPU has compute capability {major.value}.{minor.value}, the least is 8.0"
    if importlib.util.find_spec("cupy") is None:
        return "CuPy is not installed (pip install nibble[worker-cuda])"
    return None


def make_kernels(settings: WorkerSettings, is_cuda: bool) -> Kernels:
    """The backend. Raises SettingsError where the GPU refuses."""
    if not is_cuda:
        from nibble.kernels.cpu.backend import CPUKernels  # Numba: seconds, and not wanted on a GPU worker

        return CPUKernels(settings.num_threads)
    from nibble.kernels.cuda.backend import CUDAKernels  # CuPy: not there on a CPU worker
    from nibble.kernels.cuda.errors import CUDABackendError

    try:
        return CUDAKernels(kernel_cache=settings.kernel_cache_dir)
    except CUDABackendError as error:
        raise SettingsError(f"NIBBLE_DEVICE: {error} (got {settings.device!r})") from error


def engine_limits(settings: WorkerSettings, is_cuda: bool) -> EngineLimits:
    """What the settings allow, with the device's defaults for what they leave open. Raises SettingsError."""
    num_sequences, num_tokens = CUDA_DEFAULTS if is_cuda else CPU_DEFAULTS
    max_num_sequences = settings.max_num_sequences or num_sequences
    kv_cache_bytes: int | None = settings.kv_cache_bytes
    if kv_cache_bytes is None and not is_cuda:
        kv_cache_bytes = min(KV_CACHE_MAX_BYTES, int(_free_memory_bytes() * KV_CACHE_SHARE))
    speculation = SpeculationMethod(settings.speculation)
    if (speculation is SpeculationMethod.DRAFT_MODEL) != (settings.draft_model_dir is not None):
        raise SettingsError(
            "NIBBLE_DRAFT_MODEL_DIR: it goes with NIBBLE_SPECULATION=draft_model "
            f"(got {str(settings.draft_model_dir)!r} and {str(speculation)!r})"
        )
    swap_bytes = settings.swap_bytes if settings.swap_bytes is not None else CUDA_SWAP_BYTES
    return EngineLimits(
        kv_cache_bytes=kv_cache_bytes,
        max_num_sequences=max_num_sequences,
        max_num_batched_tokens=max(settings.max_num_batched_tokens or num_tokens, max_num_sequences),
        kv_dtype=KVDtype(settings.kv_dtype),
        memory_utilization=settings.gpu_memory_utilization,
        has_prefix_cache=settings.prefix_cache,
        speculation=speculation,
        num_drafts=settings.num_drafts,
        swap_bytes=swap_bytes if is_cuda else 0,
        draft_model_dir=settings.draft_model_dir,
    )


def step_timeout_s(settings: WorkerSettings, is_cuda: bool) -> float:
    """How long a step may take before it counts as hung."""
    return settings.step_timeout_s or (CUDA_STEP_TIMEOUT_S if is_cuda else CPU_STEP_TIMEOUT_S)


def _free_memory_bytes() -> int:
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024
