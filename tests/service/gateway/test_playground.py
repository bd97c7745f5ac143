"""The page at /: whole, confined to this host, and off with a setting."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import httpx
from conftest import RunningGateway


def test_page_loads_nothing_from_elsewhere(running: RunningGateway) -> None:
    answer = httpx.get(f"{running.url}/")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "connect-src 'self'" in answer.headers["content-security-policy"]
    assert "<title>Nibble" in answer.text
    assert not re.search(r"""(src|href)=["'](?!data:)|https?://|@import|url\(""", answer.text)


def test_page_can_be_switched_off(run_gateway: Callable[..., Any]) -> None:
    with run_gateway(playground=False) as running:
        answer = httpx.get(f"{running.url}/")
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "unknown_url"


def test_browser_is_asked_for_the_key(run_gateway: Callable[..., Any]) -> None:
    with run_gateway(api_keys=("nb-secret",)) as running:
        answer = httpx.get(f"{running.url}/")
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"].startswith("Basic ")
        assert httpx.get(f"{running.url}/v1/models").headers["www-authenticate"] == "Bearer"
        for url in (running.url, f"{running.url}/v1/models"):
            assert httpx.get(url, auth=("", "nb-secret")).status_code == 200
            assert httpx.get(url, auth=("nb-secret", "wrong")).status_code == 401
            assert httpx.get(url, headers={"authorization": "Basic !"}).status_code == 401
