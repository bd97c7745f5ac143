"""What is in the images: the packages of the locks and no others, no root, kernels for every architecture."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from docker_commands import ROOT, docker

pytestmark = [pytest.mark.compose, pytest.mark.timeout(3600)]

MB = 1_000_000
TARGETS = {"gateway": 250 * MB, "worker-cpu": 500 * MB, "worker-cuda": 2000 * MB}
# In no lock, as Python 3.11.3 and newer do not need it; Debian's is older.
ONLY_OLD_PYTHON = {"async-timeout"}


@pytest.fixture(params=list(TARGETS))
def target(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def image(build: Callable[[str], str], target: str) -> str:
    return build(target)


def inspect(image: str) -> dict[str, Any]:
    return dict(json.loads(docker("image", "inspect", image))[0])


def run(image: str, code: str) -> str:
    """Python in a container as a deployment starts it: nothing can be written but /tmp, and there is no network."""
    options = ["--rm", "--init", "--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "--network", "none"]
    return docker("run", *options, image, "python", "-c", code)


def test_its_packages_are_those_of_the_lock(image: str, target: str) -> None:
    code = (
        "import glob, json; from importlib.metadata import distributions; "
        "path = glob.glob('/opt/packages/lib/*/site-packages'); "
        "print(json.dumps({d.name: d.version for d in distributions(path=path)}))"
    )
    installed = {canonical(name): version for name, version in json.loads(run(image, code)).items()}
    lines = (ROOT / "requirements" / f"{target}.txt").read_text().splitlines()
    locked = dict(line.split("==") for line in lines if line and not line.startswith((" ", "#")))
    assert {name: version for name, version in installed.items() if name not in ONLY_OLD_PYTHON} == locked


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_it_stays_within_its_size(image: str, target: str) -> None:
    """Of a base of the size of docker.io's, which a stand-in may be larger than."""
    assert inspect(image)["Size"] <= TARGETS[target]


def test_it_names_itself_and_is_not_root(image: str, target: str) -> None:
    configuration = inspect(image)["Config"]
    labels = {name.rpartition(".")[2]: value for name, value in configuration["Labels"].items()}
    assert labels["title"] == f"nibble-{target}"
    assert {"description", "licenses", "version", "revision", "name"} <= set(labels)
    assert configuration["User"] == "10001:10001"
    assert configuration["Healthcheck"]["Test"][0] == "CMD"
    assert "HOME" not in configuration["Env"]


def test_it_imports_its_process_and_none_of_the_others(image: str, target: str) -> None:
    module = "gateway" if target == "gateway" else "worker"
    others = {
        "gateway": ("torch", "numba", "cupy"),
        "worker-cpu": ("torch", "cupy", "fastapi", "tokenizers"),
        "worker-cuda": ("torch", "numba", "fastapi", "tokenizers"),
    }[target]
    code = (
        f"import importlib.util, nibble.service.{module}.__main__; "
        f"print([name for name in {others!r} if importlib.util.find_spec(name)])"
    )
    assert run(image, code) == "[]"


def test_the_cuda_worker_has_every_kernel_compiled(build: Callable[[str], str]) -> None:
    """The very files that a worker would look for: with none of them missing nothing is compiled at a start."""
    code = (
        "import os; from pathlib import Path; from nibble.kernels.cuda import compile, variants; "
        "directory = Path(os.environ['NIBBLE_KERNEL_CACHE_DIR']); compile._compile = None; "
        "print(len(list(variants.compile_all(compile.ARCHITECTURES, directory))))"
    )
    assert int(run(build("worker-cuda"), code)) > 100


def test_the_cuda_worker_finds_its_libraries_without_a_toolkit(build: Callable[[str], str]) -> None:
    """All but the driver, which the host brings along."""
    code = (
        "from cuda.pathfinder import load_nvidia_dynamic_lib as load; "
        "print(*[Path(load(name).abs_path).is_relative_to('/opt/packages') for name in ('nvrtc', 'cublas')])"
    )
    assert run(build("worker-cuda"), f"from pathlib import Path; {code}") == "True True"


def test_the_cuda_worker_says_what_it_lacks(build: Callable[[str], str]) -> None:
    image = build("worker-cuda")
    name = docker("create", "--read-only", "--tmpfs", "/tmp", image)
    try:
        docker("start", "--attach", name, check=False)
        assert "NIBBLE_DEVICE: there is no NVIDIA driver (got 'cuda')" in docker_logs(name)
        assert docker("inspect", "--format", "{{.State.ExitCode}}", name) == "1"
    finally:
        docker("rm", "--force", name)


def docker_logs(name: str) -> str:
    path = Path(docker("inspect", "--format", "{{.LogPath}}", name))
    return path.read_text()
