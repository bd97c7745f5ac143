"""`python -m nibble.kernels.cuda.build`: compile every kernel into the cache. Needs no GPU.

An image is built with it (`--cache DIR`, which the worker then gets as its kernel cache), so that no start compiles.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from nibble.kernels.cuda.compile import ARCHITECTURES, Cubin, Defines, default_cache_directory
from nibble.kernels.cuda.errors import CompileError
from nibble.kernels.cuda.variants import compile_all


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m nibble.kernels.cuda.build", description=__doc__)
    parser.add_argument("--arch", action="append", choices=ARCHITECTURES, help="may be repeated (default: all)")
    parser.add_argument("--cache", type=Path, help=f"where to put them (default: {default_cache_directory()})")
    parser.add_argument("--threads", type=int, help="(default: one per CPU)")
    options = parser.parse_args(arguments)
    start_s, count = time.perf_counter(), 0
    try:
        for architecture, stem, defines, cubin in compile_all(
            tuple(options.arch or ARCHITECTURES), options.cache, num_threads=options.threads
        ):
            count += 1
            print(describe(architecture, stem, defines, cubin), flush=True)  # noqa: T201  # a command
    except CompileError as error:
        sys.exit(str(error))
    elapsed_s = time.perf_counter() - start_s
    print(f"{count} files in {elapsed_s:.1f} s: {options.cache or default_cache_directory()}")  # noqa: T201  # a command


def describe(architecture: str, stem: str, defines: Defines, cubin: Cubin) -> str:
    """One line: registers of each kernel, and what a fast kernel must not have."""
    kernels = []
    for name, resources in sorted(cubin.resources.items()):
        faults = [f"{resources.spill_bytes} B SPILLED"] if resources.spill_bytes else []
        faults += [f"{resources.stack_bytes} B STACK"] if resources.stack_bytes else []
        kernels.append(" ".join([f"{name} {resources.registers}", *faults]))
    constants = "".join(f" {key}={value}" for key, value in defines)
    return f"{architecture:7} {stem}{constants}, registers: {', '.join(kernels)}"


if __name__ == "__main__":
    main()
