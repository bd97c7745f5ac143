"""The tokens of one choice to the text that a client sees, and to the parts of it: reasoning, content, tool calls.

A pure function of the token log: how the tokens were grouped into events changes neither the text nor the counts.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from nibble.engine.protocol import FinishReason, RequestMetrics, TokenEvent
from nibble.service.gateway.answer_parser import AnswerParser
from nibble.service.gateway.detokenizer import Detokenizer
from nibble.service.gateway.logprobs import LogprobTrack, TokenLogprob
from nibble.service.gateway.plan import Plan
from nibble.service.gateway.stops import StopScanner


class Choice:
    """State of one choice.

    num_tokens: generated tokens so far, the end-of-sequence token included, but none after a stop string.
    num_reasoning_tokens: those of them that are reasoning. finish_reason: set with the last text. is_stream_done:
    whether the engine is done too; it is not when a stop string ended the choice, and then has to be told. parser: has
    what the text that `push` returned is made of; None: all of it is content. is_plain: so is all that is asked for.
    """

    __slots__ = (
        "_detokenizer",
        "_is_cut",
        "_logprobs",
        "_min_tokens",
        "_num_decoded",
        "_num_sent",
        "_only_prompt",
        "_pending",
        "_prompt",
        "_scanner",
        "_shows_stop",
        "_stop_logprobs",
        "_stop_token_ids",
        "finish_reason",
        "index",
        "is_plain",
        "is_stream_done",
        "last_token_s",
        "metrics",
        "num_reasoning_tokens",
        "num_tokens",
        "parser",
    )

    def __init__(self, plan: Plan, detokenizer: Detokenizer, index: int = 0) -> None:
        self.index = index
        self._detokenizer = detokenizer
        self._prompt = plan.requests[index].prompt_token_ids if plan.echoes else []  # until it was sent
        if plan.continues_prompt and not plan.echoes:
            detokenizer.push(plan.requests[index].prompt_token_ids)
        self._logprobs = None if plan.num_logprobs is None else LogprobTrack(plan.num_logprobs)
        self._num_decoded = 0  # characters, what a stop string cuts off included
        self._num_sent = 0  # characters
        self._is_cut = False  # by a stop string
        self._scanner = StopScanner(plan.stops, include_stop=plan.include_stop) if plan.stops else None
        self.parser = AnswerParser(plan.format, plan.requests[index].request_id) if plan.format else None
        self._min_tokens = plan.requests[0].sampling.min_tokens
        self._stop_token_ids = frozenset(plan.requests[0].sampling.stop_token_ids)
        self._pending: list[int] = []  # the newest token if it may be a stop token whose finish reason is still to come
        self._shows_stop = plan.include_stop
        self._only_prompt = plan.only_prompt
        # Clients that score prompts (lm-eval) ask for one token and drop one entry from the end, whatever it was.
        self._stop_logprobs = self._logprobs if plan.continues_prompt and not plan.only_prompt else None
        self.is_plain = not (self._prompt or self._logprobs or self._scanner or self.parser or self._only_prompt)
        self.num_tokens = 0
        self.last_token_s = 0.0
        self.num_reasoning_tokens = 0
        self.finish_reason: FinishReason | None = None
        self.is_stream_done = False
        self.metrics: RequestMetrics | None = None

    def push(self, event: TokenEvent) -> str:
        """Return the text that became certain. Nothing is pushed once finish_reason is set. Raises ServerFault."""
        if event.metrics is not None:
            self.metrics = event.metrics
        if self._only_prompt:
            event = _without_tokens(event)
        token_ids = event.token_ids
        if (
            self.is_plain
            and event.finish_reason is None
            and not self._pending
            and token_ids
            and token_ids[-1] not in self._stop_token_ids
        ):  # as mostly: nothing is held back
            self.num_tokens += len(token_ids)
            return self._detokenizer.push(token_ids)
        text = self._echo(event) if self._prompt else ""
        if self._logprobs is not None:
            self._logprobs.receive(event.token_ids, event.logprobs)
        text += self._push(event)
        self._num_sent += len(text)
        return text

    @property
    def told_reason(self) -> str | None:
        """OpenAI's name of the finish reason. One that made calls did so to its end, and ended by itself."""
        if self.parser is None or self.finish_reason is not FinishReason.STOP or self._is_cut:
            return self.finish_reason
        return "tool_calls" if self.parser.has_whole_calls else self.finish_reason

    def take_logprobs(self) -> Sequence[TokenLogprob]:
        """Those of the text that `push` has returned."""
        if self._logprobs is None:
            return ()
        return self._logprobs.take(None if self.finish_reason is not None and not self._is_cut else self._num_sent)

    def _push(self, event: TokenEvent) -> str:
        token_ids = self._pending + event.token_ids if self._pending else event.token_ids
        reason = event.finish_reason
        if reason is not None:
            self.is_stream_done = True
            self._pending = []
        elif token_ids:
            self._pending = token_ids[-1:] if token_ids[-1] in self._stop_token_ids else []
            token_ids = token_ids[:-1] if self._pending else token_ids
        num_hidden = 1 if reason is FinishReason.STOP and self._hides_last(token_ids) else 0
        visible = token_ids[:-1] if num_hidden else token_ids
        parser = self.parser
        if self._scanner is None and self._logprobs is None and (parser is None or not parser.can_be_reasoning):
            self.num_tokens += len(visible)
            text = self._detokenizer.push(visible)
            if parser is not None:
                parser.push(text)
        else:
            text = self._push_singly(visible)
            if self.finish_reason is not None:
                self._parse_end("")
                return text
        self.num_tokens += num_hidden
        if reason is None:
            return text
        self.finish_reason = reason
        text += self._flush()
        if num_hidden and self._stop_logprobs is not None:
            self._stop_logprobs.show(self._num_decoded)
        return text

    def _echo(self, event: TokenEvent) -> str:
        """The prompt's text, with the first event: its log probabilities come with it."""
        track, prompt, self._prompt = self._logprobs, self._prompt, []
        if track is None:
            text = self._detokenizer.push(prompt)
            self._num_decoded = len(text)
            return text
        track.receive(prompt[1:], event.prompt_logprobs)
        texts = []
        for i, token_id in enumerate(prompt):
            if i:
                track.show(self._num_decoded)
            else:
                track.show_first_of_prompt(token_id)
            texts.append(self._detokenizer.push((token_id,)))
            self._num_decoded += len(texts[-1])
        return "".join(texts)

    def _hides_last(self, token_ids: list[int]) -> bool:
        """The token that ended a generation is a marker, not part of the answer."""
        return bool(token_ids) and token_ids[-1] in self._stop_token_ids and not self._shows_stop

    def _push_singly(self, token_ids: list[int]) -> str:
        """One token at a time, so that counts end with the token that completed a stop string, or the reasoning."""
        texts = []
        for token_id in token_ids:
            self.num_tokens += 1
            if self._logprobs is not None:
                self._logprobs.show(self._num_decoded)
            text = self._detokenizer.push((token_id,))
            self._num_decoded += len(text)
            if self._scanner is not None and self.num_tokens >= self._min_tokens:  # before, text may hold stop strings
                text, self._is_cut = self._scanner.push(text)
            texts.append(text)
            if self.parser is not None:
                self._parse(self.parser, text)
            if self._is_cut:
                self.finish_reason = FinishReason.STOP
                break
        return "".join(texts)

    def _parse(self, parser: AnswerParser, text: str) -> None:
        """The text of one token."""
        was_reasoning = parser.is_reasoning
        parser.push(text)
        self.num_reasoning_tokens += was_reasoning or parser.is_reasoning

    def _parse_end(self, text: str) -> None:
        if self.parser is not None:
            self.parser.push(text)
            self.parser.finish()

    def _flush(self) -> str:
        text = self._detokenizer.flush()
        self._num_decoded += len(text)
        if self._scanner is not None:
            text, self._is_cut = self._scanner.push(text)
            if not self._is_cut:
                text += self._scanner.flush()
            elif self.finish_reason is FinishReason.LENGTH:
                self.finish_reason = FinishReason.STOP
        self._parse_end(text)
        return text


def _without_tokens(event: TokenEvent) -> TokenEvent:
    reason = FinishReason.LENGTH if event.finish_reason is FinishReason.STOP else event.finish_reason
    return msgspec.structs.replace(event, token_ids=[], logprobs=None, finish_reason=reason)
