"""What docker-compose.yml runs, as users and operators reach it from this machine."""

from __future__ import annotations

import json
import urllib.request
from typing import Any
from urllib.parse import quote

import openai
from docker_commands import Compose, docker

START_TIMEOUT_S = "600"  # the first worker of a machine compiles its kernels
# All but Grafana: there is no stand-in for it, and nothing here asks it anything.
SERVICES = ("proxy", "gateway", "worker", "prometheus")


class Service:
    """A running project."""

    def __init__(self, compose: Compose, port: int, prometheus_port: int) -> None:
        self.compose = compose
        self.url = f"http://127.0.0.1:{port}"
        self._prometheus = f"http://127.0.0.1:{prometheus_port}"

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)

    def scale(self, *, gateways: int, workers: int) -> None:
        """Until so many are healthy."""
        scales = ["--scale", f"gateway={gateways}", "--scale", f"worker={workers}"]
        self.compose("up", "--no-build", "--wait", "--wait-timeout", START_TIMEOUT_S, *scales, *SERVICES)

    def gauge(self, container: str, name: str) -> float:
        """One of its own metrics, the sum over its labels."""
        port = 8000 if "-gateway-" in container else 8001
        code = f"import urllib.request as r; print(r.urlopen('http://127.0.0.1:{port}/metrics').read().decode())"
        lines = docker("exec", container, "python", "-c", code).splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.partition("{")[0] == name)

    def prometheus(self, path: str) -> Any:
        with urllib.request.urlopen(f"{self._prometheus}/api/v1/{path}", timeout=10) as response:
            return json.load(response)["data"]

    def query(self, expression: str) -> float:
        """The value of a PromQL expression with one result; 0 where there is none yet."""
        result = self.prometheus(f"query?query={quote(expression)}")["result"]
        return float(result[0]["value"][1]) if result else 0.0
