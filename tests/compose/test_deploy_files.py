"""That the files of a deployment agree with each other and with the settings. Needs no Docker."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from docker_commands import Compose, has_compose

from nibble.service.gateway.__main__ import _CLOSING_S
from nibble.service.settings import KNOWN_VARIABLES, PREFIX

ROOT = Path(__file__).parents[2]
COMPOSE = (ROOT / "docker-compose.yml").read_text()
SERVICES: dict[str, Any] = yaml.safe_load(COMPOSE)["services"]
PORTS = {"gateway": 8000, "worker": 8001, "worker-cuda": 8001, "prometheus": 9090}


def load(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text())


def defaults_in_compose() -> dict[str, str]:
    """Each ${NAME:-default}, and ${NAME:+...} as a variable that is empty by default."""
    found = dict(re.findall(r"\$\{(\w+):-((?:\$\{[^}]*\}|[^}])*)\}", COMPOSE))
    assert len(found) > 10
    return {**dict.fromkeys(re.findall(r"\$\{(\w+):[-+]", COMPOSE), ""), **found}


def test_the_example_of_settings_has_every_variable_and_its_default() -> None:
    examples = dict(re.findall(r"^#?(\w+)=(.*)$", (ROOT / ".env.example").read_text(), re.MULTILINE))
    defaults = defaults_in_compose()
    assert set(examples) == {*defaults, "COMPOSE_PROFILES"}
    given = {"NIBBLE_MODEL", "NIBBLE_MODEL_NAME", "NIBBLE_CPU_WORKERS"}  # examples of something else than the default
    for name in set(defaults) - given:
        assert examples[name] == defaults[name], name


def test_processes_get_settings_that_they_know() -> None:
    for name, service in SERVICES.items():
        ours = {variable for variable in service.get("environment", {}) if variable.startswith(PREFIX)}
        assert ours <= KNOWN_VARIABLES, name


def test_a_gateway_gets_the_time_to_drain() -> None:
    gateway = SERVICES["gateway"]
    grace_s = int(gateway["stop_grace_period"].removesuffix("s"))
    assert grace_s >= gateway["environment"]["NIBBLE_DRAIN_S"] + _CLOSING_S
    assert int(SERVICES["proxy"]["stop_grace_period"].removesuffix("s")) >= grace_s


def test_every_service_is_checked_and_hardened() -> None:
    for name, service in SERVICES.items():
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert "healthcheck" in service, name
        if service["image"].startswith("${NIBBLE_"):
            assert service["cap_drop"] == ["ALL"], name
            assert service["read_only"], name


def test_only_the_api_can_be_published_beyond_this_machine() -> None:
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert {name: len(ports) for name, ports in published.items()} == {"proxy": 1, "prometheus": 1, "grafana": 1}
    assert published["proxy"][0].startswith("${NIBBLE_BIND:-127.0.0.1}:")
    assert published["prometheus"][0].startswith("127.0.0.1:")
    assert published["grafana"][0].startswith("127.0.0.1:")


def test_images_of_others_have_a_tag() -> None:
    names = re.findall(r"_IMAGE:-([^}]+)\}", COMPOSE)
    assert all(re.fullmatch(r"nibble-[\w-]+|[\w/-]+:v?\d[\w.-]*\d[\w.-]*", name) for name in names), names


def test_the_base_is_the_same_in_compose_and_dockerfile() -> None:
    (base,) = re.findall(r"^ARG PYTHON_IMAGE=(\S+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert defaults_in_compose()["PYTHON_IMAGE"] == base


def test_prometheus_asks_services_that_there_are() -> None:
    for job in load("observability/prometheus/prometheus.yml")["scrape_configs"]:
        for discovery in job.get("dns_sd_configs", []):
            assert {PORTS[name] for name in discovery["names"]} == {discovery["port"]}
            assert set(discovery["names"]) <= set(SERVICES)


def test_grafana_finds_its_datasource_and_dashboards() -> None:
    (source,) = load("observability/grafana/provisioning/datasources/prometheus.yml")["datasources"]
    assert source["url"] == f"http://prometheus:{PORTS['prometheus']}"
    (provider,) = load("observability/grafana/provisioning/dashboards/nibble.yml")["providers"]
    mounts = dict(volume.split(":")[:2] for volume in SERVICES["grafana"]["volumes"])
    assert mounts["./observability/grafana/dashboards"] == provider["options"]["path"]
    assert mounts["./observability/grafana/provisioning"] == "/etc/grafana/provisioning"


@pytest.mark.skipif(not has_compose(), reason="no docker-compose here: pip install -r requirements/deploy.txt")
def test_the_profile_for_gpus_puts_a_cuda_worker_in_the_cpu_workers_place() -> None:
    compose = Compose("nibble-test-gpu", {"NIBBLE_CPU_WORKERS": "0", "NIBBLE_GPU_WORKERS": "2"})
    assert "worker-cuda" not in yaml.safe_load(compose("config"))["services"]
    services = yaml.safe_load(compose("--profile", "gpu", "config"))["services"]
    assert services["worker"]["deploy"]["replicas"] == 0
    cuda, cpu = services["worker-cuda"], services["worker"]
    assert cuda["deploy"]["replicas"] == 2
    (device,) = cuda["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"capabilities": ["gpu"], "driver": "nvidia", "count": 1}
    for name in ("depends_on", "networks", "volumes", "read_only", "cap_drop", "security_opt", "stop_grace_period"):
        assert cuda[name] == cpu[name], name


@pytest.mark.parametrize("process", ["gateway", "worker-cpu", "worker-cuda"])
def test_locks_of_images_have_the_versions_that_are_tested(process: str) -> None:
    def pins(name: str) -> dict[str, str]:
        lines = (ROOT / "requirements" / f"{name}.txt").read_text().splitlines()
        return dict(line.split("==") for line in lines if "==" in line and not line.startswith((" ", "#")))

    tested, locked = pins("dev"), pins(process)
    assert len(locked) > 20
    assert {name: locked[name] for name in locked if name in tested} == {
        name: tested[name] for name in locked if name in tested
    }
