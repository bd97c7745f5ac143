"""From what the user named, or the demo model, to a native checkpoint directory, with progress in the terminal."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from nibble.engine.checkpoint.errors import CheckpointError
from nibble.engine.checkpoint.resolve import resolve_checkpoint
from nibble.service.demo_model import DemoModelError, fetch_demo_model
from nibble.service.hub_model import HubModelError, local_model
from nibble.service.launcher.errors import ModelNotFound

ReportProgress = Callable[[str, float], None]  # what is being done, and the share of it that is done


def locate_model(source: Path | None, cache_dir: Path, console: Console) -> tuple[Path, str]:
    """The native directory of the model and a name for it. Raises ModelNotFound."""
    try:
        with progress_bar(console) as report:
            if source is None:
                source = fetch_demo_model(cache_dir, report)
            name = model_name_of(source)
            return resolve_checkpoint(local_model(source, report), cache_dir, report), name
    except (CheckpointError, DemoModelError, HubModelError, OSError) as error:
        raise ModelNotFound(str(error)) from error


def prepare_model(source: Path | None, output: Path, console: Console) -> str:
    """Make `output` a link to the native directory of the model, and return a name for it. Raises ModelNotFound.

    What is fetched and converted lies beside the link, which is replaced at once: a process that starts meanwhile finds
    the old model or the new one. It is relative where it can be, as volumes are mounted under different paths.
    """
    if output.is_dir() and not output.is_symlink():
        raise ModelNotFound(f"{output}: is a directory; name a path where a link to the model can be made")
    parent = output.parent.absolute()
    directory, name = locate_model(source, parent, console)
    directory = directory.absolute()
    target = directory.relative_to(parent) if directory.is_relative_to(parent) else directory
    temporary = output.with_name(f".{output.name}-{os.getpid()}")
    try:
        temporary.unlink(missing_ok=True)  # of an earlier process with this number, as containers have them
        temporary.symlink_to(target)
        temporary.replace(output)
    except OSError as error:
        raise ModelNotFound(f"{output}: the link to the model cannot be made: {error.strerror}") from error
    return name


def model_name_of(source: Path) -> str:
    """A GGUF file's name without its suffix, a directory's name, that of a model on the hub."""
    return source.stem if source.suffix == ".gguf" else source.resolve().name


@contextmanager
def progress_bar(console: Console) -> Iterator[ReportProgress]:
    """A function that draws one bar per kind of work, or prints one line for each where there is no terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        tasks = {}

        def report(description: str, done: float) -> None:
            if description not in tasks:
                tasks[description] = progress.add_task(description, total=1.0)
                if not console.is_terminal:
                    console.print(f"{description} ...", highlight=False)
            progress.update(tasks[description], completed=done)

        yield report
