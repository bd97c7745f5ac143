"""Base images for a machine that reaches Debian's packages but no registry of images: `python stand_in_images.py`.

Each gets the very name that Dockerfile and docker-compose.yml use, so that those run untouched, and holds the same
program from Debian: of another version, and on another distribution where the real one is Alpine. Sizes of images that
are built on them say little; what the layers above add is what they are. Needs debootstrap and root. One that is there
already, from a registry or an earlier run, is left alone. Grafana is not in Debian: there is no stand-in for it.
"""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCKERFILES = Path(__file__).parent / "stand_ins"
BASE = "nibble-stand-in/debian"
LABEL = "nibble.stand-in"
MIRROR = "http://deb.debian.org/debian"
LOCAL_CERTIFICATES = Path("/usr/local/share/ca-certificates")
CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"
UNWANTED = ("var/lib/apt/lists", "var/cache/apt", "usr/share/doc", "usr/share/man", "usr/share/locale")


def image_names() -> dict[str, str]:
    """Name in the shipped files of each image that there is a stand-in for, by the stem of its Dockerfile."""
    text = (ROOT / "docker-compose.yml").read_text() + (ROOT / "Dockerfile").read_text()
    names = {}
    for path in sorted(DOCKERFILES.glob("*.Dockerfile")):
        stem = path.stem
        found = re.findall(rf"_IMAGE(?:=|:-)((?:\w+/)?{stem}:[\w.-]+)", text)
        assert found, f"no image for {path}"
        names[stem] = found[0]
    return names


def make_all() -> list[str]:
    """Make what is missing. Returns the names of all stand-ins that are there then."""
    for stem, name in image_names().items():
        if not _exists(name):
            if not _exists(BASE):
                _make_base()
            _make(stem, name)
    return [
        name for name in image_names().values() if _exists(name, "--format", f'{{{{index .Config.Labels "{LABEL}"}}}}')
    ]


def _exists(name: str, *options: str) -> bool:
    done = subprocess.run(["docker", "image", "inspect", *options, name], capture_output=True, text=True, check=False)
    return done.returncode == 0 and bool(done.stdout.strip())


def _make_base() -> None:
    """Debian without its documentation, and with this machine's own certificate authorities."""
    with _temporary_root() as root:
        command = ["debootstrap", "--variant=minbase", "--include=ca-certificates", "bookworm", str(root), MIRROR]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        if LOCAL_CERTIFICATES.is_dir():
            shutil.copytree(LOCAL_CERTIFICATES, root / LOCAL_CERTIFICATES.relative_to("/"), dirs_exist_ok=True)
            subprocess.run(["chroot", str(root), "update-ca-certificates"], check=True, capture_output=True)
        for directory in UNWANTED:
            for path in (root / directory).iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        with subprocess.Popen(["tar", "-C", str(root), "-c", "."], stdout=subprocess.PIPE) as archive:
            subprocess.run(["docker", "import", "-", BASE], stdin=archive.stdout, check=True, stdout=subprocess.DEVNULL)
        assert archive.returncode == 0


@contextmanager
def _temporary_root() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="nibble-debian-") as directory:
        root = Path(directory) / "root"
        root.mkdir(mode=0o755)  # it becomes `/`, which everybody has to be able to enter
        yield root


def _make(stem: str, name: str) -> None:
    with tempfile.TemporaryDirectory(prefix="nibble-stand-in-") as context:
        (Path(context) / "pip.conf").write_text(_pip_configuration())
        file = DOCKERFILES / f"{stem}.Dockerfile"
        subprocess.run(
            ["docker", "build", "--label", f"{LABEL}=true", "-f", str(file), "-t", name, context], check=True
        )


def _pip_configuration() -> str:
    """The package indexes that pip uses on this machine; its directories are not there in a container."""
    done = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    configuration = configparser.ConfigParser()
    configuration["global"] = {"cert": CERTIFICATES}
    for line in done.stdout.splitlines():
        key, _, value = line.partition("=")
        name = key.rpartition(".")[2]
        urls = [url for url in value.strip("'\"").split() if url.startswith(("http://", "https://"))]
        if name in ("index-url", "extra-index-url") and urls:
            configuration["global"][name] = " ".join(urls)
    lines = [f"{name} = {value}" for name, value in configuration["global"].items()]
    return "\n".join(["[global]", *lines, ""])


if __name__ == "__main__":
    print("\n".join(make_all()))  # noqa: T201  # a command
