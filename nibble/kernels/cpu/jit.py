"""How this package compiles: Numba with an on-disk cache that never goes stale and never needs a writable package.

Numba keys a cached function by its own file's time stamp, its signature and the CPU's name and features, but not by
the files that it calls into. So the cache directory here carries a hash of all sources of the package: an edited
`simd.py` cannot meet an old `int4_linear`. NUMBA_CACHE_DIR, where set, replaces the directory.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import numba
from numba.core import config


def _cache_directory() -> Path:
    digest = hashlib.sha256(numba.__version__.encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    directory = root / "nibble" / f"cpu-{digest.hexdigest()[:16]}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if os.access(directory, os.W_OK):
            return directory
    except OSError:
        pass
    # A private directory for this process: code from a shared one that others can write must not be loaded.
    return Path(tempfile.mkdtemp(prefix="nibble-cpu-"))


if not config.CACHE_DIR:
    config.CACHE_DIR = str(_cache_directory())

# error_model: dividing by zero gives inf as in IEEE 754, without a branch to raise.
# called from kernels and compiled into them: no entry for Python, a fifth of the compile time
inline_jit = numba.njit(error_model="numpy", nogil=True, no_cpython_wrapper=True, no_cfunc_wrapper=True)
kernel_jit = numba.njit(error_model="numpy", nogil=True, cache=True)  # called from Python


class ChunkFunction:
    """A function (address of int64 arguments, chunk) -> None that the thread pool calls through a pointer."""

    def __init__(self, function: Callable[[int, int], None]) -> None:
        self._function = function

    @cached_property
    def address(self) -> int:
        """Compiles, or loads from the cache, at the first use: importing the package costs nothing."""
        compiled = numba.cfunc("void(int64, int64)", nopython=True, cache=True, error_model="numpy")(self._function)
        return int(compiled.address)
