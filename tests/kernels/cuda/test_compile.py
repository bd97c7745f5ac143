"""NVRTC needs no GPU: every kernel is compiled for every architecture wherever the tests run."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nibble.kernels.cuda import build, compile, variants
from nibble.kernels.cuda.compile import ARCHITECTURES, SOURCE_DIRECTORY, Cubin, compile_cubin
from nibble.kernels.cuda.errors import CompileError
from nibble.kernels.cuda.variants import all_variants, compile_all

ARCHITECTURE = "sm_80"
# (architecture, stem, kernel) -> what ptxas may spill there: outside the inner loop, as its machine code shows.
TOLERATED_SPILL_BYTES: dict[tuple[str, str, str], int] = {
    ("sm_90a", "sample", "sample"): 32,
    ("sm_90a", "int4_linear", "int4_linear_32"): 40,  # int4_mma and int4_wgmma take its work there
}
SOURCE = """
#include "shared.cuh"
extern "C" __global__ void fill(float* out) { out[threadIdx.x] = VALUE + OFFSET; }
"""


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source directory of its own, with one kernel `fill.cu`."""
    directory = tmp_path / "sources"
    directory.mkdir()
    (directory / "fill.cu").write_text(SOURCE)
    (directory / "shared.cuh").write_text("#define OFFSET 1\n")
    monkeypatch.setattr(compile, "SOURCE_DIRECTORY", directory)
    return directory


