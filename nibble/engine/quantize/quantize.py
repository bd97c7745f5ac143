"""A checkpoint with floating-point weights to a native INT4 one, layer by layer.

One layer is in memory at a time, and the residual streams of the calibration text. What is finished is kept beside the
output (`OUT.quantizing`) until all is, so that the same command goes on where it was interrupted.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
import torch
from torch import Tensor

from nibble.engine.checkpoint.cache import exclusive, partial_directory, publish
from nibble.engine.checkpoint.convert import Progress, convert_checkpoint
from nibble.engine.checkpoint.errors import UnsupportedModelError
from nibble.engine.checkpoint.safetensors_file import write_safetensors
from nibble.engine.checkpoint.schema import TensorSpec, linear_sizes
from nibble.engine.checkpoint.smooth_keys import SmoothKeySource
from nibble.engine.checkpoint.source import Floats, Source, open_source
from nibble.engine.model_config import ModelConfig
from nibble.engine.quantize.calibration import DEFAULT_TEXT, read_texts, token_sequences
from nibble.engine.quantize.decoder import read_layer
from nibble.engine.quantize.errors import OptionError, OutputError
from nibble.engine.quantize.kv_channels import kv_channels
from nibble.engine.quantize.layer import LayerQuantizer, round_layer
from nibble.engine.quantize.options import KVScales, Options
from nibble.engine.quantize.quantized_source import QuantizedSource
from nibble.engine.quantize.work_files import WorkFiles
from nibble.kernels.layout import GROUP_SIZES

STATISTICS_FILE = "calibration.safetensors"
WORK_VERSION = 3  # raise it whenever layers finished before would not be finished the same way
_BATCH_TOKENS = 4096

logger = logging.getLogger(__name__)


def quantize(path: Path, out: Path, options: Options, progress: Progress) -> None:
    """Write the native checkpoint `out`, a directory that does not exist yet.

    Raises CheckpointError for the model, QuantizeError for text, device and output.
    """
    source = SmoothKeySource(open_source(path))  # before calibration: its statistics are of the keys that are served
    _check(source, options)
    if out.exists():
        raise OutputError(f"{out}: exists already")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(out, lambda: progress("waiting for another process that writes there", 0.0)):
            _quantize_into(out, source, path, options, progress)
    except OSError as error:
        raise OutputError(f"{out}: cannot be written: {error.strerror}") from error


@torch.inference_mode()
def _quantize_into(out: Path, source: Source, path: Path, options: Options, progress: Progress) -> None:
    if out.exists():
        raise OutputError(f"{out}: exists already: another process has made it meanwhile")
    work_directory = out.with_name(out.name + ".quantizing")
    ids = _calibration_ids(source, options) if options.is_calibrated else None
    _prepare(work_directory, _identity(path, options, ids))
    work = WorkFiles(work_directory)
    _quantize_layers(source, work, ids, options, progress)
    with partial_directory(out) as directory:
        convert_checkpoint(QuantizedSource(source, work), directory, progress, _kv_channels(source, work, options))
        if options.is_calibrated:
            _write_statistics(directory / STATISTICS_FILE, work, source.config)
        publish(directory, out)
    shutil.rmtree(work_directory)


def _check(source: Source, options: Options) -> None:
    for name, (_, in_features) in linear_sizes(source.config).items():
        if in_features % GROUP_SIZES[0]:
            raise UnsupportedModelError(
                f"{source.label}: {name} has rows of {in_features}, not a multiple of {GROUP_SIZES[0]}"
            )
    if source.format("model.layers.0.mlp.down_proj.weight").kind == "int4":
        logger.warning(
            "%s is stored in 4 bits: to convert it keeps its weights, to quantise it loses some", source.label
        )
    if options.device == "cuda" and not torch.cuda.is_available():
        raise OptionError("the device cuda is asked for, and PyTorch sees no GPU")


def _calibration_ids(source: Source, options: Options) -> Tensor:
    texts = read_texts(options.calibration or DEFAULT_TEXT)
    with TemporaryDirectory() as directory:
        source.write_tokenizer(Path(directory))
        tokens = min(options.sequence_tokens, source.config.max_context_tokens)
        return token_sequences(texts, Path(directory) / "tokenizer.json", options.num_sequences, tokens)


def _prepare(directory: Path, identity: str) -> None:
    """The directory of finished layers: empty, unless they are of the same model, text and options."""
    file = directory / "identity"
    if file.is_file() and file.read_text() == identity:
        logger.info("event=resumed directory=%s", directory)
        return
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    file.write_text(identity)


def _identity(path: Path, options: Options, ids: Tensor | None) -> str:
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    model = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    calibration = None if ids is None else [list(ids.shape), hashlib.sha256(ids.numpy().tobytes()).hexdigest()]
    return msgspec.json.encode([WORK_VERSION, options.method, options.group_size, model, calibration]).decode()


def _quantize_layers(source: Source, work: WorkFiles, ids: Tensor | None, options: Options, progress: Progress) -> None:
    num_layers = source.config.num_layers
    if all(work.has(index) for index in range(num_layers)):
        return
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    quantizer = None if ids is None else _layer_quantizer(source, ids, options, device)
    for index in range(num_layers):
        progress("quantising the layers", index / num_layers)
        if work.has(index):
            if quantizer is not None:
                quantizer.skip(read_layer(source, index, device), work.read(index, device))
            continue
        layer = read_layer(source, index, device)
        if quantizer is None:
            work.write(index, round_layer(layer, source.config, options.method, options.group_size))
        else:
            work.write(index, quantizer.quantize(layer))
    progress("quantising the layers", 1.0)


def _layer_quantizer(source: Source, ids: Tensor, options: Options, device: torch.device) -> LayerQuantizer:
    table = torch.from_numpy(source.floats("model.embed_tokens.weight"))
    batch = max(1, _BATCH_TOKENS // ids.shape[1])
    batches = [table[rows].to(device) for rows in ids.split(batch)]
    return LayerQuantizer(batches, source.config, options.method, options.group_size, _precision(device))


def _precision(device: torch.device) -> torch.dtype:
    """bfloat16 where it is several times as fast: Hessians and errors are sums in float32 anyway."""
    if device.type == "cuda":
        return torch.bfloat16
    try:
        has_units = "amx_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        has_units = False
    return torch.bfloat16 if has_units else torch.float32


def _kv_channels(source: Source, work: WorkFiles, options: Options) -> list[Floats] | None:
    if options.kv is KVScales.TOKEN:
        return None
    return [kv_channels(work.statistics(index)) for index in range(source.config.num_layers)]


def _write_statistics(path: Path, work: WorkFiles, config: ModelConfig) -> None:
    """`layers.{i}.{tensor}.{measure}` float32: (num_kv_heads, head_dim) of keys and values, (K,) of inputs."""
    arrays = {
        f"layers.{index}.{name}": values
        for index in range(config.num_layers)
        for name, values in work.statistics(index).items()
    }
    write_safetensors(
        path, {name: TensorSpec("F32", array.shape) for name, array in arrays.items()}, {}, arrays.items()
    )
