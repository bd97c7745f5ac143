"""What a measurement ran on: part of every result, so that no number travels without its machine."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """load_average is that of the minute before the measurement."""

    cpu: str
    num_cores: int
    memory_gib: float
    python: str
    packages: dict[str, str]
    commit: str
    date: str
    load_average: float


def this_machine(packages: tuple[str, ...]) -> Machine:
    """Look now. Packages that are not installed are left out."""
    return Machine(
        cpu=_first_field(Path("/proc/cpuinfo"), "model name"),
        num_cores=os.cpu_count() or 1,
        memory_gib=round(int(_first_field(Path("/proc/meminfo"), "MemTotal").split()[0]) / 2**20, 1),
        python=platform.python_version(),
        packages={name: found for name in packages if (found := _version(name))},
        commit=_commit(),
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        load_average=round(os.getloadavg()[0], 2),
    )


class StolenTime:
    """How much of this machine's CPU time its host gave to others, from now on: none on a machine of one's own."""

    def __init__(self) -> None:
        self._start = _cpu_ticks()

    def share(self) -> float:
        """Of all time in which a CPU had something to do, since the start."""
        busy, stolen = (now - start for now, start in zip(_cpu_ticks(), self._start, strict=True))
        return round(stolen / busy, 3) if busy else 0.0


def _cpu_ticks() -> tuple[int, int]:
    """(busy and stolen, stolen), all CPUs; proc_stat(5)."""
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return user + nice + system + irq + softirq + steal, steal


def _first_field(path: Path, name: str) -> str:
    for line in path.read_text().splitlines():
        field, _, value = line.partition(":")
        if field.strip() == name:
            return value.strip()
    return "unknown"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str:
    """The short hash, with `+` after it where files differ from it; of a `git archive` what that wrote into COMMIT."""
    directory = Path(__file__).parent
    command = ["git", "describe", "--always", "--dirty=+", "--abbrev=10"]
    result = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    archived = (directory / "COMMIT").read_text().strip()
    return result.stdout.strip() or ("" if archived.startswith("$") else archived)
