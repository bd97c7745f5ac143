"""API keys: who may call what."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from conftest import RunningGateway

from nibble.service.gateway import api_keys
from nibble.service.gateway.api_keys import KeyFileError, KeyRing, key_line, make_key

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


# The file of keys


class KeyFile:
    """Lines as `nibble key` prints them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.write_text("# clients\n\n")

    def add(self, name: str, **fields: int) -> str:
        key = make_key()
        with self.path.open("a") as file:
            file.write(key_line(key, name=name, **fields) + "\n")
        return key


@pytest.fixture
def key_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> KeyFile:
    monkeypatch.setattr(api_keys, "_RELOAD_S", 0.0)
    return KeyFile(tmp_path / "keys")


BODY = {"model": "small", "messages": [{"role": "user", "content": "one two three"}]}


def ask(running: RunningGateway, key: str, **fields: Any) -> httpx.Response:
    return running.post({**BODY, **fields}, authorization=f"Bearer {key}")


def test_file_of_keys_is_read_again_when_it_changes(run_gateway: Callable[..., Any], key_file: KeyFile) -> None:
    ann = key_file.add("ann")
    with run_gateway(has_worker=False, api_keys_file=key_file.path, api_keys=KEYS[:1]) as running:

        def status(key: str) -> int:
            return get(running, "/version", f"Bearer {key}").status_code

        assert [status(ann), status(KEYS[0]), status("other")] == [200, 200, 401]
        bob = key_file.add("bob")
        assert [status(ann), status(bob)] == [200, 200]
        intact = key_file.path.read_text()
        key_file.path.write_text(intact + "{broken\n")
        assert status(bob) == 200, "a broken file changes nothing"
        key_file.path.write_text("".join(line for line in intact.splitlines(True) if "ann" not in line))
        assert [status(ann), status(bob)] == [401, 200]
        key_file.path.unlink()
        assert status(bob) == 200


def test_file_without_keys_lets_nobody_in(run_gateway: Callable[..., Any], key_file: KeyFile) -> None:
    with run_gateway(has_worker=False, api_keys_file=key_file.path) as running:
        assert get(running, "/version").status_code == 401
        assert get(running, "/health").status_code == 200


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("nonsense", "line 3"),
        ('{"name": "ann"}', "sha256"),
        ('{"name": "ann", "sha256": "xyz"}', "sha256"),
        ('{"name": "a nn", "sha256": "%s"}' % ("0" * 64), "name"),
        ('{"name": "ann", "sha256": "%s", "tokens": 5}' % ("0" * 64), "tokens"),
        ('{"name": "ann", "sha256": "%s", "tokens_per_day": 0}' % ("0" * 64), "tokens_per_day"),
    ],
)
def test_wrong_line_stops_the_start_and_is_named(key_file: KeyFile, line: str, what: str) -> None:
    with key_file.path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(KeyFileError, match=what):
        KeyRing((), key_file.path)


def test_keys_of_one_client_cannot_differ_in_limits(key_file: KeyFile) -> None:
    key_file.add("ann", tokens_per_day=5)
    key_file.add("ann", tokens_per_day=6)
    with pytest.raises(KeyFileError, match="line 4: ann has other limits"):
        KeyRing((), key_file.path)


def test_request_limit_holds_across_gateways_and_keys_of_one_client(
    run_gateway: Callable[..., Any], key_file: KeyFile
) -> None:
    old, new = (key_file.add("ann", requests_per_minute=3) for _ in range(2))
    free = key_file.add("bob")
    options = {"api_keys_file": key_file.path}
    with (
        run_gateway(**options) as one,
        run_gateway(has_worker=False, namespace=one.gateway.settings.namespace, **options) as other,
    ):
        answers = [ask(one, old), ask(other, old), ask(one, new, stream=True)]
        assert [answer.status_code for answer in answers] == [200, 200, 200]
        assert [answer.headers["x-ratelimit-remaining-requests"] for answer in answers] == ["2", "1", "0"]
        assert answers[0].headers["x-ratelimit-limit-requests"] == "3"
        refused = ask(other, new)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert "3 requests per minute" in refused.json()["error"]["message"]
        assert 10_000 < int(refused.headers["retry-after-ms"]) <= 20_000
        assert refused.headers["x-ratelimit-remaining-requests"] == "0"
        assert 30 < float(refused.headers["x-ratelimit-reset-requests"].removesuffix("s")) <= 60
        unlimited = ask(one, free)
        assert unlimited.status_code == 200
        assert not [name for name in unlimited.headers if name.startswith("x-ratelimit")]


