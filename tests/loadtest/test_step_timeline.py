"""What is recorded of a step adds up to it, and can be drawn."""

from __future__ import annotations

import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import msgspec
import pytest
from tiny_models import make_tiny_llama

from loadtest.machine import this_machine
from loadtest.no_device import NoDevice
from loadtest.step_recorder import HOST_PARTS, StepRecorder
from loadtest.step_timeline import CONTEXT, SAMPLINGS, Report, decoding, summary, times
from loadtest.step_timeline_svg import draw
from loadtest.step_timing import Bench
from nibble.engine.limits import EngineLimits
from nibble.engine.llm_engine import LLMEngine


class HostClock:
    """A device that is done with everything at once."""

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, mark: float) -> float:
        return mark


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> LLMEngine:
    directory = tmp_path_factory.mktemp("tiny")
    make_tiny_llama(directory, vocab_size=300, max_context_tokens=2 * CONTEXT)
    limits = EngineLimits(kv_cache_bytes=4 << 20, max_num_sequences=3)
    return LLMEngine.from_checkpoint(directory, NoDevice(num_threads=1), limits)


def test_the_parts_of_a_step_are_the_step_and_its_device_starts_within(engine: LLMEngine) -> None:
    recorder, bench = StepRecorder(engine, HostClock()), Bench(engine)
    ids = bench.start_decoding(3, CONTEXT, 20, SAMPLINGS["greedy"])
    steps = recorder.steps(times(6))
    bench.abort(ids)
    assert len(steps) == 6
    for step in steps:
        assert sum(step.part_s(name) for name in HOST_PARTS) == pytest.approx(step.host.seconds)
        assert all(step.part_s(name) > 0 for name in ("schedule", "inputs", "launch", "update"))
        assert step.device is not None
        assert step.host.start_s < step.device.start_s < step.device.end_s < step.host.end_s
    case = summary(3, "greedy", 0, steps)
    assert 0 < case.host_us <= case.host_max_us
    assert case.idle_us is not None
    assert case.idle_us > 0


def test_every_case_is_drawn(engine: LLMEngine) -> None:
    recorder, bench = StepRecorder(engine, None), Bench(engine)
    cases = [decoding(bench, recorder, 2, sampling) for sampling in SAMPLINGS]
    assert [case.device_us for case in cases] == [None] * len(cases)
    report = Report(machine=this_machine(()), gpu=None, device="none", model="tiny", cases=cases)
    root = ElementTree.fromstring(draw(report, cases))
    titles = [element.text or "" for element in root if (element.text or "").startswith("2 sequences")]
    assert [title.split(":")[0] for title in titles] == [f"2 sequences, {sampling}" for sampling in SAMPLINGS]


def test_the_documented_drawing_is_that_of_its_report() -> None:
    results = Path(__file__).parents[2] / "docs" / "results"
    report = msgspec.json.decode((results / "2026-11-22-h100-step-timeline.json").read_bytes(), type=Report)
    assert (results / "2026-11-22-h100-step-timeline.svg").read_text() == draw(report, report.cases)
