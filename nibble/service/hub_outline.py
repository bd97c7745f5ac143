"""A model on the hub without its weights, for what has to be known of it before it is downloaded.

Configuration is fetched as it is. Of weights only the headers are, by range requests: files are made here that have the
size of those on the hub and hold nothing behind the header (on the disk they take no more than that). So a model is
opened, checked and described by the code that converts it. All of it lies in a directory that the caller removes.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np

from nibble.engine.checkpoint.errors import CheckpointError
from nibble.engine.checkpoint.gguf import GGUFFile
from nibble.engine.checkpoint.quantization_config import read_quantization
from nibble.engine.checkpoint.safetensors_file import SafetensorsFile
from nibble.service.hub_model import (
    HubModelError,
    HubUnreachable,
    Progress,
    check_weights,
    fetch_hub_model,
    hub_errors,
    is_hub_id,
    is_wanted,
    parts_of,
)

_FETCHED = ("config.json", "generation_config.json", "quantize_config.json", "model.safetensors.index.json")
_FIRST_BYTES = 1 << 18  # holds the header of most shards
_MAX_HEADER_BYTES = 128 << 20  # a sane bound: the vocabulary in a GGUF file's takes 10 MB
_MAX_COLUMNS = 1 << 20  # a sane bound, many times what linears have
_ROPE_FREQUENCIES = "rope_freqs.weight"  # the one tensor that is part of a GGUF model's configuration

Read = Callable[[int, int], bytes]  # start, stop


def model_outline(source: Path, directory: Path, progress: Progress) -> Path:
    """What `source` names if it is here, whole; else its outline within `directory`. Raises HubModelError."""
    if not is_hub_id(source):
        return source
    try:
        return _fetch_outline(source, directory, progress)
    except HubUnreachable:
        return fetch_hub_model(source, progress, is_offline=True)


def _fetch_outline(source: Path, directory: Path, progress: Progress) -> Path:
    repository, file = parts_of(source)
    with hub_errors(source):
        from huggingface_hub import HfApi, errors

        info = HfApi().model_info(repository, files_metadata=True)
        sizes = {each.rfilename: each.size or 0 for each in info.siblings or ()}
        target = directory / repository
        target.mkdir(parents=True)
        if file is not None:
            if file not in sizes:
                raise errors.EntryNotFoundError(file)
            _make_gguf(_reader(repository, file, info.sha), target / file, sizes[file])
            return target / file
        check_weights(repository, list(sizes))
        names = [name for name in sizes if is_wanted(name)]
        for index, name in enumerate(names):
            progress(f"reading headers of {repository}", index / len(names))
            path = target / name
            if name in _FETCHED:
                path.write_bytes(_reader(repository, name, info.sha)(0, min(sizes[name], _MAX_HEADER_BYTES)))
            elif name.endswith(".safetensors"):
                _make_safetensors(_reader(repository, name, info.sha), path, sizes[name])
            else:
                path.touch()
        progress(f"reading headers of {repository}", 1.0)
        with suppress(CheckpointError):
            _fill_groups(target)
        return target


def _fill_groups(directory: Path) -> None:
    """Columns' groups of packed linears, which are read with the headers: any that are as configured, since sizes do
    not depend on them. What is wrong with a file is left for whoever opens it to find.
    """
    quantization = read_quantization(directory)
    if quantization is None:
        return
    for path in directory.glob("*.safetensors"):
        file = SafetensorsFile(path)
        for name, spec in file.specs.items():
            if not name.endswith("g_idx") or spec.dtype != "I32" or not 0 < math.prod(spec.shape) < _MAX_COLUMNS:
                continue
            packing = quantization.of_packed(name.rpartition(".")[0])
            columns = np.arange(math.prod(spec.shape), dtype="<i4")
            groups = columns // (packing.group_size if packing.group_size > 0 else len(columns))
            with path.open("r+b") as output:
                output.seek(file.starts[name])
                output.write((groups[::-1] if packing.is_reordered else groups).tobytes())


def _make_safetensors(read: Read, path: Path, size: int) -> None:
    """A malformed header is left for whoever opens the file to find."""
    content = read(0, min(size, _FIRST_BYTES))
    if size >= 8:
        end = min(8 + struct.unpack_from("<Q", content)[0], size, _MAX_HEADER_BYTES)
        content = content[:end] + (read(len(content), end) if end > len(content) else b"")
    path.write_bytes(content)
    os.truncate(path, size)


def _make_gguf(read: Read, path: Path, size: int) -> None:
    """The header has no length: it is read until it is all there, and so is the tensor that belongs to it."""
    with path.open("wb") as output:
        end, wanted = 0, _FIRST_BYTES
        while end < min(size, _MAX_HEADER_BYTES):
            wanted = min(wanted, size)
            output.write(read(end, wanted))
            output.truncate(size)
            output.flush()
            end, wanted = wanted, wanted * 4
            try:
                tensors = GGUFFile(path).tensors
            except CheckpointError:
                continue
            if any(tensor.start <= end for tensor in tensors.values()):  # else it is made up of what is not there
                break
        else:
            return
        if _ROPE_FREQUENCIES in tensors:
            tensor = tensors[_ROPE_FREQUENCIES]
            output.seek(tensor.start)
            output.write(read(tensor.start, tensor.start + tensor.num_bytes))


def _reader(repository: str, name: str, revision: str | None) -> Read:
    """Bytes of a file on the hub, and no others, even of a server that does not know ranges."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import (  # type: ignore[attr-defined]  # public, but not said to be exported
        build_hf_headers,
        hf_raise_for_status,
        http_stream_backoff,
    )

    url = hf_hub_url(repository, name, revision=revision)

    def read(start: int, stop: int) -> bytes:
        if stop <= start:
            return b""
        headers = build_hf_headers() | {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        with http_stream_backoff("GET", url, max_retries=2, headers=headers, follow_redirects=True) as response:
            if response.status_code >= 400:
                response.read()
            hf_raise_for_status(response)
            content = bytearray()
            skipped = 0 if response.status_code == 206 else start
            for chunk in response.iter_bytes():
                content += chunk
                if len(content) >= skipped + stop - start:
                    break
        if len(content) < skipped + stop - start:
            raise HubModelError(f"{repository}: {name} on the hub ends before byte {stop}")
        return bytes(content[skipped : skipped + stop - start])

    return read