def test_tokens_of_prompts_and_answers_are_counted(run_gateway: Callable[..., Any], key_file: KeyFile) -> None:
    key = key_file.add("ann", tokens_per_minute=10_000, tokens_per_day=100)
    with run_gateway(api_keys_file=key_file.path) as running:
        first = ask(running, key, n=2)
        usage = first.json()["usage"]
        assert int(first.headers["x-ratelimit-remaining-tokens"]) == 100 - usage["prompt_tokens"]
        second = ask(running, key)
        assert (
            int(second.headers["x-ratelimit-remaining-tokens"]) == 100 - usage["total_tokens"] - usage["prompt_tokens"]
        )
        refused = ask(running, key)
        assert refused.status_code == 429
        assert "100 tokens per day" in refused.json()["error"]["message"]


def test_key_has_a_priority(run_gateway: Callable[..., Any], key_file: KeyFile) -> None:
    key = key_file.add("ann", priority=-7)
    with run_gateway(api_keys_file=key_file.path) as running:
        assert ask(running, key, priority=2).status_code == 200
        (request,) = running.worker.seen
        assert (request.priority, request.tenant) == (-5, "ann")


def test_requests_of_another_client_cannot_be_seen_or_ended(run_gateway: Callable[..., Any], key_file: KeyFile) -> None:
    ann, bob = key_file.add("ann"), key_file.add("bob")
    with run_gateway(api_keys_file=key_file.path) as running:
        request_id = ask(running, ann).json()["id"]
        url = f"{running.url}/v1/chat/completions/{request_id}"
        for key, status in ((bob, 404), (ann, 200)):
            headers = {"authorization": f"Bearer {key}"}
            assert httpx.get(f"{url}/stream", headers=headers).status_code == status
            assert httpx.delete(url, headers=headers).status_code == status
        body = {**BODY, "seed": 1}
        answers = [
            running.post(body, **{"authorization": f"Bearer {key}", "idempotency-key": "same"}) for key in (ann, bob)
        ]
        assert answers[0].json()["id"] != answers[1].json()["id"]


def test_command_makes_a_key_that_works(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "nibble.cli", "key", "ann", "--tokens-per-day", "1000", "--priority", "-5"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    key, line = done.stderr.strip(), done.stdout
    (tmp_path / "keys").write_text(line)
    found = KeyRing((), tmp_path / "keys").find(key)
    assert found is not None
    assert (found.name, found.tokens_per_day, found.priority) == ("ann", 1000, -5)
    assert key not in line
    assert subprocess.run([*command[:4], "a b"], capture_output=True).returncode == 2


# Pages of other origins


def test_no_page_may_call_unless_it_is_listed(run_gateway: Callable[..., Any]) -> None:
    page = "https://page.example"
    preflight = {"origin": page, "access-control-request-method": "POST"}
    path = "/v1/chat/completions"
    with run_gateway(has_worker=False, api_keys=KEYS) as running:
        assert httpx.options(running.url + path, headers=preflight).status_code == 401
        assert "access-control-allow-origin" not in httpx.get(f"{running.url}/health", headers=preflight).headers
    with run_gateway(api_keys=KEYS, cors_origins=(page,)) as running:
        allowed = httpx.options(running.url + path, headers=preflight)
        assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, page)
        answer = running.post({**BODY, "stream": True}, origin=page, authorization=f"Bearer {KEYS[0]}")
        assert answer.headers["access-control-allow-origin"] == page
        assert "x-nibble-ignored" in answer.headers["access-control-expose-headers"]
        assert answer.text.endswith("data: [DONE]\n\n")
        other = {**preflight, "origin": "https://other.example"}
        assert httpx.options(running.url + path, headers=other).status_code == 400
