"""What the network policies of the chart let through."""

from __future__ import annotations

from typing import Any

import pytest
from charts import EXTERNAL, KEDA, Object, one, render

pytestmark = pytest.mark.helm


def peers(rules: list[Any], key: str) -> dict[Any, list[Any] | None]:
    return {rule["ports"][0]["port"]: rule.get(key) for rule in rules}


def test_policies_allow_what_is_used_and_nothing_else() -> None:
    objects = render(*KEDA)

    def component(name: str) -> dict[str, Any]:
        return {
            "podSelector": {
                "matchLabels": {
                    "app.kubernetes.io/name": "nibble",
                    "app.kubernetes.io/instance": "chat",
                    "app.kubernetes.io/component": name,
                }
            }
        }

    def namespace(name: str) -> dict[str, Any]:
        return {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": name}}}

    everywhere = [{"ipBlock": {"cidr": "0.0.0.0/0"}}]
    policies = {
        item["metadata"]["name"].rpartition("-")[2]: item["spec"] for item in objects if item["kind"] == "NetworkPolicy"
    }
    assert set(policies) == {"gateway", "worker", "redis"}
    assert all(policy["policyTypes"] == ["Ingress", "Egress"] for policy in policies.values())
    assert peers(policies["gateway"]["ingress"], "from") == {"http": None}
    assert peers(policies["worker"]["ingress"], "from") == {"metrics": [namespace("monitoring")]}
    assert peers(policies["redis"]["ingress"], "from") == {
        "redis": [component("gateway"), component("worker"), namespace("keda")]
    }
    assert policies["redis"]["egress"] == []
    for name in ("gateway", "worker"):
        assert peers(policies[name]["egress"], "to") == {53: None, 6379: [component("redis")], 443: everywhere}


def policies(*values: str) -> dict[str, Object]:
    """What they say, by component."""
    objects = [item for item in render(*values) if item["kind"] == "NetworkPolicy"]
    return {item["metadata"]["labels"]["app.kubernetes.io/component"]: item["spec"] for item in objects}


@pytest.mark.parametrize(
    ("endpoint", "port"),
    [("http://collector.tracing:4318", 4318), ("https://traces.example.com/otlp", 443), ("http://collector", 80)],
)
def test_policies_let_traces_go_to_the_collector_alone(endpoint: str, port: int) -> None:
    values = ("--set", f"tracing.endpoint={endpoint}", "--set-json", "networkPolicy.modelEgress=[]")
    for name in ("gateway", "worker"):
        (peer,) = peers(policies(*values)[name]["egress"], "to")[port] or []
        assert list(peer) == ["namespaceSelector"]
        assert 4318 not in peers(policies()[name]["egress"], "to")


def test_a_model_that_is_on_the_volume_is_fetched_from_nowhere() -> None:
    for name in ("gateway", "worker"):
        assert 443 not in peers(policies("--set", "model.source=/models/mine.gguf")[name]["egress"], "to")


def test_an_empty_list_of_peers_is_nobody() -> None:
    """To Kubernetes a rule without peers is a rule for everybody."""
    lists = [
        f"networkPolicy.{name}=[]" for name in ("monitoring", "keda", "redisEgress", "modelEgress", "tracingEgress")
    ]
    options = [part for value in lists for part in ("--set-json", value)]
    for more in (KEDA, EXTERNAL):
        for component, policy in policies(*more, *options, "--set", "tracing.endpoint=http://c:4318").items():
            for rule in policy["ingress"] or []:
                assert rule.get("from") or component == "gateway", "clients: empty is all"
            for rule in policy["egress"]:
                assert rule.get("to") or {port["port"] for port in rule["ports"]} == {53}
    clients = "networkPolicy.clients[0].namespaceSelector.matchLabels.team=web"
    assert len(policies(*options, "--set", clients)["gateway"]["ingress"][0]["from"]) == 2


def test_named_clients_are_the_only_ones_beside_prometheus_and_the_test() -> None:
    client = "networkPolicy.clients[0].namespaceSelector.matchLabels.team"
    policy = one(render("--set", f"{client}=web"), "NetworkPolicy", "gateway")["spec"]
    ((_, allowed),) = peers(policy["ingress"], "from").items()
    assert allowed is not None
    assert [next(iter(peer)) for peer in allowed] == ["namespaceSelector", "namespaceSelector", "podSelector"]
    assert allowed[-1]["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "test"
