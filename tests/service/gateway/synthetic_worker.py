"""A worker over the real broker whose tokens are a known function of the request, so that answers can be predicted."""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable
from typing import Literal

from nibble.engine.protocol import FinishReason, GenerationRequest, RequestMetrics, TokenEvent
from nibble.service.broker.wire import WorkerInfo
from nibble.service.broker.worker_side import WorkerBroker

CACHED_TOKENS = 2
Reply = Callable[[GenerationRequest], list[int]]


def logprob_of(token_id: int) -> float:
    """Known of each token; exact in float32."""
    return -(token_id % 64) / 8


def records(token_ids: list[int], num_logprobs: int | None) -> bytes:
    """The most probable tokens of each are those with the next ids, with known log probabilities."""
    assert num_logprobs is not None
    words: list[float | int] = []
    for token_id in token_ids:
        words.append(logprob_of(token_id))
        for k in range(1, num_logprobs + 1):
            words += [token_id + k, -k / 4]
    return struct.pack("<" + ("f" + "If" * num_logprobs) * len(token_ids), *words)


class SyntheticWorker(threading.Thread):
    """Answers each request with `reply(request)`: as many tokens per step as `tokens_per_step`.

    A reply that is used up goes on with its last token. `gate`: steps are taken only while it is set. A reply may
    raise ValueError: the request then ends with that error. seen and dropped: what it was given and told to free.
    """

    def __init__(
        self, url: str, namespace: str, reply: Reply, *, model: str = "small", tokens_per_step: int = 1
    ) -> None:
        super().__init__(daemon=True)
        self.reply = reply
        self.tokens_per_step = tokens_per_step
        self.gate = threading.Event()
        self.gate.set()
        self.seen: list[GenerationRequest] = []
        self.dropped: list[str] = []
        self.is_ready = threading.Event()
        self.state: Literal["loading", "ready", "draining"] = "ready"
        self.max_context_tokens = 0
        self._url, self._namespace, self._model = url, namespace, model
        self._running: dict[str, tuple[GenerationRequest, list[int], int]] = {}
        self._must_stop = threading.Event()

    @property
    def is_done(self) -> bool:
        """It was given something, and all of that has ended."""
        return bool(self.seen) and not self._running

    def stop(self) -> None:
        self._must_stop.set()
        self.gate.set()
        self.join(timeout=10)

    def run(self) -> None:
        broker = WorkerBroker(self._url, "synthetic", namespace=self._namespace)
        info = WorkerInfo(
            worker_id="synthetic",
            model=self._model,
            device="synthetic",
            state=self.state,
            max_context_tokens=self.max_context_tokens,
        )
        events: list[TokenEvent] = []
        while not self._must_stop.is_set():
            exchange = broker.exchange(events, 64, info)
            self.is_ready.set()
            for request_id in exchange.dropped:
                self._running.pop(request_id, None)
                self.dropped.append(request_id)
            events = []
            for assignment in exchange.assignments:
                self.seen.append(assignment.request)
                try:
                    tokens = self.reply(assignment.request)
                except ValueError as error:
                    events.append(self._error(assignment.request, str(error)))
                else:
                    done = len(assignment.generated_token_ids)
                    self._running[assignment.request.request_id] = (assignment.request, tokens, done)
            if self.gate.is_set():
                events += [self._step(*state) for state in list(self._running.values())]
            if not events:
                broker.wait(0.05)
        broker.close()

    def _step(self, request: GenerationRequest, tokens: list[int], done: int) -> TokenEvent:
        sampling = request.sampling
        new: list[int] = []
        reason = None
        while len(new) < self.tokens_per_step and reason is None:
            position = done + len(new)
            new.append(tokens[min(position, len(tokens) - 1)])
            num_generated = position + 1
            if new[-1] in sampling.stop_token_ids and num_generated >= sampling.min_tokens:
                reason = FinishReason.STOP
            elif num_generated >= sampling.max_tokens:
                reason = FinishReason.LENGTH
        self._running[request.request_id] = (request, tokens, done + len(new))
        metrics = None
        if reason is not None:
            del self._running[request.request_id]
        if reason is not None or done == 0:  # as an engine: with the first event and with the last
            metrics = RequestMetrics(
                prompt_tokens=len(request.prompt_token_ids),
                cached_tokens=CACHED_TOKENS,
                generated_tokens=done + len(new),
                queue_s=0.0,
                prefill_s=0.0,
                decode_s=0.0,
            )
        wants_prompt = sampling.prompt_logprobs is not None and done == 0
        return TokenEvent(
            request_id=request.request_id,
            index=done,
            token_ids=new,
            finish_reason=reason,
            metrics=metrics,
            logprobs=None if sampling.logprobs is None else records(new, sampling.logprobs),
            prompt_logprobs=records(request.prompt_token_ids[1:], sampling.prompt_logprobs) if wants_prompt else None,
        )

    def _error(self, request: GenerationRequest, message: str) -> TokenEvent:
        return TokenEvent(
            request_id=request.request_id, index=0, token_ids=[], finish_reason=FinishReason.ERROR, error=message
        )
