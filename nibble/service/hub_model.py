"""Models by their id on the Hugging Face hub, `owner/name` or `owner/name/file.gguf`, through `huggingface_hub`.

Files lie in that package's cache, which other programs share; it resumes a download that was broken off. Of a
repository only configuration, tokenizer and safetensors are fetched: no pickles, no code.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

Progress = Callable[[str, float], None]

_ID = re.compile(r"(?P<repository>[\w-][\w.-]*/[\w-][\w.-]*)(/(?P<file>[\w.-]+\.gguf))?")
_WANTED = ["*.json", "*.jinja", "*.safetensors"]
_UNWANTED = ["*/*", "consolidated*.safetensors"]  # other formats of the same weights
_MAX_NAMES = 5  # of GGUF files, in a message


class HubModelError(Exception):
    """The model could not be had. One line: why, and what can be done."""


class HubUnreachable(HubModelError):
    pass


def is_hub_id(source: Path) -> bool:
    """Whether it can only be an id: nothing of that name is here."""
    return not source.exists() and _ID.fullmatch(str(source)) is not None


def local_model(source: Path, progress: Progress) -> Path:
    """The directory, or the GGUF file, of what a user named: itself, or that of an id, downloaded now where need be.

    Raises HubModelError.
    """
    return fetch_hub_model(source, progress) if is_hub_id(source) else source


def fetch_hub_model(source: Path, progress: Progress, *, is_offline: bool = False) -> Path:
    """What is on this machine of an id, where need be downloaded now, unless is_offline. Raises HubModelError."""
    repository, file = parts_of(source)
    with hub_errors(source):
        from huggingface_hub import HfApi, hf_hub_download, snapshot_download

        options: dict[str, Any] = {"tqdm_class": _bar_class(f"downloading {repository}", progress)}
        if is_offline:
            options["local_files_only"] = True
        if file is not None:
            return Path(hf_hub_download(repository, file, **options))
        options |= {"allow_patterns": _WANTED, "ignore_patterns": _UNWANTED}
        directory = Path(snapshot_download(repository, **options))
        if not any(directory.glob("*.safetensors")):
            siblings = HfApi().model_info(repository).siblings or ()
            check_weights(repository, [each.rfilename for each in siblings])
        return directory


def parts_of(source: Path) -> tuple[str, str | None]:
    """(repository, GGUF file) of an id."""
    match = _ID.fullmatch(str(source))
    assert match is not None, f"{source} is no id"
    return match["repository"], match["file"]


def is_wanted(name: str) -> bool:
    """Whether it is one of the files that are fetched of a repository."""
    return any(fnmatch(name, each) for each in _WANTED) and not any(fnmatch(name, each) for each in _UNWANTED)


def check_weights(repository: str, names: list[str]) -> None:
    """Raise HubModelError unless a repository with these files has weights that can be served."""
    if any(is_wanted(name) and name.endswith(".safetensors") for name in names):
        return
    gguf_files = [f"{repository}/{name}" for name in names if name.endswith(".gguf") and "/" not in name]
    if gguf_files:
        more = f" and {len(gguf_files) - _MAX_NAMES} more" if len(gguf_files) > _MAX_NAMES else ""
        listed = ", ".join(gguf_files[:_MAX_NAMES])
        raise HubModelError(f"{repository}: has GGUF files: name one of them: {listed}{more}")
    raise HubModelError(f"{repository}: has no safetensors files, and pickled weights are never opened")


@contextmanager
def hub_errors(source: Path) -> Iterator[None]:
    """Whatever `huggingface_hub` raises while an id is fetched, as HubModelError."""
    repository, file = parts_of(source)
    try:
        from huggingface_hub import errors
    except ImportError:
        raise HubModelError(
            f"{source}: there is no such file, and to look for it on the hub needs: pip install huggingface_hub"
        ) from None
    try:
        yield
    except errors.GatedRepoError as error:
        raise HubModelError(
            f"{repository}: its owner asks for an agreement first, on the hub; then set HF_TOKEN"
        ) from error
    except errors.RepositoryNotFoundError as error:
        reason = "neither a file here nor a model on the hub (private ones need HF_TOKEN)"
        raise HubModelError(f"{repository}: {reason}") from error
    except errors.EntryNotFoundError as error:
        if isinstance(error, errors.LocalEntryNotFoundError):
            raise _unreachable(repository, error) from error
        raise HubModelError(f"{repository}: has no file {file} on the hub") from error
    except (errors.HTTPError, errors.OfflineModeIsEnabled) as error:  # type: ignore[attr-defined]  # the HTTP client's
        raise _unreachable(repository, error) from error
    except errors.HFValidationError as error:
        raise HubModelError(f"{repository}: neither a file here nor an id on the hub ({error})") from error
    except OSError as error:
        raise HubModelError(f"{repository}: the download cannot be stored: {error.strerror or error}") from error


def _unreachable(repository: str, error: Exception) -> HubUnreachable:
    reason = " ".join(str(error.__cause__ or error).split())[:200]
    return HubUnreachable(
        f"{repository}: is not on this machine, and the hub cannot be reached ({reason}); name a directory or a GGUF "
        f"file, or fetch it where there is a connection: hf download {repository}"
    )


def _bar_class(description: str, progress: Progress) -> Any:
    """A progress bar of `tqdm`'s kind that draws nothing and reports the share of bytes that are here."""
    from tqdm import tqdm

    class Bar(tqdm):  # type: ignore[misc]  # untyped
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            super().__init__(*args, **kwargs | {"disable": False})

        def display(self, *args: Any, **kwargs: Any) -> None:
            if self.unit == "B" and self.total:
                progress(description, min(1.0, self.n / self.total))

        def close(self) -> None:
            self.disable = True  # nothing to erase

    return Bar
