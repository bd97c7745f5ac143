"""What each child is told, and the ports."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from nibble.service.gateway.settings import GatewaySettings
from nibble.service.launcher.errors import PortTaken
from nibble.service.launcher.plan import DRAIN_S, Address, Model, Plan
from nibble.service.launcher.ports import claim_port, claim_port_near
from nibble.service.launcher.settings import LauncherSettings
from nibble.service.settings import SettingsError
from nibble.service.worker.settings import WorkerSettings

MODEL = Model(Path("/models/m"), "m")
REDIS_URL = "redis://:secret@127.0.0.1:1/0"


def environments(monkeypatch: pytest.MonkeyPatch, num_workers: int = 1, **variables: str) -> list[dict[str, str]]:
    """Of the gateway and the workers, for a user with these variables."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    settings = LauncherSettings.from_environment(port=0, num_workers=num_workers)
    specs = Plan.make(settings, os.environ).processes(os.environ, REDIS_URL, MODEL)
    assert [spec.name for spec in specs] == ["gateway", *(f"worker-{i + 1}" for i in range(num_workers))]
    return [dict(spec.environment) for spec in specs]


def test_children_are_told_what_they_have_to_agree_on(monkeypatch: pytest.MonkeyPatch) -> None:
    for environment in environments(monkeypatch, num_workers=2, NIBBLE_MAX_NUM_SEQUENCES="3", CUDA_VISIBLE_DEVICES="1"):
        assert environment["NIBBLE_REDIS_URL"] == REDIS_URL
        assert environment["NIBBLE_MODEL_DIR"] == "/models/m"
        assert environment["NIBBLE_MODEL_NAME"] == "m"
        assert environment["NIBBLE_MAX_NUM_SEQUENCES"] == "3"
        assert environment["CUDA_VISIBLE_DEVICES"] == "1"


def test_children_accept_their_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    gateway, worker = environments(
        monkeypatch, NIBBLE_CACHE_DIR="/c", NIBBLE_NUM_WORKERS="1", NIBBLE_NEEDS_WORKER="false"
    )
    for environment, kind in ((gateway, GatewaySettings), (worker, WorkerSettings)):
        monkeypatch.setattr(os, "environ", environment)
        assert kind.from_environment().redis_url == REDIS_URL


def test_workers_share_the_cores_and_have_ports_and_names_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    _, *workers = environments(monkeypatch, num_workers=3)
    assert [worker["NIBBLE_NUM_THREADS"] for worker in workers] == ["2", "2", "2"]
    assert len({worker["NIBBLE_WORKER_ID"] for worker in workers}) == 3
    assert len({worker["NIBBLE_METRICS_PORT"] for worker in workers}) == 3


def test_only_worker_uses_all_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    _, worker = environments(monkeypatch)
    assert "NIBBLE_NUM_THREADS" not in worker


def test_users_thread_count_and_names_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    _, *workers = environments(monkeypatch, num_workers=2, NIBBLE_NUM_THREADS="5", NIBBLE_WORKER_ID="mine")
    assert [worker["NIBBLE_NUM_THREADS"] for worker in workers] == ["5", "5"]
    assert [worker["NIBBLE_WORKER_ID"] for worker in workers] == ["mine-1", "mine-2"]


def test_drain_time_is_short_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    assert float(environments(monkeypatch)[0]["NIBBLE_DRAIN_S"]) == DRAIN_S
    assert float(environments(monkeypatch, NIBBLE_DRAIN_S="17")[0]["NIBBLE_DRAIN_S"]) == 17


@pytest.mark.parametrize(("name", "value"), [("NIBBLE_MAX_NUM_SEQUENCES", "0"), ("NIBBLE_DRAIN_S", "-1")])
def test_childrens_variables_are_checked_before_they_start(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    with pytest.raises(SettingsError, match=name):
        environments(monkeypatch, **{name: value})


def test_users_redis_is_used_where_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert LauncherSettings.from_environment().has_own_broker
    monkeypatch.setenv("NIBBLE_REDIS_URL", "redis://elsewhere/1")
    assert not LauncherSettings.from_environment().has_own_broker


def test_taken_port_is_refused_or_replaced() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PortTaken, match=str(port)):
            claim_port("127.0.0.1", port)
        other = claim_port_near("127.0.0.1", port)
        assert other not in (0, port)
        assert claim_port_near("127.0.0.1", other) == other
        assert claim_port_near("127.0.0.1", 0) == 0, "0 turns a worker's metrics off"


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("0.0.0.0", "http://127.0.0.1:80"),
        ("::", "http://[::1]:80"),
        ("::1", "http://[::1]:80"),
        ("a.b", "http://a.b:80"),
    ],
)
def test_address_reaches_the_gateway_from_this_machine(host: str, url: str) -> None:
    assert Address(host, 80).url == url
