import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import redis

from nibble.service.broker.embedded import EmbeddedServerError, EmbeddedValkey

PARENT = """
import sys, time
from pathlib import Path
from nibble.service.broker.embedded import EmbeddedValkey
with EmbeddedValkey(Path(sys.argv[1])) as server:
    sys.stdout.write(f"{server.pid}\\n")
    sys.stdout.flush()
    time.sleep(60)
"""


def wait_until_gone(pid: int) -> bool:
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.01)
    return False


def test_server_answers_inside_the_context_and_is_gone_after_it(tmp_path: Path) -> None:
    with EmbeddedValkey(tmp_path) as server, redis.Redis.from_url(server.url) as client:
        assert client.ping()
        assert client.config_get("maxmemory-policy")["maxmemory-policy"] == "noeviction"
        assert client.config_get("save")["save"] == ""
        pid = server.pid
    assert not psutil.pid_exists(pid)
    assert (tmp_path / "valkey.log").stat().st_size > 0


def test_server_refuses_clients_without_the_password_and_ps_does_not_show_it(tmp_path: Path) -> None:
    with EmbeddedValkey(tmp_path) as server:
        password = server.url.split(":")[2].split("@")[0]
        assert password not in " ".join(psutil.Process(server.pid).cmdline())
        with (
            redis.Redis.from_url(server.url.replace(f":{password}@", "")) as client,
            pytest.raises(redis.AuthenticationError),
        ):
            client.ping()


def test_server_dies_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path)], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert psutil.pid_exists(pid)
        os.kill(parent.pid, signal.SIGKILL)
    assert wait_until_gone(pid)


def test_server_outlives_the_thread_that_started_it(tmp_path: Path) -> None:
    server = EmbeddedValkey(tmp_path)
    starter = threading.Thread(target=server.start)
    starter.start()
    starter.join()
    try:
        with redis.Redis.from_url(server.url) as client:
            for _ in range(10):
                assert client.ping()
    finally:
        server.stop()


def test_restarted_server_has_the_same_url_and_is_empty(tmp_path: Path) -> None:
    with EmbeddedValkey(tmp_path) as server, redis.Redis.from_url(server.url) as client:
        client.set("key", "value")
        url = server.url
        server.kill()
        server.start()
        assert server.url == url
        assert client.get("key") is None


def test_append_only_server_keeps_its_data_over_a_crash(tmp_path: Path) -> None:
    with EmbeddedValkey(tmp_path, append_only=True) as server, redis.Redis.from_url(server.url) as client:
        client.set("key", "value")
        server.kill()
        server.start()
        assert client.get("key") == b"value"


def test_server_that_cannot_start_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(EmbeddedServerError, match="did not start"), EmbeddedValkey(tmp_path, binary=Path("/bin/false")):
        pass


def test_taken_port_is_an_error_that_quotes_the_log(tmp_path: Path) -> None:
    with EmbeddedValkey(tmp_path / "first") as first:
        port = int(first.url.split(":")[3].split("/")[0])
        second = EmbeddedValkey(tmp_path / "second", port=port)
        with pytest.raises(EmbeddedServerError, match="in use"):
            second.start()
