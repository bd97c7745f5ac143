"""Docker and Compose as a user calls them, and a daemon of our own where none runs."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
DAEMON_START_S = 60.0


def docker(*arguments: str, check: bool = True) -> str:
    """Its standard output."""
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, check=False, cwd=ROOT)
    assert not check or done.returncode == 0, f"docker {' '.join(arguments)}: {done.stderr}"
    return done.stdout.strip()


@contextlib.contextmanager
def running_daemon(directory: Path) -> Iterator[None]:
    """The one that runs already, or one that ends with the context; its images stay for the next time."""
    if docker("version", "--format", "{{.Server.Version}}", check=False):
        yield
        return
    assert shutil.which("dockerd"), "no Docker daemon runs, and there is no dockerd"
    assert os.geteuid() == 0, "no Docker daemon runs, and only root could start one"
    log = directory / "dockerd.log"
    with log.open("wb") as output:  # overlay2: others copy whole images
        daemon = subprocess.Popen(["dockerd", "--storage-driver=overlay2"], stdout=output, stderr=subprocess.STDOUT)
    try:
        wait_until(lambda: bool(docker("info", "--format", "{{.ID}}", check=False)), DAEMON_START_S, log.read_text)
        yield
    finally:
        daemon.terminate()
        daemon.wait(DAEMON_START_S)


def wait_until(condition: Callable[[], bool], timeout_s: float, explain: Callable[[], object]) -> None:
    """Poll until it is so, or fail with the explanation."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, explain()
        time.sleep(0.2)


class Compose:
    """The shipped docker-compose.yml as a project of its own, with these variables and no .env file of anybody."""

    def __init__(self, project: str, variables: Mapping[str, str], overrides: Sequence[Path] = ()) -> None:
        """overrides: files like a docker-compose.override.yml."""
        self.project = project
        files = [part for path in (ROOT / "docker-compose.yml", *overrides) for part in ("--file", str(path))]
        self._command = [*_compose_command(), "--project-name", project, "--env-file", os.devnull, *files]
        self.variables = variables
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("NIBBLE_", "COMPOSE_"))}
        self._environment = {**kept, **variables}

    def __call__(self, *arguments: str, check: bool = True) -> str:
        done = subprocess.run(
            [*self._command, *arguments],
            capture_output=True,
            text=True,
            check=False,
            cwd=ROOT,
            env=self._environment,
        )
        assert not check or done.returncode == 0, f"compose {' '.join(arguments)}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def containers(self, service: str) -> list[str]:
        """Names of its running containers."""
        lines = self("ps", "--format", "json", service).splitlines()
        return sorted(json.loads(line)["Name"] for line in lines)


def has_compose() -> bool:
    """No daemon is asked."""
    done = subprocess.run([*_compose_command(), "version"], capture_output=True, check=False)
    return done.returncode == 0


def _compose_command() -> list[str]:
    beside = Path(sys.executable).with_name("docker-compose")  # requirements/deploy.txt
    if beside.exists():
        return [str(beside)]
    if found := shutil.which("docker-compose"):
        return [found]
    return ["docker", "compose"] if shutil.which("docker") else ["false"]
