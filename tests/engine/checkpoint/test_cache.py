from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from nibble.engine.checkpoint.cache import exclusive, partial_directory, publish


def holder(path: Path) -> subprocess.Popen[str]:
    """Another process that holds the lock of `path` and a partial directory until its input is closed."""
    program = (
        "import sys, pathlib; from nibble.engine.checkpoint.cache import exclusive, partial_directory\n"
        "path = pathlib.Path(sys.argv[1])\n"
        "with exclusive(path), partial_directory(path) as directory:\n"
        "    print(directory, flush=True); sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", program, str(path)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_what_is_published_is_there_and_what_is_not_is_gone(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with exclusive(target), partial_directory(target) as directory:
        (directory / "weights").write_text("w")
        assert not target.exists()
        publish(directory, target)
    with exclusive(target), partial_directory(target) as directory:
        (directory / "weights").write_text("half")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model.lock"]
    assert (target / "weights").read_text() == "w"


def test_leftovers_of_dead_processes_are_removed_and_work_of_living_ones_is_not(tmp_path: Path) -> None:
    with holder(tmp_path / "dead") as dead, holder(tmp_path / "living") as living:
        assert dead.stdout is not None
        assert living.stdout is not None
        leftover, work = Path(dead.stdout.readline().strip()), Path(living.stdout.readline().strip())
        dead.kill()
        dead.wait()
        assert leftover.is_dir()
        with exclusive(tmp_path / "mine"), partial_directory(tmp_path / "mine"):
            assert not leftover.exists()
            assert work.is_dir()
        living.communicate("")
    assert not work.exists()


def test_a_second_process_waits_for_the_first(tmp_path: Path) -> None:
    waits = []
    with holder(tmp_path / "model") as first:
        assert first.stdout is not None
        assert first.stdin is not None
        first.stdout.readline()

        def let_go() -> None:
            waits.append(first.poll())
            first.stdin.close()

        with exclusive(tmp_path / "model", let_go):
            assert not list(tmp_path.glob("*.partial-*"))
    assert waits == [None]
