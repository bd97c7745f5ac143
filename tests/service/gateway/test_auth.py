"""API keys: who may call what."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest
from conftest import RunningGateway

KEYS = ("secret-one", "secret-zwei-ü")


@pytest.fixture(scope="module")
def keyed(run_gateway: Callable[..., Any]) -> Iterator[RunningGateway]:
    with run_gateway(api_keys=KEYS) as running:
        yield running


def get(running: RunningGateway, path: str, authorization: str | None = None) -> httpx.Response:
    headers = {} if authorization is None else {"authorization": authorization.encode()}
    return httpx.get(running.url + path, headers=headers)


@pytest.mark.parametrize(
    "authorization",
    [None, "", "Bearer", "Bearer wrong", "Bearer secret-on", "Basic secret-one", "secret-one"],
)
def test_without_a_known_key_everything_is_401(keyed: RunningGateway, authorization: str | None) -> None:
    for path in ("/v1/models", "/version", "/metrics", "/docs", "/openapi.json", "/nothing"):
        response = get(keyed, path, authorization)
        assert response.status_code == 401
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
        assert response.json()["error"]["code"] == "invalid_api_key"
        assert "secret" not in response.text
        assert response.headers["x-request-id"]


@pytest.mark.parametrize("key", ["Bearer secret-one", "bearer secret-one"])
def test_known_key_opens(keyed: RunningGateway, key: str) -> None:
    for path in ("/v1/models", "/version", "/metrics", "/docs", "/openapi.json"):
        assert get(keyed, path, key).status_code == 200


@pytest.mark.parametrize("path", ["/health", "/ready"])
def test_probes_need_no_key(keyed: RunningGateway, path: str) -> None:
    assert get(keyed, path).status_code == 200


def test_metrics_have_their_own_switch(run_gateway: Callable[..., Any]) -> None:
    with run_gateway(has_worker=False, api_keys=KEYS, metrics_public=True) as running:
        assert get(running, "/metrics").status_code == 200
        assert get(running, "/version").status_code == 401


def test_official_client_raises_its_authentication_error(keyed: RunningGateway) -> None:
    with pytest.raises(openai.AuthenticationError):
        keyed.openai().models.list()
    client = openai.OpenAI(base_url=f"{keyed.url}/v1", api_key=KEYS[0])
    assert [model.id for model in client.models.list()] == ["small"]


def test_requests_of_one_key_are_one_tenant(keyed: RunningGateway) -> None:
    body = {"model": "small", "messages": [{"role": "user", "content": "x"}]}
    for key in (KEYS[0], KEYS[0]):
        assert keyed.post(body, authorization=f"Bearer {key}").status_code == 200
    assert keyed.post({**body, "user": "ann"}, authorization=f"Bearer {KEYS[0]}").status_code == 200
    first, second, third = (request.tenant for request in keyed.worker.seen[-3:])
    assert first == second != ""
    assert third == f"{first}:ann"
    assert "secret" not in first
