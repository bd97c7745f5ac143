"""`nibble ladder` and `nibble plan`: settings and files in, tables on the terminal out; the engine measures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from nibble.engine.checkpoint.errors import CheckpointError, SourceError
from nibble.engine.checkpoint.resolve import is_native
from nibble.engine.checkpoint.schema import Description
from nibble.engine.checkpoint.source import open_source
from nibble.engine.memory_estimate import MemoryEstimate, descriptions_of, estimate
from nibble.kernels.layout import GROUP_SIZES, KVDtype
from nibble.service.hub_model import local_model
from nibble.service.hub_outline import model_outline
from nibble.service.launcher.model import model_name_of, progress_bar
from nibble.service.launcher.settings import LauncherSettings
from nibble.service.settings import SettingsError, parse_bytes
from nibble.service.worker.device import engine_limits, make_kernels, uses_cuda
from nibble.service.worker.settings import WorkerSettings

GIB = 1 << 30
_PLAN_LABELS = (
    "",
    "weights",
    "buffers",
    "reserve (estimated)",
    "KV cache",
    "KV per token",
    "tokens that fit",
    "full contexts",
)


@dataclass(frozen=True)
class Request:
    """See `cli.ladder`."""

    model: Path
    quantized: Path | None
    text: Path | None
    num_sequences: int
    sequence_tokens: int
    generated_tokens: int
    gpu_memory: str | None
    max_kl: float
    output: Path | None


def run_ladder(request: Request) -> None:
    """Print the table, write the files.

    Raises HubModelError, CheckpointError, EngineError, QuantizeError, SettingsError, OSError.
    """
    from nibble.engine.evaluate import ladder, report  # PyTorch: not there unless it is asked for
    from nibble.engine.evaluate.checkpoints import make_pair
    from nibble.engine.quantize.options import Options
    from nibble.engine.quantize.quantize import quantize

    gpu_memory_bytes = None if request.gpu_memory is None else parse_bytes(request.gpu_memory)
    settings = ladder.Settings(request.generated_tokens, gpu_memory_bytes)
    with progress_bar(Console(stderr=True)) as report_progress:
        cache_dir = LauncherSettings.from_environment().cache_dir
        model = local_model(request.model, report_progress)
        _check(model, request, ladder.PROMPT_TOKENS)
        sequences = _sequences(model, request)
        pair = make_pair(
            model,
            request.quantized,
            cache_dir,
            lambda out: quantize(model, out, Options(), report_progress),
            report_progress,
        )
        worker = WorkerSettings.from_environment(model_dir=pair.reference)
        is_gpu = uses_cuda(worker)
        kernels = make_kernels(worker, is_gpu)
        results = ladder.measure(ladder.rungs_of(pair), sequences, kernels, settings, report_progress)
    best = ladder.recommended(results, request.max_kl)
    _print_table(report.LABELS, [report.cells(each) for each in results])
    Console().print(f"Recommended within a mean KL divergence of {request.max_kl:g}: {best.name}", highlight=False)
    if request.output is None:
        return
    subject = report.Subject(
        model=model_name_of(request.model),
        quantized=pair.quantized.name,
        text=(request.text or ladder.DEFAULT_TEXT).name,
        num_sequences=sequences.shape[0],
        sequence_tokens=sequences.shape[1],
        generated_tokens=request.generated_tokens,
        device="cuda" if is_gpu else "cpu",
    )
    _write(request.output, ".html", report.to_html(subject, results, best, request.max_kl).encode())
    _write(request.output, ".json", report.to_json(subject, results, best, request.max_kl))


def _check(model: Path, request: Request, prompt_tokens: int) -> None:
    """What would else be found out after minutes of measuring. Raises CheckpointError, SettingsError, OSError."""
    if is_native(model):
        raise SourceError(f"{model}: is a native checkpoint; name the model it was made of, and it by --quantized")
    context_tokens = open_source(model).config.max_context_tokens
    if prompt_tokens + request.generated_tokens > context_tokens:
        raise SettingsError(
            f"{request.generated_tokens} generated tokens and prompts of {prompt_tokens}: the model's context is "
            f"{context_tokens} tokens"
        )
    if request.output is not None:
        request.output.parent.mkdir(parents=True, exist_ok=True)


def _write(output: Path, suffix: str, content: bytes) -> None:
    path = output.with_name(output.name + suffix)
    try:
        path.write_bytes(content)
    except OSError as error:
        raise OSError(f"{path}: cannot be written: {error.strerror}") from error


def print_plan(model: Path, gpu_memory: str, group_size: int, utilization: float | None) -> None:
    """utilization None: as a worker has it. Raises HubModelError, CheckpointError, SettingsError, OSError."""
    total_bytes = parse_bytes(gpu_memory)
    if group_size not in GROUP_SIZES:
        raise SettingsError(f"the group size must be one of {GROUP_SIZES} (got {group_size})")
    given = {} if utilization is None else {"gpu_memory_utilization": utilization}
    limits = engine_limits(WorkerSettings.from_environment(model_dir=model, **given), is_cuda=True)
    columns: list[tuple[str, ...]] = []
    for name, description in _descriptions(model, group_size).items():
        for kv_dtype in (KVDtype.INT8, KVDtype.FP16):
            memory = estimate(
                description,
                kv_dtype,
                total_bytes,
                utilization=limits.memory_utilization,
                max_num_sequences=limits.max_num_sequences,
                max_num_batched_tokens=limits.max_num_batched_tokens,
                max_verified=limits.max_verified,
            )
            kind = description.kv_layout(kv_dtype).dtype
            columns.append((f"{name}, {kind} KV", *_plan_cells(memory, description.config.max_context_tokens)))
    _print_table(_PLAN_LABELS, columns)


def _descriptions(model: Path, group_size: int) -> dict[str, Description]:
    with TemporaryDirectory() as directory:
        with progress_bar(Console(stderr=True)) as report_progress:
            outline = model_outline(model, Path(directory), report_progress)
        try:
            return descriptions_of(outline, group_size)
        except CheckpointError as error:  # whose message is to name the model, not a file that is gone
            raise type(error)(str(error).replace(f"{directory}/", "")) from error


def _plan_cells(memory: MemoryEstimate, context_tokens: int) -> tuple[str, ...]:
    fits = memory.num_tokens > 0
    return (
        f"{memory.weight_bytes / GIB:.2f} GiB",
        f"{memory.buffer_bytes / GIB:.2f} GiB",
        f"{memory.reserve_bytes / GIB:.2f} GiB",
        f"{memory.kv_cache_bytes / GIB:.2f} GiB" if fits else "does not fit",
        f"{memory.kv_token_bytes / 1024:.1f} KiB",
        f"{memory.num_tokens:,}" if fits else "0",
        f"{memory.num_tokens / context_tokens:.1f}" if fits else "0",
    )


def _sequences(model: Path, request: Request) -> npt.NDArray[np.int32]:
    from nibble.engine.evaluate.ladder import DEFAULT_TEXT
    from nibble.engine.quantize.calibration import read_texts, token_sequences

    texts = read_texts(request.text or DEFAULT_TEXT)
    source = open_source(model)
    tokens = min(request.sequence_tokens, source.config.max_context_tokens)
    with TemporaryDirectory() as directory:
        source.write_tokenizer(Path(directory))
        ids = token_sequences(texts, Path(directory) / "tokenizer.json", request.num_sequences, tokens)
    sequences: npt.NDArray[np.int32] = ids.numpy().astype(np.int32)
    return sequences


def _print_table(labels: tuple[str, ...], columns: list[tuple[str, ...]]) -> None:
    """One thing measured a row: what is compared is side by side, within 80 characters."""
    table = Table(labels[0], box=None, header_style="bold")
    for column in columns:
        table.add_column(column[0], justify="right")
    for row in zip(labels[1:], *(column[1:] for column in columns), strict=True):
        table.add_row(*row)
    Console().print(table, highlight=False)