@pytest.fixture
def compile_fill(sources: Path, tmp_path: Path) -> Callable[..., Cubin]:
    def compile_it(value: int = 1, architecture: str = ARCHITECTURE) -> Cubin:
        return compile_cubin("fill", (("VALUE", value),), architecture, tmp_path / "cache")

    return compile_it


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What NVRTC was really asked for."""
    calls = []
    original = compile._compile

    def counted(stem: str, defines: compile.Defines, architecture: str) -> Cubin:
        calls.append(stem)
        return original(stem, defines, architecture)

    monkeypatch.setattr(compile, "_compile", counted)
    return calls


def test_every_source_file_has_a_launcher_that_names_its_variants() -> None:
    sources = {path.stem for path in SOURCE_DIRECTORY.glob("*.cu")}
    assert {stem for stem, _ in all_variants()} == sources


@pytest.mark.timeout(1200)  # a minute or two where nothing is in the cache; more on a busy machine
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_compiles_without_spilling(architecture: str) -> None:
    faults = []
    for _, stem, defines, cubin in compile_all((architecture,)):
        faults += [
            f"{stem} {dict(defines)} {name}: {resources}"
            for name, resources in cubin.resources.items()
            if max(resources.spill_bytes, resources.stack_bytes)
            > TOLERATED_SPILL_BYTES.get((architecture, stem, name), 0)
        ]
    assert not faults


def test_resources_are_those_of_each_kernel(sources: Path, compile_fill: Callable[..., Cubin]) -> None:
    (sources / "fill.cu").write_text(
        SOURCE
        + """
        extern "C" __global__ void keep(int* out, int i) {
            __shared__ int kept[256];
            int slow[1000];
            for (int k = 0; k < 1000; k++) slow[k] = out[k];
            kept[threadIdx.x] = slow[i];
            __syncthreads();
            out[threadIdx.x] = kept[i];
        }"""
    )
    resources = compile_fill().resources
    assert set(resources) == {"fill", "keep"}
    assert resources["fill"].registers > 0
    assert (resources["fill"].stack_bytes, resources["fill"].shared_bytes) == (0, 0)
    assert (resources["keep"].stack_bytes, resources["keep"].shared_bytes) == (4000, 1024)


def test_cache_is_used_until_source_header_or_constant_change(
    sources: Path, compile_fill: Callable[..., Cubin], compilations: list[str]
) -> None:
    first = compile_fill()
    assert compile_fill() == first
    assert len(compilations) == 1
    assert compile_fill(value=2).code != first.code
    assert len(compilations) == 2
    (sources / "shared.cuh").write_text("#define OFFSET 2\n")
    assert compile_fill().code != first.code
    assert len(compilations) == 3
    (sources / "fill.cu").write_text(SOURCE.replace("VALUE +", "VALUE -"))
    compile_fill()
    compile_fill(architecture="sm_89")
    assert len(compilations) == 5


@pytest.mark.parametrize("damage", ["half_code", "no_code", "half_report", "no_report", "report_of_another"])
def test_damaged_cache_entry_is_compiled_anew(
    compile_fill: Callable[..., Cubin], compilations: list[str], tmp_path: Path, damage: str
) -> None:
    first = compile_fill()
    (code,) = (tmp_path / "cache").rglob("*.cubin")
    report = code.with_suffix(".json")
    if damage == "report_of_another":
        compile_fill(value=2)
        (other,) = set((tmp_path / "cache").rglob("*.json")) - {report}
        shutil.copy(other, report)
    else:
        extent, what = damage.split("_")
        path = code if what == "code" else report
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2]) if extent == "half" else path.unlink()
    compilations.clear()
    assert compile_fill() == first
    assert compilations == ["fill"]
    assert compile_fill() == first
    assert compilations == ["fill"]


def test_threads_and_leftovers_share_one_cache(compile_fill: Callable[..., Cubin], tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as threads:
        cubins = list(threads.map(lambda i: compile_fill(value=i % 2), range(16)))
    assert all(cubin == cubins[i % 2] for i, cubin in enumerate(cubins))
    assert sorted(path.suffix for path in (tmp_path / "cache" / ARCHITECTURE).iterdir()) == [
        ".cubin",
        ".cubin",
        ".json",
        ".json",
    ]


def test_cache_that_cannot_be_written_costs_only_time(compile_fill: Callable[..., Cubin], tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the directory should be")
    assert compile_fill().code


def test_message_names_file_line_and_constants(sources: Path, compile_fill: Callable[..., Cubin]) -> None:
    (sources / "fill.cu").write_text('#include "shared.cuh"\n\nextern "C" __global__ void fill() { unknown(); }\n')
    with pytest.raises(CompileError, match=r"(?s)fill\.cu for sm_80 with .*VALUE.*sources/fill\.cu\(3\)"):
        compile_fill()
    (sources / "fill.cu").write_text(SOURCE)
    (sources / "shared.cuh").write_text("\n#define OFFSET 1\nint f() { return unknown; }\n")
    with pytest.raises(CompileError, match=r"sources/shared\.cuh\(3\)"):
        compile_fill()


def test_file_may_have_kernels_for_newer_devices_alone(sources: Path, compile_fill: Callable[..., Cubin]) -> None:
    (sources / "fill.cu").write_text("#if __CUDA_ARCH__ >= 890\n" + SOURCE + "\n#endif\n")
    assert not compile_fill().resources
    assert set(compile_fill(architecture="sm_89").resources) == {"fill"}


def test_missing_report_is_an_error(compile_fill: Callable[..., Cubin], monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are found by it, and what spills must not go unnoticed."""
    monkeypatch.setattr(compile, "_OPTIONS", ("-default-device",))
    with pytest.raises(CompileError, match="report of ptxas"):
        compile_fill()
    # The empty log is one byte, which NVRTC writes in place: not into an object that all of Python shares.
    assert bytes([ord(" ")])[0] == ord(" ")


def test_unknown_architecture_is_refused(compile_fill: Callable[..., Cubin]) -> None:
    with pytest.raises(CompileError, match="sm_1"):
        compile_fill(architecture="sm_1")


def test_build_command_fills_a_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(variants, "all_variants", lambda: [("rms_norm", ()), ("embedding", ())])
    build.main(["--arch", "sm_80", "--cache", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 1
    assert any(line.startswith("sm_80   rms_norm, registers: rms_norm ") for line in lines)
    assert len(list((tmp_path / "sm_80").glob("*.cubin"))) == 2


def test_build_command_says_which_kernel_does_not_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> Cubin:
        raise CompileError("rms_norm.cu for sm_80: no")

    monkeypatch.setattr(compile, "_compile", refuse)
    with pytest.raises(SystemExit, match=r"rms_norm\.cu for sm_80: no"):
        build.main(["--arch", "sm_80", "--cache", str(tmp_path)])
