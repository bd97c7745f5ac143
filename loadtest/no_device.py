"""A device that takes no time: what is left of a step is the host's own work, on a machine without a GPU."""

from __future__ import annotations

from collections.abc import Callable

from nibble.kernels.cpu.backend import CPUKernels
from nibble.kernels.interface import Array, HostCopy


class NoDevice(CPUKernels):
    """Captured passes compute nothing: every sampled id stays 0. What is not captured is computed by the CPU."""

    @property
    def device_name(self) -> str:
        return "none"

    @property
    def is_asynchronous(self) -> bool:
        return True

    def fit_workspace(self, step: Callable[[], None]) -> int:
        return 0

    def start_to_host(self, array: Array) -> HostCopy:
        return super().start_to_host(array.copy())

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        return lambda: None
