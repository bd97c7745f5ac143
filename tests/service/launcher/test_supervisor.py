"""The supervisor with real child processes: small Python programs that log, end, or refuse to end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator

import psutil
import pytest

from nibble.service.launcher import supervisor as supervisor_module
from nibble.service.launcher.process import ProcessSpec
from nibble.service.launcher.supervisor import Supervisor

READY_AND_WAIT = "import time; print('ready', flush=True); time.sleep(60)"
IGNORE_SIGTERM = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + READY_AND_WAIT


class Service:
    """A supervisor and the lines it logged."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str]] = []
        self.on_line: Callable[[str], None] = lambda line: None
        self.supervisor = Supervisor(self._log)

    def _log(self, name: str, line: str) -> None:
        self.lines.append((name, line))
        self.on_line(line)

    def start(self, program: str, name: str = "child") -> int:
        return self.supervisor.start(python_spec(program, name)).pid

    def run_until(self, condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline_s, f"nothing after {timeout_s} s; lines: {self.lines}"
            self.supervisor.run_once(0.05)


def python_spec(program: str, name: str = "child", environment: dict[str, str] | None = None) -> ProcessSpec:
    argv = (sys.executable, "-I", "-S", "-c", program)
    return ProcessSpec(name=name, argv=argv, environment=environment or {})


@pytest.fixture
def service() -> Iterator[Service]:
    service = Service()
    with service.supervisor.handling_signals():
        yield service
        service.supervisor.close()


def test_lines_arrive_under_the_name_of_their_process(service: Service) -> None:
    service.start("import sys; print('one'); print('two', file=sys.stderr)", "a")
    service.start("import sys; sys.stdout.write('no newline at the end')", "b")
    service.run_until(lambda: not service.supervisor.children)
    assert sorted(service.lines) == [("a", "one"), ("a", "two"), ("b", "no newline at the end")]


def test_long_output_is_passed_on_whole(service: Service) -> None:
    service.start("for i in range(20000): print('line', i)")
    service.run_until(lambda: not service.supervisor.children)
    assert [line for _, line in service.lines] == [f"line {i}" for i in range(20000)]


def test_child_gets_exactly_the_environment_of_its_spec(service: Service) -> None:
    service.supervisor.start(python_spec("import os; print(os.environ['ONLY'], len(os.environ))", "a", {"ONLY": "x"}))
    service.run_until(lambda: not service.supervisor.children)
    # Python itself adds LC_CTYPE where the environment names no locale.
    assert service.lines[0][1] in ("x 1", "x 2")


def test_process_that_ends_is_started_again(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor_module, "FIRST_RESTART_S", 0.01)
    first_pid = service.start(READY_AND_WAIT)
    num_starts = 0

    def kill_once(line: str) -> None:
        nonlocal num_starts
        if line == "ready":
            num_starts += 1
            if num_starts == 1:
                os.kill(first_pid, signal.SIGKILL)
            service.supervisor.stop_requested = num_starts == 2

    service.on_line = kill_once
    service.supervisor.supervise()
    (child,) = service.supervisor.children
    assert child.pid != first_pid
    assert ("nibble", f"child (pid {first_pid}) was killed by SIGKILL; it starts again in 0.01 s") in service.lines


def test_waits_between_restarts_double(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor_module, "FIRST_RESTART_S", 0.01)
    monkeypatch.setattr(supervisor_module, "MAX_RESTART_S", 0.04)
    delays = []

    def collect(line: str) -> None:
        if "starts again in" in line:
            delays.append(line.rsplit(" in ", 1)[1])
        service.supervisor.stop_requested = len(delays) == 4

    service.on_line = collect
    service.start("raise SystemExit(3)")
    service.supervisor.supervise()
    assert delays == ["0.01 s", "0.02 s", "0.04 s", "0.04 s"]


def test_signal_ends_supervision_at_once(service: Service) -> None:
    service.start(READY_AND_WAIT)
    service.run_until(lambda: bool(service.lines))
    os.kill(os.getpid(), signal.SIGTERM)
    start_s = time.monotonic()
    service.supervisor.supervise()
    assert time.monotonic() - start_s < 0.1


def test_stop_kills_a_process_that_ignores_sigterm(service: Service) -> None:
    pid = service.start(IGNORE_SIGTERM)
    service.run_until(lambda: bool(service.lines))
    service.supervisor.stop(service.supervisor.children, grace_s=0.2)
    assert not psutil.pid_exists(pid)
    assert service.lines[-1] == ("nibble", f"child (pid {pid}) did not stop in time and is killed")


def test_second_interrupt_does_not_wait_for_the_grace_period(service: Service) -> None:
    pid = service.start(IGNORE_SIGTERM)
    service.run_until(lambda: bool(service.lines))
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGINT)
    start_s = time.monotonic()
    service.supervisor.stop(service.supervisor.children, grace_s=60.0)
    assert time.monotonic() - start_s < 5.0
    assert not psutil.pid_exists(pid)


def test_last_line_of_a_failed_process_is_kept(service: Service) -> None:
    child = service.supervisor.start(python_spec("print('first\\nlast\\n'); raise SystemExit(3)"))
    service.run_until(lambda: not service.supervisor.children)
    assert child.last_line == "last"
    assert child.describe_end() == "ended with exit code 3"


def test_children_die_with_a_killed_parent() -> None:
    program = textwrap.dedent(f"""
        import sys
        from nibble.service.launcher.process import ProcessSpec
        from nibble.service.launcher.supervisor import Supervisor
        supervisor = Supervisor(lambda name, line: print(child.pid, flush=True))
        child = supervisor.start(ProcessSpec("child", (sys.executable, "-I", "-S", "-c", {IGNORE_SIGTERM!r}), {{}}))
        supervisor.supervise()
    """)
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    psutil.wait_procs([child], timeout=5)
    assert not child.is_running()
