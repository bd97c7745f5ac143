"""`python -m loadtest.step_timeline_svg report.json > timeline.svg`: the steps that `step_timeline` kept, as they were.

Two lanes a case on one scale of time: what the host did, and when the device was at work. Steps of the device alternate
in shade, so that one can be followed from its launch to the call in which its ids are read.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from html import escape
from pathlib import Path

import msgspec

from loadtest.step_recorder import HOST_PARTS, Span
from loadtest.step_timeline import Case, Report

WIDTH, LEFT, LANE, GAP, TOP = 1000, 70, 22, 64, 44  # pixels
COLOURS = {
    "schedule": "#4477aa",
    "inputs": "#66ccee",
    "launch": "#228833",
    "wait": "#eeeeee",
    "update": "#ccbb44",
    "device": "#aa3377",
}
SHADES = (1.0, 0.7)
TICK_MS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)
MAX_TICKS = 12


def rectangle(x: float, y: float, width: float, colour: str, opacity: float = 1.0) -> str:
    return (
        f'<rect x="{x:.2f}" y="{y:.1f}" width="{max(width, 0.3):.2f}" height="{LANE}" fill="{colour}" '
        f'fill-opacity="{opacity}"/>'
    )


def text(x: float, y: float, words: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}">{escape(words)}</text>'


def draw_case(case: Case, y: float) -> Iterator[str]:
    steps = case.shown[1:]  # the first one's launch is what the device computes in the second
    start_s, end_s = steps[0].host.start_s, steps[-1].host.end_s
    scale = WIDTH / (end_s - start_s)

    def place(span: Span) -> tuple[float, float]:
        """x and width of what lies between the first shown call's start and the last one's end."""
        first, last = max(span.start_s, start_s), min(span.end_s, end_s)
        return LEFT + (first - start_s) * scale, (last - first) * scale

    device = "" if case.device_us is None else f", device {case.device_us / 1e3:.2f} ms"
    tokens = f", {case.budget} tokens a step" if case.budget else ""
    title = f"{case.batch} sequences, {case.sampling}{tokens}: host {case.host_us / 1e3:.2f} ms of a step{device}"
    yield text(LEFT, y - 6, title)
    yield text(4, y + 16, "host")
    yield text(4, y + LANE + 18, "device")
    for step in steps:
        x, width = place(step.host)
        yield rectangle(x, y, width, COLOURS["update"])
        for span in sorted(step.parts, key=lambda span: span.name == "inputs"):  # which lie within launch
            x, width = place(span)
            yield rectangle(x, y, width, COLOURS[span.name])
    for i, step in enumerate(case.shown):
        if step.device is not None and step.device.start_s < end_s:
            x, width = place(step.device)
            yield rectangle(x, y + LANE + 2, width, COLOURS["device"], SHADES[i % len(SHADES)])
    total_ms = (end_s - start_s) * 1e3
    tick_ms = next((tick for tick in TICK_MS if total_ms / tick <= MAX_TICKS), TICK_MS[-1])
    for i in range(int(total_ms / tick_ms) + 1):
        yield text(LEFT + i * tick_ms * scale * 1e-3, y + 2 * LANE + 16, f"{i * tick_ms:g}")
    yield text(LEFT + WIDTH + 8, y + 2 * LANE + 16, "ms")


def draw(report: Report, cases: list[Case]) -> str:
    height = TOP + len(cases) * (2 * LANE + GAP)
    total = LEFT + WIDTH + 40
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total} {height}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{total}" height="{height}" fill="white"/>',
        text(LEFT, 16, f"{report.model} on {report.gpu.name if report.gpu else report.device}"),
    ]
    for i, name in enumerate((*HOST_PARTS, "device")):
        x = LEFT + 400 + 100 * i
        lines += [f'<rect x="{x}" y="6" width="12" height="12" fill="{COLOURS[name]}"/>', text(x + 16, 16, name)]
    for i, case in enumerate(cases):
        lines += draw_case(case, TOP + 16 + i * (2 * LANE + GAP))
    return "\n".join([*lines, "</svg>", ""])


def main() -> None:
    report = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=Report)
    sys.stdout.write(draw(report, report.cases))


if __name__ == "__main__":
    main()
