"""What observability/ holds, against the code: dashboards as generated, rules as tested, metrics that exist."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
from pathlib import Path

import pytest
import yaml
from promtool import needs_promtool

from nibble.service.settings import KNOWN_VARIABLES
from observability.dashboards.__main__ import FOLDER, PAGES, files
from observability.dashboards.panels import queries_of

ROOT = Path(__file__).parents[2]
RULES = sorted((ROOT / "observability" / "prometheus" / "rules").glob("*.yml"))
RUNBOOKS = ROOT / "docs" / "operations.md"
METRICS_TABLE = runpy.run_path(str(RUNBOOKS.with_name("metrics_table.py")))
SUFFIXES = ("_bucket", "_sum", "_count")


def exported() -> set[str]:
    """Every metric of both processes, but for the second names of some."""
    metrics = [*METRICS_TABLE["gateway_metrics"](), *METRICS_TABLE["worker_metrics"]()]
    return {name for name in map(METRICS_TABLE["name_of"], metrics) if not name.startswith("vllm:")}


# What dashboards and autoscalers for vLLM read, and what an inference gateway of Kubernetes asks a worker for.
STANDARD_NAMES = {
    *("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"),
    *("vllm:time_to_first_token_seconds", "vllm:inter_token_latency_seconds", "vllm:e2e_request_latency_seconds"),
    *("vllm:request_queue_time_seconds", "vllm:prompt_tokens_total", "vllm:generation_tokens_total"),
    "vllm:request_success_total",
}


def test_standard_names_are_exported() -> None:
    metrics = [*METRICS_TABLE["gateway_metrics"](), *METRICS_TABLE["worker_metrics"]()]
    assert set(map(METRICS_TABLE["name_of"], metrics)) >= STANDARD_NAMES
    of_workers = set(map(METRICS_TABLE["name_of"], METRICS_TABLE["worker_metrics"]()))
    assert {"vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"} <= of_workers


def rules() -> list[dict[str, str]]:
    return [rule for file in RULES for group in yaml.safe_load(file.read_text())["groups"] for rule in group["rules"]]


def metrics_in(query: str) -> set[str]:
    """Without the suffixes of histograms."""
    names = re.findall(r"\bnibble_[a-z0-9_]+", query)
    return {next((name.removesuffix(end) for end in SUFFIXES if name.endswith(end)), name) for name in names}


def test_dashboards_are_those_that_the_code_makes() -> None:
    """`make dashboards` writes them."""
    found = {file.name: file.read_text() for file in FOLDER.glob("*.json")}
    assert found == files()


def test_panels_and_variables_have_names_of_their_own() -> None:
    for content in files().values():
        ids = [panel["id"] for panel in json.loads(content)["panels"]]
        assert len(ids) == len(set(ids))


def test_dashboards_and_rules_name_metrics_that_exist() -> None:
    queries = [query for page in PAGES for query in queries_of(page)] + [rule["expr"] for rule in rules()]
    named = set().union(*map(metrics_in, queries))
    assert len(named) > 40
    assert named <= exported()
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    assert {name for query in queries for name in re.findall(r"\bnibble:[a-z0-9_:]+", query)} <= recorded


def test_every_metric_is_on_a_dashboard_or_in_a_rule() -> None:
    queries = [query for page in PAGES for query in queries_of(page)] + [rule["expr"] for rule in rules()]
    named = set().union(*map(metrics_in, queries))
    assert exported() - named == set()


@needs_promtool
def test_rules_do_what_their_tests_say() -> None:
    tests = Path(__file__).with_name("rules_test.yml")
    done = subprocess.run(["promtool", "test", "rules", tests], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_tested_and_has_a_severity_and_a_runbook() -> None:
    alerts = {rule["alert"]: rule for rule in rules() if "alert" in rule}
    groups = yaml.safe_load(Path(__file__).with_name("rules_test.yml").read_text())["tests"]
    tests = [test for group in groups for test in group.get("alert_rule_test", [])]
    assert {test["alertname"] for test in tests if test["exp_alerts"]} == set(alerts)
    for name, rule in alerts.items():
        assert rule["labels"]["severity"] in ("page", "ticket")  # type: ignore[index]
        assert rule["annotations"]["runbook"] == f"docs/operations.md#{name.lower()}"  # type: ignore[index]


def test_every_alert_has_its_runbook_and_every_runbook_its_alert() -> None:
    section = RUNBOOKS.read_text().split("\n## Alerts\n")[1].split("\n## ")[0]
    runbooks = re.findall(r"^### (\w+)$", section, re.MULTILINE)
    assert sorted(runbooks) == sorted(rule["alert"] for rule in rules() if "alert" in rule)


def test_the_tables_of_all_metrics_are_current() -> None:
    """`make docs` writes them."""
    text = RUNBOOKS.read_text()
    assert text == METRICS_TABLE["page"]()
    assert exported() <= set(re.findall(r"^\| `(nibble_\w+)`", text, re.MULTILINE))


def test_operations_names_metrics_settings_and_sections_that_exist() -> None:
    text = RUNBOOKS.read_text()
    assert metrics_in(text) - {"nibble_*"} <= exported()
    assert set(re.findall(r"NIBBLE_[A-Z_]+[A-Z]", text)) <= KNOWN_VARIABLES
    titles = {title.lower() for title in re.findall(r"^#+ (\w+)$", text, re.MULTILINE)}
    anchors = set(re.findall(r"\]\(#(\w+)\)", text))
    assert len(anchors) > 3
    assert anchors <= titles


@pytest.mark.parametrize("file", RULES, ids=lambda file: file.stem)
@needs_promtool
def test_promtool_accepts_the_rules(file: Path) -> None:
    done = subprocess.run(["promtool", "check", "rules", file], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
