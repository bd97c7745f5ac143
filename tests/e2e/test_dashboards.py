"""Every panel of every dashboard and every rule has data when Prometheus watches the live service under traffic."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from promtool import lint
from running_service import RunningService, free_ports

from nibble.service.gateway.api_keys import key_line

pytestmark = [
    pytest.mark.dashboards,
    pytest.mark.skipif(
        shutil.which("prometheus") is None, reason="no prometheus here: install Debian's package of that name"
    ),
]

OBSERVABILITY = Path(__file__).parents[2] / "observability"
KEYS = {"ada": "key-of-ada", "bob": "key-of-bob"}
PATIENCE_S = 90.0  # two busy cores; 10 s otherwise
STANDS_FOR = {"$model": ".*", "$key": ".*", "$__rate_interval": "10s", "$__range": "1m"}
STORY = "The cat sat on the mat. The dog sat on the log. The cat sat on the mat. The dog sat on the log. " * 4


class Prometheus:
    def __init__(self, url: str) -> None:
        self.url = url

    def get(self, path: str, **parameters: str) -> Any:
        answer = httpx.get(f"{self.url}/api/v1/{path}", params=parameters, timeout=30).json()
        assert answer["status"] == "success", (parameters, answer)
        return answer["data"]

    def has_data(self, query: str) -> bool:
        """At least one series whose newest value is a number."""
        values = [float(series["value"][1]) for series in self.get("query", query=query)["result"]]
        return any(math.isfinite(value) for value in values)


@pytest.fixture(scope="module")
def service(run_service: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text("\n".join(key_line(key, name=name) for name, key in KEYS.items()))
    with run_service(
        NIBBLE_API_KEYS_FILE=str(file), NIBBLE_METRICS_PUBLIC="true", NIBBLE_SPECULATION="ngram"
    ) as running:
        yield running


@pytest.fixture(scope="module")
def prometheus(service: RunningService, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """Watches the service, with the rules, while both keys are used."""
    directory = tmp_path_factory.mktemp("prometheus")
    port = free_ports(1)
    targets = [service.url.removeprefix("http://"), f"127.0.0.1:{service.metrics_port}"]
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(OBSERVABILITY / "prometheus" / "rules" / "*.yml")],
        "scrape_configs": [{"job_name": "nibble", "static_configs": [{"targets": targets}]}],
    }
    (directory / "prometheus.yml").write_text(json.dumps(config))  # JSON is YAML
    command = [
        "prometheus",
        f"--config.file={directory / 'prometheus.yml'}",
        f"--storage.tsdb.path={directory / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=warn",
    ]
    with ExitStack() as stack:
        process = stack.enter_context(subprocess.Popen(command))
        stack.callback(process.terminate)
        for name in KEYS:
            stack.enter_context(traffic(service, name))
        watcher = Prometheus(f"http://127.0.0.1:{port}")
        until(lambda: is_up(watcher), "Prometheus does not start")
        yield watcher


@contextmanager
def traffic(service: RunningService, name: str) -> Iterator[None]:
    """One request after another: the same long prompt each time, whose repetitions are guessed right."""
    has_to_stop = threading.Event()
    client = openai.OpenAI(base_url=f"{service.url}/v1", api_key=KEYS[name], max_retries=0, timeout=60)

    def run() -> None:
        while not has_to_stop.is_set():
            messages: Any = [{"role": "user", "content": STORY}]
            for _ in client.chat.completions.create(
                model="demo", messages=messages, max_tokens=24, temperature=0, stream=True
            ):
                pass

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        has_to_stop.set()
        thread.join()


def is_up(prometheus: Prometheus) -> bool:
    try:
        return httpx.get(f"{prometheus.url}/-/ready").status_code == 200
    except httpx.TransportError:
        return False


def until(condition: Callable[[], bool], what: str) -> None:
    end_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end_s, what
        time.sleep(0.5)


def wait_for_data(prometheus: Prometheus, queries: set[str]) -> None:
    """Returns when each of them has had some."""
    missing = set(queries)
    end_s = time.monotonic() + PATIENCE_S
    while missing := {query for query in missing if not prometheus.has_data(query)}:
        assert time.monotonic() < end_s, "no data:\n" + "\n".join(sorted(missing))
        time.sleep(0.5)


def panels(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


@pytest.mark.parametrize(
    "file", sorted((OBSERVABILITY / "grafana" / "dashboards").glob("*.json")), ids=lambda f: f.stem
)
def test_every_panel_has_data(prometheus: Prometheus, file: Path) -> None:
    queries = {target["expr"] for panel in panels(json.loads(file.read_text())) for target in panel["targets"]}
    assert queries
    for variable, value in STANDS_FOR.items():
        queries = {query.replace(variable, value) for query in queries}
    assert not [query for query in queries if "$" in query]
    wait_for_data(prometheus, queries)


def test_every_variable_has_values(prometheus: Prometheus) -> None:
    for file in (OBSERVABILITY / "grafana" / "dashboards").glob("*.json"):
        for variable in json.loads(file.read_text())["templating"]["list"]:
            match = re.fullmatch(r"label_values\((\w+)(?:\{.*\})?, (\w+)\)", variable.get("query", ""))
            assert match is not None or variable["type"] == "datasource"
            if match is not None:
                assert prometheus.has_data(f'count({match[1]}{{{match[2]}!=""}})'), variable["name"]


def test_every_rule_has_data_and_no_error(prometheus: Prometheus) -> None:
    """Alerts are silent: what they are made of is there, and evaluates."""
    until(lambda: all(rule["health"] == "ok" for rule in rules(prometheus)), "a rule has an error")
    known = set(prometheus.get("label/__name__/values"))
    recorded = {rule["name"] for rule in rules(prometheus) if rule["type"] == "recording"}
    alerts = [rule for rule in rules(prometheus) if rule["type"] == "alerting"]
    assert len(recorded) >= 14
    assert len(alerts) >= 15
    wait_for_data(prometheus, recorded)
    for rule in rules(prometheus):
        names = set(re.findall(r"\b(?:nibble|process)[_:][a-z0-9_:]+", rule["query"]))
        assert names
        assert names <= known | recorded, rule["name"]


def rules(prometheus: Prometheus) -> list[dict[str, Any]]:
    return [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]


def test_promtool_finds_fault_with_the_colon_of_standard_names_alone(
    prometheus: Prometheus, service: RunningService
) -> None:
    """On what both processes say, live."""
    for url in (service.url, f"http://127.0.0.1:{service.metrics_port}"):
        lines = lint(httpx.get(f"{url}/metrics").text)
        assert lines
        assert not [line for line in lines if not (line.startswith("vllm:") and "':'" in line)]


def test_a_service_at_rest_raises_no_alert(prometheus: Prometheus) -> None:
    alerts = prometheus.get("alerts")["alerts"]
    assert not [alert for alert in alerts if alert["state"] == "firing" and "Burns" not in alert["labels"]["alertname"]]
