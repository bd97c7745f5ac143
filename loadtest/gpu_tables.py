"""`python -m loadtest.gpu_tables docs/results/<report>.json`: the tables of docs/performance.md, from a GPU report.

They replace what is between the two markers there. Nothing between them is written by hand.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from loadtest.gpu_report import EngineSpeed, GPUReport, KernelSpeed, StartTime

DOCUMENT = Path(__file__).parent.parent / "docs" / "performance.md"
BEGIN, END = "<!-- begin: loadtest.gpu_tables of {} -->", "<!-- end: loadtest.gpu_tables -->"
_SECTION = re.compile(r"<!-- begin: loadtest\.gpu_tables of (?P<report>\S+) -->\n.*?" + END, re.DOTALL)


def render(report: GPUReport, name: str) -> str:
    """The section, markers included; `name` is the report's path."""
    parts = [BEGIN.format(name), *_conditions(report)]
    for engine in report.engines:
        parts += _workloads(engine)
    for engine in report.engines:
        parts += _decode(engine)
    parts += _prefill(report.engines)
    parts += _starts(report.starts)
    parts += _kernels(report.kernels)
    return "\n".join([*parts, END])


def _conditions(report: GPUReport) -> Iterator[str]:
    gpu, machine = report.gpu, report.machine
    assert gpu is not None
    roof = f"{gpu.read_bandwidth / 1e12:.2f} TB/s"
    if gpu.product_flops:
        roof += f" and {gpu.product_flops / 1e12:.0f} TFLOP/s (cuBLAS, fp16, 8192^3)"
    packages = ", ".join(f"{name} {version}" for name, version in machine.packages.items())
    yield f"One {gpu.name}, driver {gpu.driver}, {packages}; {machine.date}, commit {machine.commit}."
    yield f"The roof, measured just before: {roof}."


def _workloads(engine: EngineSpeed) -> Iterator[str]:
    if not engine.workloads:
        return
    yield f"\n{engine.model}, all prompts added at once, tokens/s of all sequences together:\n"
    yield from _header(["batch: input/output", "decode", "prefill"])
    for w in engine.workloads:
        decode = f"{w.decode_tokens_per_s:,.0f}" if w.decode_tokens_per_s else ""
        yield _row([f"{w.batch}: {w.input_tokens}/{w.output_tokens}", decode, f"{w.prefill_tokens_per_s:,.0f}"])


def _decode(engine: EngineSpeed) -> Iterator[str]:
    if not engine.decode:
        return
    steps = {(step.batch, step.context): step for step in engine.decode}
    contexts = sorted({context for _, context in steps})
    yield f"\n{engine.model}, decode steps: us, tokens/s and share of the read bandwidth, by batch and context:\n"
    yield from _header(["batch", *(f"{c:,}: {what}" for c in contexts for what in ("us", "tok/s", "share"))])
    for batch in sorted({batch for batch, _ in steps}):
        cells = [str(batch)]
        for context in contexts:
            step = steps.get((batch, context))
            cells += (
                [f"{step.step_us:,.0f}", f"{step.tokens_per_s:,.0f}", f"{step.bandwidth_share:.0%}"]
                if step
                else ["does not fit", "", ""]
            )
        yield _row(cells)


def _prefill(engines: Sequence[EngineSpeed]) -> Iterator[str]:
    speeds = {(e.model, p.tokens): p.tokens_per_s for e in engines for p in e.prefill}
    if not speeds:
        return
    sizes = sorted({tokens for _, tokens in speeds})
    yield "\nPrefill of one prompt, tokens/s:\n"
    yield from _header(["tokens", *(f"{size:,}" for size in sizes)])
    for model in dict.fromkeys(model for model, _ in speeds):
        yield _row([model, *(f"{speeds[model, s]:,.0f}" if (model, s) in speeds else "" for s in sizes)])


def _starts(starts: Sequence[StartTime]) -> Iterator[str]:
    if not starts:
        return
    yield f"\nFrom the start of a process to its first token, {starts[0].model}, weights in the page cache, seconds:\n"
    yield from _header(["start", *starts[0].stages, "total"])
    for i, start in enumerate(starts, 1):
        yield _row([str(i), *(f"{seconds:.2f}" for seconds in start.stages.values()), f"{start.total_s:.2f}"])


def _kernels(speeds: Sequence[KernelSpeed]) -> Iterator[str]:
    """A table per kernel: what comes after the last comma of a shape goes across."""
    for kernel in dict.fromkeys(speed.kernel for speed in speeds):
        cells = {tuple(s.shape.rsplit(", ", 1)): s for s in speeds if s.kernel == kernel}
        columns = sorted(dict.fromkeys(column for _, column in cells), key=_number)
        yield f"\n`{kernel}`, us and share of the roof:\n"
        yield from _header(["", *columns])
        for row in dict.fromkeys(row for row, _ in cells):
            found = (cells.get((row, column)) for column in columns)
            yield _row([row, *("" if speed is None else _cell(speed) for speed in found)])


def _number(text: str) -> int:
    return int(re.sub(r"\D", "", text))


def _cell(speed: KernelSpeed) -> str:
    us = f"{speed.us:,.1f}" if speed.us < 1000 else f"{speed.us:,.0f}"
    return us if speed.roof_share is None else f"{us}, {speed.roof_share:.0%}"


def _header(cells: Sequence[str]) -> Iterator[str]:
    yield _row(cells)
    yield _row(["---", *["---:"] * (len(cells) - 1)])


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def read_report(path: Path) -> GPUReport:
    return msgspec.json.decode(path.read_bytes(), type=GPUReport)


def section_of(document: str) -> tuple[str, str]:
    """(the section with its markers, the path of its report)."""
    match = _SECTION.search(document)
    if match is None:
        raise SystemExit(f"the document has no section between the markers of {BEGIN.format('...')}")
    return match[0], match["report"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    path = parser.parse_args().report
    document = DOCUMENT.read_text()
    name = str(path.resolve().relative_to(DOCUMENT.parent.parent))
    DOCUMENT.write_text(document.replace(section_of(document)[0], render(read_report(path), name)))


if __name__ == "__main__":
    main()
