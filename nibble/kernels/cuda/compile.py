"""A .cu file and its -D constants to machine code: NVRTC, with a cache on disk. Needs no GPU.

NVRTC sees only this package: headers are handed over in memory, nothing is searched on the machine and no CUDA header
is used. The cache key covers what the code depends on: source, every header, options, architecture, NVRTC's version.
An image ships a filled directory (`make kernels`), so that a worker's start compiles nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

from cuda.bindings import nvrtc

from nibble.kernels.cuda.errors import CompileError

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a")  # what every .cu must compile for
SOURCE_DIRECTORY = Path(__file__).parent

Defines: TypeAlias = tuple[tuple[str, int], ...]  # (name, value), in a fixed order: part of the cache key

# NVRTC has a cache of its own where there is a driver; what comes out of it has no report of ptxas.
_OPTIONS = ("-std=c++17", "-default-device", "-lineinfo", "--ptxas-options=-v", "--no-cache")


@dataclass(frozen=True)
class KernelResources:
    """What ptxas says of one kernel."""

    registers: int
    spill_bytes: int  # stores and loads to local memory
    stack_bytes: int
    shared_bytes: int  # static


@dataclass(frozen=True)
class Cubin:
    """Machine code of one .cu file for one architecture."""

    code: bytes
    resources: dict[str, KernelResources]  # by kernel name


def compile_cubin(stem: str, defines: Defines, architecture: str, cache_directory: Path | None = None) -> Cubin:
    """Compile `<stem>.cu`, or load it from the cache (default: the user's). Raises CompileError."""
    directory = (cache_directory or default_cache_directory()) / architecture
    path = directory / f"{stem}-{_key(stem, defines, architecture)}.cubin"
    cubin = _load(path)
    if cubin is None:
        cubin = _compile(stem, defines, architecture)
        _store(path, cubin)
    return cubin


@cache
def default_cache_directory() -> Path:
    """`nibble/cuda` in the user's cache directory, or a private one of this process where that is not writable."""
    directory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nibble" / "cuda"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if os.access(directory, os.W_OK):
            return directory
    except OSError:
        pass
    # Code from a shared directory that others can write must not be loaded.
    return Path(tempfile.mkdtemp(prefix="nibble-cuda-"))


def _options(defines: Defines, architecture: str) -> list[str]:
    return [f"--gpu-architecture={architecture}", *_OPTIONS, *(f"-D{name}={value}" for name, value in defines)]


def _key(stem: str, defines: Defines, architecture: str) -> str:
    digest = hashlib.sha256(repr((nvrtc_version(), _options(defines, architecture))).encode())
    for path in [SOURCE_DIRECTORY / f"{stem}.cu", *_headers()]:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:24]


def _headers() -> list[Path]:
    return sorted(SOURCE_DIRECTORY.glob("*.cuh"))


@cache
def nvrtc_version() -> tuple[int, int]:
    error, major, minor = nvrtc.nvrtcVersion()
    _check(error)
    return major, minor


def _compile(stem: str, defines: Defines, architecture: str) -> Cubin:
    source = _with_line(SOURCE_DIRECTORY / f"{stem}.cu")
    headers = _headers()
    texts, names = [_with_line(path) for path in headers], [path.name.encode() for path in headers]
    error, program = nvrtc.nvrtcCreateProgram(source, f"{stem}.cu".encode(), len(headers), texts, names)
    _check(error)
    try:
        options = [option.encode() for option in _options(defines, architecture)]
        (error,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        log = _read(program, nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog).rstrip(b"\0").decode()
        if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise CompileError(f"{stem}.cu for {architecture} with {dict(defines)}:\n{log}")
        resources = dict(_parse_resources(log))
        # A file for Hopper alone has no kernels for older devices, but a report.
        if "ptxas info" not in log or len(resources) != log.count("Compiling entry function"):
            raise CompileError(f"{stem}.cu for {architecture}: the report of ptxas is not understood:\n{log}")
        return Cubin(_read(program, nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN), resources)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _with_line(path: Path) -> bytes:
    """The text, so that messages and profilers name the file itself."""
    return f'#line 1 "{path}"\n'.encode() + path.read_bytes()


def _read(program: Any, size_of: Any, get: Any) -> bytes:
    error, size = size_of(program)
    _check(error)
    # Filled in place. Never one byte long: Python shares those with everybody.
    buffer = bytes(max(size, 2))
    (error,) = get(program, buffer)
    _check(error)
    return buffer[:size]


def _check(error: Any) -> None:
    if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise CompileError(f"NVRTC: {error.name}")


_FUNCTION = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def _parse_resources(log: str) -> Iterator[tuple[str, KernelResources]]:
    for match in _FUNCTION.finditer(log):
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        yield (
            match["name"],
            KernelResources(
                registers=int(match["registers"]),
                spill_bytes=int(match["stores"]) + int(match["loads"]),
                stack_bytes=int(match["stack"]),
                shared_bytes=int(shared[1]) if shared else 0,
            ),
        )


def _load(path: Path) -> Cubin | None:
    """None where either file is missing, or is not what was written (a disk that lost power, or was full)."""
    try:
        code, report = path.read_bytes(), json.loads(path.with_suffix(".json").read_bytes())
        if report["sha256"] != hashlib.sha256(code).hexdigest():
            return None
        return Cubin(code, {name: KernelResources(**fields) for name, fields in report["resources"].items()})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _store(path: Path, cubin: Cubin) -> None:
    """Write both files under other names first: a reader sees a whole file or none."""
    report = {
        "sha256": hashlib.sha256(cubin.code).hexdigest(),
        "resources": {name: asdict(fields) for name, fields in cubin.resources.items()},
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for target, content in ((path.with_suffix(".json"), json.dumps(report).encode()), (path, cubin.code)):
            _replace(target, content)
    except OSError:
        pass  # a full or read-only disk costs the next start its compile time, nothing else


def _replace(target: Path, content: bytes) -> None:
    with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as file:
        try:
            file.write(content)
            file.flush()
            os.chmod(file.name, 0o644)
            os.replace(file.name, target)
        except BaseException:
            os.unlink(file.name)
            raise
