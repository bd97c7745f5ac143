"""The shipped docker-compose.yml with a real daemon: answers, lost containers, more gateways, Prometheus.

The tests share one service. Each leaves it whole: as many gateways and workers as it found, or more.
"""

from __future__ import annotations

import json
import re
import secrets
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import httpx
import pytest
from compose_service import Service
from docker_commands import ROOT, docker, wait_until

pytestmark = [pytest.mark.compose, pytest.mark.timeout(1500)]

TOKENS = 160
PROMPT = "Tell a long story about a lighthouse keeper and a storm."
SCRAPE_S = 40.0
# Of the one answer that greedy decoding gives.
REQUEST: dict[str, Any] = {
    "messages": [{"role": "user", "content": PROMPT}],
    "max_tokens": TOKENS,
    "temperature": 0,
    "stream": True,
}


def stream(service: Service, max_tokens: int = TOKENS) -> Iterator[str]:
    """Pieces of the answer."""
    chunks = service.client().chat.completions.create(
        **{**REQUEST, "max_tokens": max_tokens},
        model=service.client().models.list().data[0].id,
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


def test_stream_of_a_killed_gateway_is_resumed_at_another(service: Service, answer: str) -> None:
    """As a client does it that remembers the id of the last event it has seen."""
    body = {**REQUEST, "model": "SmolLM2-135M-Instruct", "ignore_eos": True}
    headers = {"Idempotency-Key": secrets.token_hex(8)}  # what makes the answer outlive its client's connection
    events: list[tuple[str, str]] = []
    url = f"{service.url}/v1/chat/completions"
    with (
        suppress(httpx.RemoteProtocolError),
        httpx.stream("POST", url, json=body, headers=headers, timeout=120) as lost,
    ):
        for event in events_of(lost):
            events.append(event)
            if len(events) == 10:
                docker("kill", busy(service, "gateway", "nibble_num_requests_running"))
    assert "".join(text for _, text in events) != answer
    last_id = events[-1][0]
    url = f"{url}/{last_id.rpartition(':')[0]}/stream"
    with httpx.stream("GET", url, headers={"Last-Event-ID": last_id}, timeout=120) as resumed:
        assert resumed.status_code == 200
        events.extend(events_of(resumed))
    assert "".join(text for _, text in events) == answer
    service.scale(gateways=2, workers=2)


def events_of(response: httpx.Response) -> Iterator[tuple[str, str]]:
    """Id and text of each event of a stream."""
    event_id = ""
    for line in response.iter_lines():
        name, _, value = line.partition(": ")
        if name == "id":
            event_id = value
        elif name == "data" and value != "[DONE]":
            yield event_id, "".join(choice["delta"].get("content") or "" for choice in json.loads(value)["choices"])


def test_requests_wait_for_a_worker_where_the_last_one_was_killed(service: Service, answer: str) -> None:
    service.scale(gateways=2, workers=1)
    (worker,) = service.compose.containers("worker")
    texts: list[str] = []
    threads = [threading.Thread(target=lambda: texts.append("".join(stream(service, 60)))) for _ in range(4)]
    for thread in threads:
        thread.start()
    wait_until(lambda: service.gauge(worker, "nibble_running_sequences") == 4, 30, texts.copy)
    docker("kill", worker)
    docker("start", worker)
    for thread in threads:
        thread.join()
    assert texts == [texts[0]] * 4
    assert answer.startswith(texts[0])
    service.scale(gateways=2, workers=2)


def test_killed_redis_loses_nothing_that_it_had_said_it_has(service: Service, answer: str) -> None:
    """Its append-only file is written before it answers, so a crash of the process takes nothing with it."""
    (redis,) = service.compose.containers("redis")

    def kill() -> None:
        docker("kill", redis)
        docker("start", redis)

    assert interrupted(service, kill) == answer
    gateways = service.compose.containers("gateway")
    assert sum(service.gauge(name, "nibble_restored_requests_total") for name in gateways) == 0


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
