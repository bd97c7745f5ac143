"""Who does what when during the steps of an engine: the host by its clock, the device by events between its kernels.

Nothing waits for the device that would not wait anyway. The engine does not know: its methods are wrapped.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from nibble.engine.llm_engine import LLMEngine
from nibble.engine.pass_shapes import PassShape
from nibble.kernels.interface import Array, HostCopy

HOST_PARTS = ("schedule", "inputs", "launch", "wait", "update")


class Span(msgspec.Struct, frozen=True, array_like=True):
    """Seconds on the host's clock, whoever it was."""

    name: str
    start_s: float
    end_s: float

    @property
    def seconds(self) -> float:
        return self.end_s - self.start_s


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One call of `LLMEngine.step` and what it launched; inputs lie within launch."""

    host: Span
    parts: list[Span]
    device: Span | None  # the launched step; None without a device

    def part_s(self, name: str) -> float:
        """Of each of HOST_PARTS, which together are the call: update is what the others leave."""
        total_s = sum(span.seconds for span in self.parts if span.name == name)
        if name == "launch":
            return total_s - self.part_s("inputs")
        if name == "update":
            return self.host.seconds - sum(self.part_s(other) for other in HOST_PARTS[:-1])
        return total_s

    @property
    def busy_s(self) -> float:
        """In which the host did not wait."""
        return self.host.seconds - self.part_s("wait")


class Clock(Protocol):
    """Of a device: `mark` in its queue of work, `seconds` later of that moment, on the host's clock."""

    def mark(self) -> Any: ...
    def seconds(self, mark: Any) -> float: ...


class CUDAClock:
    """The present stream's, which is empty now."""

    def __init__(self) -> None:
        import cupy

        self._new_event = cupy.cuda.Event
        self._elapsed_ms = cupy.cuda.get_elapsed_time
        self._stream = cupy.cuda.get_current_stream()
        self._stream.synchronize()
        self._zero = self.mark()
        self._zero_s = time.perf_counter()  # some us later than an empty stream passes the event

    def mark(self) -> Any:
        event = self._new_event()
        event.record(self._stream)
        return event

    def seconds(self, mark: Any) -> float:
        mark.synchronize()
        return self._zero_s + float(self._elapsed_ms(self._zero, mark)) * 1e-3


class StepRecorder:
    """Steps an engine and keeps what happened."""

    def __init__(self, engine: LLMEngine, clock: Clock | None) -> None:
        self._engine, self._clock = engine, clock
        self._parts: list[Span] = []
        self._marks: tuple[Any, Any] | None = None
        runner, kernels = engine.runner, engine.runner.kernels
        # The engine shows nobody what it is at, and should not have to: so its parts are wrapped here.
        engine.scheduler.schedule = self._timed("schedule", engine.scheduler.schedule)  # type: ignore[method-assign]
        runner._prepare = self._timed("inputs", runner._prepare)  # type: ignore[method-assign]
        runner.launch = self._timed("launch", self._marked(runner.launch))  # type: ignore[method-assign]
        self._start_to_host = kernels.start_to_host
        kernels.start_to_host = self._start_timed  # type: ignore[method-assign]

    def steps(self, is_wanted: Callable[[], bool]) -> list[Step]:
        """Step until somebody does not want another one; times of the device are read at the end."""
        taken: list[tuple[Span, list[Span], Any]] = []
        while is_wanted():
            self._parts, self._marks = [], None
            start_s = time.perf_counter()
            self._engine.step()
            taken.append((Span("step", start_s, time.perf_counter()), self._parts, self._marks))
        return [Step(host=host, parts=parts, device=self._on_device(marks)) for host, parts, marks in taken]

    def _on_device(self, marks: tuple[Any, Any] | None) -> Span | None:
        if marks is None or self._clock is None:
            return None
        return Span("device", *map(self._clock.seconds, marks))

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            start_s = time.perf_counter()
            result = function(*arguments)
            self._parts.append(Span(name, start_s, time.perf_counter()))
            return result

        return call

    def _marked(self, launch: Callable[..., Any]) -> Callable[..., Any]:
        """The marks lie in the device's queue: before the step's first upload, and behind the copies of its results."""
        upload = self._engine.runner._upload
        clock = self._clock
        if clock is None:
            return launch
        begin: list[Any] = []

        def upload_marked(part: slice, shape: PassShape) -> None:
            begin[:] = begin or [clock.mark()]
            upload(part, shape)

        self._engine.runner._upload = upload_marked  # type: ignore[method-assign]

        def launch_marked(batch: Any) -> Any:
            step = launch(batch)
            self._marks = (begin.pop(), clock.mark())
            return step

        return launch_marked

    def _start_timed(self, array: Array) -> HostCopy:
        return _TimedCopy(self._start_to_host(array), self._timed)


class _TimedCopy:
    def __init__(self, copy: HostCopy, timed: Callable[[str, Callable[..., Any]], Callable[..., Any]]) -> None:
        self._wait = timed("wait", copy.wait)
        self._copy = copy  # its buffer is used anew once it is gone

    def wait(self) -> npt.NDArray[Any]:
        return np.asarray(self._wait())
