"""Every (file, -D constants) that the launchers can ask for: what `make kernels` and `Kernels.warm_up` compile."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path

from nibble.kernels.cuda.compile import SOURCE_DIRECTORY, Cubin, Defines, compile_cubin
from nibble.kernels.cuda.rope import defines
from nibble.kernels.layout import KVDtype, KVLayout


def all_variants() -> list[tuple[str, Defines]]:
    """(stem, defines) of each, from the launchers' VARIANTS: of `<launcher>.cu`, or by stem where it has several."""
    variants: list[tuple[str, Defines]] = []
    for path in sorted(SOURCE_DIRECTORY.glob("*.py")):
        if "\nVARIANTS" in path.read_text():
            named = importlib.import_module(f"{__package__}.{path.stem}").VARIANTS
            by_stem = named if isinstance(named, dict) else {path.stem: named}
            variants += [(stem, defines) for stem, every in by_stem.items() for defines in every]
    return variants


def variants_for(layouts: Sequence[KVLayout]) -> list[tuple[str, Defines]]:
    """Those that models with such KV blocks use; all of them, where no layouts are given."""
    used = {defines(kind) for each in layouts for kind in (each, replace(each, dtype=KVDtype.INT8))}  # of rope: INT8
    return [
        (stem, constants)
        for stem, constants in all_variants()
        if not layouts or "HEAD_DIM" not in dict(constants) or constants[:2] in used
    ]


def compile_all(
    architectures: tuple[str, ...],
    cache_directory: Path | None = None,
    variants: Sequence[tuple[str, Defines]] | None = None,
    num_threads: int | None = None,
) -> Iterator[tuple[str, str, Defines, Cubin]]:
    """Compile variants (default: all), in parallel; yields (architecture, stem, defines, cubin) as each is done.

    Raises CompileError. NVRTC runs without the GIL: threads are enough.
    """
    wanted = all_variants() if variants is None else variants
    jobs = [(architecture, *variant) for architecture in architectures for variant in wanted]
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
