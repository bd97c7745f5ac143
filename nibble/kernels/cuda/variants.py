"""Every (file, -D constants) that the launchers can ask for: what `make kernels` and `Kernels.warm_up` compile."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from nibble.kernels.cuda.compile import SOURCE_DIRECTORY, Cubin, Defines, compile_cubin


def all_variants() -> list[tuple[str, Defines]]:
    """(stem, defines) of each, from the VARIANTS of the launcher `<stem>.py` beside every `<stem>.cu`."""
    stems = sorted(path.stem for path in SOURCE_DIRECTORY.glob("*.cu") if path.with_suffix(".py").exists())
    launchers = {stem: importlib.import_module(f"{__package__}.{stem}") for stem in stems}
    return [(stem, defines) for stem, launcher in launchers.items() for defines in launcher.VARIANTS]


def compile_all(
    architectures: tuple[str, ...], cache_directory: Path | None = None, num_threads: int | None = None
) -> Iterator[tuple[str, str, Defines, Cubin]]:
    """Compile everything, in parallel; yields (architecture, stem, defines, cubin) as each is done.

    Raises CompileError. NVRTC runs without the GIL: threads are enough.
    """
    jobs = [(architecture, *variant) for architecture in architectures for variant in all_variants()]
    with ThreadPoolExecutor(num_threads or os.cpu_count(), "nibble-compile") as threads:
        futures = {
            threads.submit(compile_cubin, stem, defines, architecture, cache_directory): (architecture, stem, defines)
            for architecture, stem, defines in jobs
        }
        try:
            for future in as_completed(futures):
                yield *futures[future], future.result()
        finally:
            threads.shutdown(cancel_futures=True)
