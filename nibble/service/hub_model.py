"""Models by their id on the Hugging Face hub, `owner/name` or `owner/name/file.gguf`, through `huggingface_hub`.

Files lie in that package's cache, which other programs share; it resumes a download that was broken off. Of a
repository only configuration, tokenizer and safetensors are fetched: no pickles, no code.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

Progress = Callable[[str, float], None]

_ID = re.compile(r"(?P<repository>[\w-][\w.-]*/[\w-][\w.-]*)(/(?P<file>[\w.-]+\.gguf))?")
_WANTED = ["*.json", "*.jinja", "*.safetensors"]
_UNWANTED = ["*/*", "consolidated*.safetensors"]  # other formats of the same weights


class HubModelError(Exception):
    """The model could not be had. One line: why, and what can be done."""


def is_hub_id(source: Path) -> bool:
    """Whether it can only be an id: nothing of that name is here."""
    return not source.exists() and _ID.fullmatch(str(source)) is not None


def fetch_hub_model(source: Path, progress: Progress) -> Path:
    """The directory, or the GGUF file, on this machine, where need be downloaded now. Raises HubModelError."""
    match = _ID.fullmatch(str(source))
    assert match is not None, f"{source} is no id"
    repository, file = match["repository"], match["file"]
    try:
        from huggingface_hub import errors, hf_hub_download, snapshot_download
    except ImportError:
        raise HubModelError(
            f"{source}: there is no such file, and to look for it on the hub needs: pip install huggingface_hub"
        ) from None
    bar = _bar_class(f"downloading {repository}", progress)
    try:
        if file is not None:
            return Path(hf_hub_download(repository, file, tqdm_class=bar))
        wanted: dict[str, Any] = {"allow_patterns": _WANTED, "ignore_patterns": _UNWANTED, "tqdm_class": bar}
        return Path(snapshot_download(repository, **wanted))
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
    except OSError as error:
        raise HubModelError(f"{repository}: the download cannot be stored: {error.strerror or error}") from error


def _unreachable(repository: str, error: Exception) -> HubModelError:
    reason = " ".join(str(error.__cause__ or error).split())[:200]
    return HubModelError(
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
