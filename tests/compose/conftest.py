"""A daemon, the images, and a whole service of them; all of it as docker-compose.yml and the Dockerfile are shipped."""

from __future__ import annotations

import secrets
import socket
import sys
from collections.abc import Callable, Iterator

import pytest
from compose_service import Service
from docker_commands import ROOT, Compose, docker, running_daemon
from stand_in_images import make_all


@pytest.fixture(scope="session")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with running_daemon(tmp_path_factory.mktemp("docker")):
        stand_ins = make_all()
        sys.stdout.write(f"stand-ins for: {', '.join(stand_ins) or 'nothing'}\n")
        yield


@pytest.fixture(scope="session")
def build(daemon: None) -> Callable[[str], str]:
    """Build a target of the Dockerfile with its cache; returns the image's name."""
    built: set[str] = set()

    def make(target: str) -> str:
        name = f"nibble-{target}"
        if target not in built:
            docker("build", "--target", target, "--tag", name, str(ROOT))
            built.add(target)
        return name

    return make


@pytest.fixture(scope="session")
def service(daemon: None) -> Iterator[Service]:
    port, prometheus_port = free_port(), free_port()
    variables = {"NIBBLE_PORT": str(port), "NIBBLE_PROMETHEUS_PORT": str(prometheus_port)}
    compose = Compose(f"nibble-test-{secrets.token_hex(3)}", variables)
    service = Service(compose, port, prometheus_port)
    try:
        compose("build", "gateway", "worker")
        service.scale(gateways=1, workers=1)
        yield service
    finally:
        sys.stdout.write(compose("logs", "--no-color", check=False))  # pytest shows it where a test failed
        compose("down", "--volumes", "--remove-orphans", "--timeout", "40")
    for kind in ("container", "volume", "network"):
        assert not docker(kind, "ls", "--quiet", "--filter", f"label=com.docker.compose.project={compose.project}")


@pytest.fixture
def port() -> int:
    return free_port()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])
