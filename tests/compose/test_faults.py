"""What cannot work says why, in one line, and ends with an error."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import pytest
from docker_commands import Compose, docker

pytestmark = [pytest.mark.compose, pytest.mark.timeout(1500)]

MISSPELT = ("NIBBLE_REDIS_ULR=redis://redis", "NIBBLE_REDIS_ULR: no such setting; did you mean NIBBLE_REDIS_URL?")
LOUD = ("NIBBLE_LOG_LEVEL=LOUD", "NIBBLE_LOG_LEVEL: Input should be")
NO_MODEL = ("NIBBLE_MODEL_DIR=/models/none", "/models/none/")
GRPC = ("OTEL_EXPORTER_OTLP_PROTOCOL=grpc", "OTEL_EXPORTER_OTLP_PROTOCOL: only http/protobuf is supported")


@pytest.mark.parametrize(
    ("target", "variable", "message"),
    [(target, *case) for target in ("gateway", "worker-cpu") for case in (MISSPELT, LOUD, NO_MODEL)]
    + [("worker-cpu", *GRPC)],
)
def test_wrong_setting_is_named(build: Callable[[str], str], target: str, variable: str, message: str) -> None:
    command = ["docker", "run", "--rm", "--init", "--read-only", "--tmpfs", "/tmp", "--env", "NIBBLE_TRACING=true"]
    done = subprocess.run(
        [*command, "--env", variable, build(target)], capture_output=True, text=True, check=False, timeout=120
    )
    (line,) = done.stderr.splitlines()
    assert message in line
    assert done.returncode == 1


def test_a_machine_without_a_gpu_is_told_so(build: Callable[[str], str]) -> None:
    """By Docker, before anything of ours runs; any image does."""
    image = build("worker-cpu")
    compose = Compose("nibble-test-gpu", {"NIBBLE_WORKER_CUDA_IMAGE": image})
    if "nvidia" in docker("info", "--format", "{{json .Runtimes}}"):
        pytest.skip("there is NVIDIA's container runtime here")
    try:
        with pytest.raises(
            AssertionError, match=r'could not select device driver "nvidia" with capabilities: \[\[gpu\]\]'
        ):
            compose("--profile", "gpu", "up", "--no-build", "--no-deps", "--detach", "worker-cuda")
    finally:
        compose("--profile", "gpu", "down", "--volumes")
