"""What /metrics says after known requests, in the format that Prometheus reads."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import RunningGateway, wait_for
from prometheus_client.parser import text_string_to_metric_families
from promtool import lint, needs_promtool
from synthetic_worker import CACHED_TOKENS

from nibble.service.gateway.api_keys import key_line
from nibble.service.gateway.errors import Overloaded, ServerFault, Unavailable
from nibble.service.gateway.metrics import Ended, GatewayMetrics, Outcome
from nibble.service.gateway.usage import Usage
from nibble.service.metrics import Buckets

BODY: dict[str, Any] = {"model": "small", "messages": [{"role": "user", "content": "The quick brown fox"}]}
FAILING = {**BODY, "messages": [{"role": "user", "content": "fail"}]}


@pytest.fixture
def fresh(run_gateway: Callable[..., Any]) -> Iterator[RunningGateway]:
    with run_gateway() as running:
        yield running


def samples(running: RunningGateway, **headers: str) -> dict[tuple[str, ...], float]:
    """(name, label values except the model's and the bucket's own) -> value."""
    response = httpx.get(f"{running.url}/metrics", headers=headers)
    assert response.headers["content-type"].startswith("text/plain")
    found = {}
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples:
            labels = [value for name, value in sample.labels.items() if name != "model_name"]
            found[sample.name, *labels] = sample.value
    return found


def test_tokens_and_latencies_of_known_requests(fresh: RunningGateway) -> None:
    usage = [fresh.post({**BODY, "n": n}).json()["usage"] for n in (1, 2)]
    found = samples(fresh)
    generated = sum(one["completion_tokens"] for one in usage)
    for prefix in ("nibble_", "vllm:"):
        assert found[f"{prefix}prompt_tokens_total",] == sum(one["prompt_tokens"] for one in usage)
        assert found[f"{prefix}generation_tokens_total",] == generated
        assert found[f"{prefix}request_success_total", "stop"] == 3, "each choice counts"
        assert found[f"{prefix}time_to_first_token_seconds_count",] == 2
        assert found[f"{prefix}e2e_request_latency_seconds_count",] == 2
        assert found[f"{prefix}inter_token_latency_seconds_count",] == generated - 3, "all tokens but the first ones"
        assert found[f"{prefix}num_requests_running",] == found[f"{prefix}num_requests_waiting",] == 0
    assert found["nibble_cached_prompt_tokens_total",] == 2 * CACHED_TOKENS


def test_every_way_to_end_is_counted(fresh: RunningGateway) -> None:
    fresh.post({**BODY, "max_tokens": 1})
    fresh.post(FAILING)
    fresh.worker.gate.clear()
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{fresh.url}/v1/chat/completions", json={**BODY, "stream": True}, timeout=0.3)
    wait_for(lambda: samples(fresh)["nibble_request_success_total", "abort"] == 1)
    found = samples(fresh)
    reasons = {reason: found["vllm:request_success_total", reason] for reason in ("stop", "length", "abort", "error")}
    assert reasons == {"stop": 0, "length": 1, "abort": 1, "error": 1}
    fresh.post({**BODY, "temperature": 9})
    found = samples(fresh)
    assert found["nibble_http_responses_total", "400"] == 1
    outcomes = {outcome.value: found["nibble_requests_total", outcome] for outcome in Outcome}
    assert outcomes == {"ok": 1, "aborted": 1, "rejected": 1, "limited": 0, "refused": 0, "failed": 1}


def test_running_and_waiting_requests(fresh: RunningGateway) -> None:
    fresh.worker.reply = lambda request: [5]
    fresh.worker.gate.clear()
    url = f"{fresh.url}/v1/chat/completions"
    with httpx.stream("POST", url, json={**BODY, "stream": True}, timeout=10) as response:
        lines = response.iter_lines()
        next(lines)
        assert (samples(fresh)["vllm:num_requests_running",], samples(fresh)["vllm:num_requests_waiting",]) == (0, 1)
        fresh.worker.gate.set()
        next(line for line in lines if '"content":"' in line and '"role"' not in line)
        found = samples(fresh)
        assert (found["vllm:num_requests_running",], found["vllm:num_requests_waiting",]) == (1, 0)
    wait_for(lambda: samples(fresh)["vllm:num_requests_running",] == 0)


def test_vllm_names_can_be_turned_off() -> None:
    assert b"vllm:" in GatewayMetrics("m", vllm_names=True).render()
    plain = GatewayMetrics("m", vllm_names=False).render()
    assert b"vllm:" not in plain
    assert b"nibble_time_to_first_token_seconds_bucket" in plain


def test_buckets_are_cumulative_and_bounds_inclusive() -> None:
    metrics = GatewayMetrics("m", vllm_names=False)
    for value, times in ((0.01, 1), (0.02, 3), (99.0, 1)):
        metrics.inter_token_s.observe(value, times)
    text = metrics.render().decode()

    def value_of(suffix: str) -> float:
        match = re.search(rf"^nibble_inter_token_latency_seconds_{suffix} (\S+)$", text, re.MULTILINE)
        assert match is not None
        return float(match[1])

    assert value_of(r'bucket\{le="0.01",model_name="m"\}') == 1
    assert value_of(r'bucket\{le="0.025",model_name="m"\}') == 4
    assert value_of(r'bucket\{le="2.5",model_name="m"\}') == 4
    assert value_of(r'bucket\{le="\+Inf",model_name="m"\}') == value_of(r'count\{model_name="m"\}') == 5
    assert value_of(r'sum\{model_name="m"\}') == pytest.approx(0.01 + 0.06 + 99)


def test_one_line_is_logged_for_each_request_and_no_text_of_it(
    fresh: RunningGateway, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="nibble.service.gateway")
    answers = [
        fresh.post(BODY),
        fresh.post({**BODY, "max_tokens": 2}),
        fresh.post(FAILING),
        fresh.post({"model": "small"}),
    ]
    wait_for(lambda: len(gateway_lines(caplog)) >= 4)
    lines = gateway_lines(caplog)
    assert len(lines) == len(answers)
    usage = answers[0].json()["usage"]
    assert re.fullmatch(
        rf"request_id={answers[0].json()['id']} status=200 finish_reason=stop prompt_tokens={usage['prompt_tokens']} "
        rf"generated_tokens={usage['completion_tokens']} ttft_ms=\d+ duration_ms=\d+",
        lines[0],
    )
    assert "finish_reason=length" in lines[1]
    assert "status=500 finish_reason=error" in lines[2]
    assert "ttft_ms=- " in lines[2]
    assert "status=400" in lines[3]
    assert "param=messages" in lines[3]
    assert not any("quick brown" in line for line in lines)


def gateway_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "request_id=" in record.getMessage()]


def test_observing_is_cheap_enough_for_each_token() -> None:
    import timeit

    buckets = Buckets((0.01, 0.025, 0.05, 0.1))
    assert timeit.timeit(lambda: buckets.observe(0.03), number=10_000) / 10_000 < 20e-6


def test_requests_that_nobody_can_serve_are_refused(run_gateway: Callable[..., Any]) -> None:
    with run_gateway(has_worker=False) as running:
        assert running.post(BODY).status_code == 503
        found = samples(running)
    assert found["nibble_requests_total", "refused"] == 1
    assert [found["nibble_workers", state] for state in ("loading", "ready", "draining")] == [0, 0, 0]


def test_who_is_to_blame_follows_from_the_error() -> None:
    assert Outcome.of(Overloaded("the queue is full")) is Outcome.REFUSED
    assert Outcome.of(Overloaded("", code="rate_limit_exceeded")) is Outcome.LIMITED
    assert Outcome.of(Unavailable("")) is Outcome.REFUSED
    assert Outcome.of(ServerFault("")) is Outcome.FAILED


def test_usage_is_counted_by_the_names_in_the_file_of_keys(run_gateway: Callable[..., Any], tmp_path: Path) -> None:
    """And by nothing that clients send."""
    file = tmp_path / "keys"
    file.write_text(key_line("k1", name="ada") + "\n" + key_line("k2", name="bob", requests_per_minute=1))
    with run_gateway(api_keys_file=file) as running:
        body = {**BODY, "user": "someone"}
        usage = [running.post(body, authorization="Bearer k1").json()["usage"] for _ in range(2)]
        statuses = [running.post(body, authorization="Bearer k2").status_code for _ in range(2)]
        running.post(body, authorization="Bearer k3")
        found = samples(running, authorization="Bearer k1")
    assert statuses == [200, 429]
    outcomes = {labels[1:]: value for labels, value in found.items() if labels[0] == "nibble_key_requests_total"}
    assert outcomes == {("ada", "ok"): 2, ("bob", "ok"): 1, ("bob", "limited"): 1}
    tokens = {labels[1:]: value for labels, value in found.items() if labels[0] == "nibble_key_tokens_total"}
    assert {key for key, _ in tokens} == {"ada", "bob"}
    assert tokens["ada", "generation"] == sum(one["completion_tokens"] for one in usage)
    assert tokens["ada", "cached"] == 2 * CACHED_TOKENS


def test_nothing_that_a_client_sends_is_a_label(run_gateway: Callable[..., Any], tmp_path: Path) -> None:
    """Models, paths, methods, keys, users, ids: the second round of them adds to values alone."""
    file = tmp_path / "keys"
    file.write_text(key_line("k1", name="ada"))
    with run_gateway(api_keys_file=file) as running:
        rounds = []
        for i in range(3):
            headers = {
                "authorization": "Bearer k1",
                "x-request-id": f"id-{i}",
                "traceparent": f"00-{i:032x}-{i:016x}-01",
            }
            chat = {**BODY, "user": f"user-{i}", "metadata": {"a": f"{i}"}, "service_tier": "flex", f"extra-{i}": i}
            with httpx.Client(base_url=running.url, headers=headers) as client:
                client.post("/v1/chat/completions", json=chat)
                client.post("/v1/chat/completions", json={**chat, "model": f"model-{i}"})
                client.get(f"/v1/models/model-{i}")
                client.get(f"/path-{i}")
                client.request(("PUT", "PATCH", "DELETE")[i], "/v1/models")
                client.get("/v1/models", headers={"authorization": f"Bearer key-{i}"})
                client.get("/v1/models", headers={"host": f"host-{i}.example"})
            rounds.append(set(samples(running, authorization="Bearer k1")))
    assert rounds[1] == rounds[2]
    assert rounds[0] <= rounds[1]
    statuses = {labels[1] for labels in rounds[2] if labels[0] == "nibble_http_responses_total"}
    assert statuses == {"200", "401", "404", "405"}


def test_what_waits_in_the_broker_and_for_how_long(run_gateway: Callable[..., Any]) -> None:
    with run_gateway(has_worker=False, needs_worker=False) as running:
        assert samples(running)["nibble_queue_age_seconds",] == 0
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{running.url}/v1/chat/completions", json={**BODY, "stream": True}, timeout=0.3)
        with httpx.stream("POST", f"{running.url}/v1/chat/completions", json={**BODY, "stream": True}):
            wait_for(lambda: samples(running)["nibble_queued_requests",] == 1)
            wait_for(lambda: samples(running)["nibble_queue_age_seconds",] > 0.2)
            found = samples(running)
    assert found["nibble_broker_up",] == 1
    assert found["nibble_leased_requests",] == 0
    assert 0 < found["nibble_redis_memory_used_bytes",] < found["nibble_redis_memory_limit_bytes",]
    assert found["nibble_redis_commands_total",] > 0


def test_a_broker_that_is_away_is_a_metric_and_no_failed_scrape(run_gateway: Callable[..., Any]) -> None:
    with run_gateway(has_worker=False, redis_url="redis://127.0.0.1:1/0") as running:
        found = samples(running)
    assert found["nibble_broker_up",] == 0
    assert ("nibble_queued_requests",) not in found
    assert found["nibble_requests_total", "ok"] == 0


@needs_promtool
@pytest.mark.parametrize("vllm_names", [True, False])
def test_promtool_finds_fault_with_the_colon_of_standard_names_alone(
    run_gateway: Callable[..., Any], vllm_names: bool
) -> None:
    with run_gateway(vllm_metric_names=vllm_names) as running:
        running.gateway.metrics.count_end(Ended("ada", Outcome.OK, [], Usage(1, 1, 1), 0.1))
        running.post(BODY)
        found = lint(httpx.get(f"{running.url}/metrics").text)
    assert bool(found) == vllm_names
    assert not [line for line in found if not (line.startswith("vllm:") and "':'" in line)]
