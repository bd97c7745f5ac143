"""Every (file, -D constants) that the launchers can ask for: what `make kernels` and `Kernels.warm_up` compile."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from nibble.kernels.cuda.compile import SOURCE_DIRECTORY, Cubin, Defines, compile_cubin


def all_variants() -> list[tuple[str, Defines]]:
    """(stem, defines) of each, from the launchers' VARIANTS: of `<launcher>.cu`, or by stem where it has several."""
    variants: list[tuple[str, Defines]] = []
    for path in sorted(SOURCE_DIRECTORY.glob("*.py")):
        if "\nVARIANTS" in path.read_text():
            named = importlib.import_module(f"{__package__}.{path.stem}").VARIANTS
            by_stem = named if isinstance(named, dict) else {path.stem: named}
            variants += [(stem, defines) for stem, every in by_stem.items() for defines in every]
    return variants


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
