"""What /metrics says after known requests, in the format that Prometheus reads."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from conftest import RunningGateway, wait_for
from prometheus_client.parser import text_string_to_metric_families
from synthetic_worker import CACHED_TOKENS

from nibble.service.gateway.metrics import Buckets, GatewayMetrics

BODY: dict[str, Any] = {"model": "small", "messages": [{"role": "user", "content": "The quick brown fox"}]}
FAILING = {**BODY, "messages": [{"role": "user", "content": "fail"}]}


@pytest.fixture
def fresh(run_gateway: Callable[..., Any]) -> Iterator[RunningGateway]:
    with run_gateway() as running:
        yield running


def samples(running: RunningGateway) -> dict[tuple[str, ...], float]:
    """(name, label values except the model's and the bucket's own) -> value."""
    response = httpx.get(f"{running.url}/metrics")
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
    assert samples(fresh)["nibble_http_responses_total", "400"] == 1


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
