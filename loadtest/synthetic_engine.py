"""An engine that computes nothing: one token per sequence at a fixed pace, with the time of each written down.

It has the interface that the worker loop drives, so that everything around an engine can be measured without one.
Sequences are spread over groups which step one after the other, as those of so many engines would; with one group all
sequences of a step emit at the same moment, as those of one engine do.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Sequence

from nibble.engine.protocol import FinishReason, GenerationRequest, TokenEvent
from nibble.engine.stats import EngineStats


class SyntheticEngine:
    """emit_times: for each request, the CLOCK_MONOTONIC seconds at which each of its tokens left `step`."""

    def __init__(self, token_id: int, tokens_per_s: float, num_groups: int, max_num_sequences: int) -> None:
        self.stats = EngineStats()
        self.emit_times: dict[str, array[float]] = {}
        self._token_ids = [token_id]
        self._max_num_sequences = max_num_sequences
        self._groups: list[dict[str, GenerationRequest]] = [{} for _ in range(num_groups)]
        self._step_s = 1 / (tokens_per_s * num_groups)
        self._next_step_s = time.monotonic()
        self._num_steps = 0

    @property
    def has_unfinished(self) -> bool:
        return any(self._groups)

    @property
    def capacity(self) -> int:
        return self._max_num_sequences - sum(map(len, self._groups))

    @property
    def preemptible(self) -> list[str]:
        return []

    def add(self, request: GenerationRequest, generated_token_ids: Sequence[int] = ()) -> None:
        assert not generated_token_ids, "nothing is recovered in this measurement"
        min(self._groups, key=len)[request.request_id] = request
        self.emit_times[request.request_id] = array("d")

    def abort(self, request_id: str) -> None:
        for group in self._groups:
            group.pop(request_id, None)

    def step(self) -> list[TokenEvent]:
        """Wait for the next group's time; one token for each of its sequences."""
        group = self._wait_for_group()
        now_s = time.monotonic()
        events = [self._emit(request, now_s) for request in group.values()]
        for event in events:
            if event.finish_reason is not None:
                del group[event.request_id]
        self.stats.num_running = sum(map(len, self._groups))
        self.stats.num_steps = self._num_steps
        self.stats.num_generated_tokens += len(events)
        return events

    def _wait_for_group(self) -> dict[str, GenerationRequest]:
        """The group whose time comes next, at its time; groups without sequences do not step."""
        while True:
            group = self._groups[self._num_steps % len(self._groups)]
            self._num_steps += 1
            self._next_step_s = max(self._next_step_s + self._step_s, time.monotonic())
            if group or not self.has_unfinished:
                time.sleep(max(0.0, self._next_step_s - time.monotonic()))
                return group

    def _emit(self, request: GenerationRequest, now_s: float) -> TokenEvent:
        times = self.emit_times[request.request_id]
        times.append(now_s)
        is_last = len(times) >= request.sampling.max_tokens
        return TokenEvent(
            request_id=request.request_id,
            index=len(times) - 1,
            token_ids=self._token_ids,
            finish_reason=FinishReason.LENGTH if is_last else None,
        )
