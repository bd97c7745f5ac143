"""The `nibble` command as a shell runs it: exit codes, and one line on stderr for each thing that can be wrong."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from gguf_files import write_tiny_gguf


def nibble(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "nibble.cli", *arguments],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_help_names_every_command() -> None:
    for arguments in ((), ("--help",)):
        result = nibble(*arguments)
        assert result.returncode == 0
        for command in ("serve", "chat", "convert", "prepare", "quantize", "ladder", "plan", "version"):
            assert f" {command} " in result.stdout


def test_version() -> None:
    assert nibble("version").stdout == f"nibble {version('nibble')}\n"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("bogus",), "bogus"),
        (("serve", "--bogus"), "--bogus"),
        (("serve", "--port", "65536"), "--port"),
        (("serve", "--port", "many"), "--port"),
        (("serve", "--num-workers", "0"), "--num-workers"),
        (("chat", "--temperature", "hot"), "--temperature"),
        (("convert", "x.gguf"), "--output"),
        (("quantize", "x.gguf"), "--output"),
        (("quantize", "x.gguf", "-o", "y", "--method", "aqw"), "rtn, sinq, awq, gptq, awq-gptq"),
        (("quantize", "x.gguf", "-o", "y", "--group-size", "48"), "group size"),
        (("quantize", "x.gguf", "-o", "y", "--kv", "head"), "of a token or a channel"),
        (("plan", "x.gguf"), "--gpu-memory"),
        (("plan", "x.gguf", "--gpu-memory", "much"), "24GiB"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(arguments: tuple[str, ...], complaint: str) -> None:
    result = nibble(*arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("nibble: ")
    assert complaint in result.stderr


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("NIBBLE_PROT", "8000", "NIBBLE_PROT: no such setting; did you mean NIBBLE_PORT?"),
        ("NIBBLE_PORT", "many", "NIBBLE_PORT: "),
        ("NIBBLE_LOG_LEVEL", "LOUD", "NIBBLE_LOG_LEVEL: "),
        ("NIBBLE_MAX_QUEUED_REQUESTS", "0", "NIBBLE_MAX_QUEUED_REQUESTS: "),
        ("NIBBLE_KV_CACHE_BYTES", "much", "NIBBLE_KV_CACHE_BYTES: "),
        ("NIBBLE_NUM_WORKERS", "0", "NIBBLE_NUM_WORKERS: "),
    ],
)
def test_wrong_variable_is_one_line_and_exit_code_2(name: str, value: str, complaint: str) -> None:
    result = nibble("serve", **{name: value})
    assert (result.returncode, result.stdout) == (2, "")
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith(f"nibble: {complaint}")


def test_taken_port_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = nibble("serve", "--port", str(port))
    assert result.returncode == 1
    assert result.stderr == f"nibble: port {port} on 127.0.0.1 is taken; choose another one with --port\n"


def test_foreign_address_is_one_line() -> None:
    result = nibble("serve", "--host", "192.0.2.1", "--port", "0")
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("nibble: cannot listen on 192.0.2.1:0: ")


def test_missing_or_broken_model_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"no model")
    (tmp_path / "empty").mkdir()
    for name in ("absent.gguf", "broken.gguf", "empty"):
        path = tmp_path / name
        result = nibble("serve", "--port", "0", "--model", str(path), NIBBLE_CACHE_DIR=str(tmp_path / "cache"))
        assert result.returncode == 1
        assert len(result.stderr.splitlines()) == 1
        assert result.stderr.startswith("nibble: ")
        assert str(path) in result.stderr


def test_convert_writes_a_native_directory(demo_gguf: Path, tmp_path: Path) -> None:
    output = tmp_path / "native"
    result = nibble("convert", str(demo_gguf), "--output", str(output))
    assert result.returncode == 0, result.stderr
    assert {"model.safetensors", "tokenizer.json", "config.json"} <= {path.name for path in output.iterdir()}


def test_convert_writes_over_nothing(tmp_path: Path) -> None:
    """Not over the model itself either."""
    (tmp_path / "model").mkdir()
    model = write_tiny_gguf(tmp_path / "model" / "tiny.gguf")
    before = model.read_bytes()
    result = nibble("convert", str(model), "-o", str(model.parent))
    assert (result.returncode, model.read_bytes()) == (1, before)
    assert result.stderr == f"nibble: {model.parent}: exists already\n"


def test_convert_of_a_broken_file_is_one_line(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"no model")
    result = nibble("convert", str(broken), "-o", str(tmp_path / "native"))
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1
    assert broken.name in result.stderr


def test_command_line_loads_nothing_heavy() -> None:
    """`nibble chat` and `nibble --help` should answer at once, and the launcher stay small beside its workers."""
    program = "import nibble.cli, nibble.chat, nibble.service.launcher.serve, sys; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = set(result.stdout.split())
    assert not loaded & {"torch", "numba", "transformers", "fastapi", "uvicorn", "tokenizers"}


@pytest.mark.parametrize("command", [("quantize", "x", "-o", "y"), ("ladder", "x")])
def test_missing_torch_is_one_line_that_says_what_to_install(command: tuple[str, ...]) -> None:
    code = "import sys; sys.modules['torch'] = None; from nibble.cli import main; main()"
    result = subprocess.run(
        [sys.executable, "-c", code, *command], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].endswith("pip install 'nibble[quantize]'")
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "command", [("quantize", "nothing.gguf", "-o", "y"), ("plan", "nothing", "--gpu-memory", "8GiB")]
)
def test_model_that_is_not_there_is_one_line(tmp_path: Path, command: tuple[str, ...]) -> None:
    result = nibble(*command)
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1
    assert "nothing" in result.stderr
