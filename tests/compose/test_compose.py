"""The shipped docker-compose.yml with a real daemon: answers, lost containers, more gateways, Prometheus.

The tests share one service. Each leaves it whole: as many gateways and workers as it found, or more.
"""

from __future__ import annotations

import json
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator

import pytest
from compose_service import Service
from docker_commands import ROOT, docker, wait_until

pytestmark = [pytest.mark.compose, pytest.mark.timeout(1500)]

TOKENS = 160
PROMPT = "Tell a long story about a lighthouse keeper and a storm."
SCRAPE_S = 40.0


def stream(service: Service, max_tokens: int = TOKENS) -> Iterator[str]:
    """Pieces of the one answer that greedy decoding gives."""
    chunks = service.client().chat.completions.create(
        model=service.client().models.list().data[0].id,
        messages=[{"role": "user", "content": PROMPT}],
        max_tokens=max_tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    for chunk in chunks:
        if chunk.usage is not None:
            assert chunk.usage.completion_tokens == max_tokens
        for choice in chunk.choices:
            yield choice.delta.content or ""


@pytest.fixture(scope="module")
def answer(service: Service) -> str:
    """What a service that nothing happens to says."""
    return "".join(stream(service))


def busy(service: Service, kind: str, gauge: str) -> str:
    """The container that computes, or serves, the only running request."""
    (container,) = [name for name in service.compose.containers(kind) if service.gauge(name, gauge)]
    return container


def interrupted(service: Service, break_it: Callable[[], object]) -> str:
    """An answer while whose stream something is broken, once, after its tenth piece."""
    pieces = []
    for piece in stream(service):
        pieces.append(piece)
        if len(pieces) == 10:
            break_it()
    return "".join(pieces)


def test_the_demo_model_answers_through_the_openai_client(service: Service, answer: str) -> None:
    assert len(answer) > TOKENS
    models = service.client().models.list().data
    assert [model.id for model in models] == ["SmolLM2-135M-Instruct"]


def test_containers_of_ours_can_write_nothing_and_are_nobody(service: Service) -> None:
    for kind in ("gateway", "worker"):
        (container,) = service.compose.containers(kind)
        assert docker("exec", container, "id", "-u") == "10001"
        assert docker("exec", container, "sh", "-c", "touch /x /opt/x 2>&1 || true").count("Read-only file system") == 2
        capabilities = docker("exec", container, "sh", "-c", "grep CapEff /proc/self/status")
        assert int(capabilities.split()[1], 16) == 0


def test_only_this_machine_reaches_it_and_metrics_are_not_shown(service: Service) -> None:
    for container in docker(
        "ps", "--quiet", "--filter", f"label=com.docker.compose.project={service.compose.project}"
    ).split():
        published = json.loads(docker("inspect", "--format", "{{json .NetworkSettings.Ports}}", container))
        addresses = [binding["HostIp"] for bindings in published.values() for binding in bindings or []]
        assert set(addresses) <= {"127.0.0.1"}
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"{service.url}/metrics", timeout=10)


def test_two_gateways_share_the_requests(service: Service, answer: str) -> None:
    service.scale(gateways=2, workers=2)
    gateways = service.compose.containers("gateway")
    assert len(gateways) == 2
    before = [service.gauge(name, "nibble_http_responses_total") for name in gateways]
    threads = [threading.Thread(target=lambda: "".join(stream(service, 20))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    after = [service.gauge(name, "nibble_http_responses_total") for name in gateways]
    assert all(now >= earlier + 2 for earlier, now in zip(before, after, strict=True))


def test_killed_worker_loses_no_token(service: Service, answer: str) -> None:
    killed = []

    def kill() -> None:
        killed.append(busy(service, "worker", "nibble_running_sequences"))
        docker("kill", killed[0])

    assert interrupted(service, kill) == answer
    (survivor,) = service.compose.containers("worker")
    assert service.gauge(survivor, "nibble_recovered_requests_total") == 1
    recovered = "sum(nibble_recovered_requests_total)"
    wait_until(lambda: service.query(recovered) == 1, SCRAPE_S, lambda: service.query(recovered))
    service.scale(gateways=2, workers=2)


def test_stopped_worker_hands_its_request_on(service: Service, answer: str) -> None:
    def stop() -> None:
        docker("stop", "--time", "60", busy(service, "worker", "nibble_running_sequences"))

    assert interrupted(service, stop) == answer
    service.scale(gateways=2, workers=2)


def test_stopped_gateway_ends_the_answers_it_has_begun(service: Service, answer: str) -> None:
    stopped = []

    def stop() -> None:
        name = busy(service, "gateway", "nibble_num_requests_running")
        stopped.append(threading.Thread(target=docker, args=("stop", "--time", "40", name)))
        stopped[0].start()

    assert interrupted(service, stop) == answer
    stopped[0].join()
    assert "".join(stream(service)) == answer, "the other one takes what comes"
    service.scale(gateways=2, workers=2)


def test_restarted_redis_keeps_what_runs(service: Service, answer: str) -> None:
    (redis,) = service.compose.containers("redis")
    assert interrupted(service, lambda: docker("restart", redis)) == answer


def test_prometheus_finds_every_container_and_has_their_data(service: Service, answer: str) -> None:
    def targets() -> dict[str, int]:
        active = service.prometheus("targets?state=active")["activeTargets"]
        jobs = [target["labels"]["job"] for target in active if target["health"] == "up"]
        return {job: jobs.count(job) for job in jobs}

    wait_until(lambda: targets() == {"nibble-gateway": 2, "nibble-worker": 2, "prometheus": 1}, SCRAPE_S, targets)
    expressions = (
        "sum(nibble_generation_tokens_total)",
        "sum(nibble_decode_tokens_total)",
        "sum(nibble_time_to_first_token_seconds_count)",
        'sum(nibble_http_responses_total{status="200"})',
    )

    def missing() -> list[str]:
        return [expression for expression in expressions if service.query(expression) <= 0]

    wait_until(lambda: not missing(), SCRAPE_S, missing)


def test_prometheus_evaluates_every_rule(service: Service) -> None:
    def rules() -> list[dict[str, str]]:
        return [rule for group in service.prometheus("rules")["groups"] for rule in group["rules"]]

    def broken() -> list[dict[str, str]]:
        return [rule for rule in rules() if rule["health"] != "ok"]

    files = (ROOT / "observability" / "prometheus" / "rules").glob("*.yml")
    assert len(rules()) == sum(
        len(re.findall(r"^ +- (?:record|alert):", file.read_text(), re.MULTILINE)) for file in files
    )
    assert rules()
    wait_until(lambda: not broken(), SCRAPE_S, broken)


def test_the_service_ends_within_its_grace_period(service: Service) -> None:
    """Last: exit code 0 of each means that none had to be killed."""
    containers = [name for kind in ("gateway", "worker", "proxy") for name in service.compose.containers(kind)]
    service.compose("stop", "gateway", "worker", "proxy")
    codes = {name: docker("inspect", "--format", "{{.State.ExitCode}}", name) for name in containers}
    assert set(codes.values()) == {"0"}, codes
