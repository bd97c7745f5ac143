"""Constrained decoding: what the grammar of each sequence allows next, found by the host while the device computes.

The mask for a token needs the token before it. So a sequence with a grammar is held (`Sequence.is_held`) from the
launch of a step that samples it until that token was read and the mask for the next one is there; meanwhile steps
compute others. Masks of all sequences that were read together are filled by llguidance's threads, in one call that
does not hold the GIL, and that a step waits for, a moment and once. Where it takes longer, its sequences miss steps,
and are parted among several calls from then on, which no step waits for, until these are quick: so a sequence with
slow masks is soon alone.

Drafts (`speculative.py`) get a mask behind each of them, as far as the grammar takes them; what it forces is the best
draft there is.

The state of a grammar is a function of the tokens generated so far: it is made anew from them where a request is
resumed, and a preempted sequence keeps it. Where text could end, the request's own end tokens are allowed, and only
there. A grammar that has come to its end ends the request without one.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence as SequenceOf
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, takewhile
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from llguidance import LLExecutor, LLMatcher

from nibble.engine.protocol import FinishReason, GrammarSpec
from nibble.engine.sequence import Sequence
from nibble.engine.token_events import Ending, nothing_left
from nibble.grammar.compiler import GrammarCompiler
from nibble.grammar.errors import GrammarError
from nibble.grammar.threads import deep_stack_pool
from nibble.kernels.slots import BITS, mask_words

MAX_THREADS = 8  # a mask takes some 40 us, so these do 256 of them in about a millisecond
PATIENCE_S = 0.005  # that a step waits for masks; sequences whose masks take longer miss it
NUM_SLOW_CALLS = 8  # that slow masks are parted into: few, as each costs some 30 us of the GIL
IDLE_WAIT_S = 0.1
_COMPLETE = ("NoExtension", "NoExtensionBias", "EndOfSentence")  # reasons of llguidance to stop


@dataclass(frozen=True, slots=True)
class _Constraint:
    """matcher: a thread that fills masks uses it alone until it is done."""

    matcher: LLMatcher
    end_ids: list[int]  # that end the request and are no text


@dataclass(frozen=True, slots=True)
class _Work:
    """The masks of a sequence to be filled: of its next token, and behind each draft that the grammar takes."""

    sequence: Sequence
    constraint: _Constraint
    num_to_end: int  # tokens before its end tokens may be drawn
    drafts: list[int] = field(default_factory=list)
    max_forced: int = 0  # drafts that the grammar may add where it leaves no choice


@dataclass(frozen=True, slots=True)
class _Result:
    """masks: of the sequence's next token and behind its drafts, or the sequence has an ending. is_slow: they, or
    others of the same call, took longer than steps wait."""

    sequence: Sequence
    constraint: _Constraint | None
    ending: Ending | None
    masks: npt.NDArray[np.int32] | None = None
    drafts: list[int] = field(default_factory=list)
    is_slow: bool = False


class _Path(NamedTuple):
    """Drafts that a grammar takes; is_accepting: whether the text could end before the first and behind each."""

    drafts: list[int]
    is_accepting: list[bool]


class Constraints:
    """The grammars of one engine's sequences. One caller at a time; its threads see no sequence, only matchers."""

    def __init__(self, compiler: GrammarCompiler) -> None:
        self._compiler = compiler
        self._num_words = mask_words(compiler.vocab_size)
        self._constraints: dict[Sequence, _Constraint | None] = {}  # None: it is being compiled
        self._compiling: set[Future[list[_Result]]] = set()
        self._filling: set[Future[list[_Result]]] = set()
        self._late: set[Future[list[_Result]]] = set()  # of these, what steps do not wait for any more
        self._slow: set[Sequence] = set()
        self._to_fill: list[tuple[Sequence, _Constraint]] = []

    def warm_up(self) -> None:
        """Build the tokenizer, so that the first request does not wait for it. Returns at once."""
        self._compile_pool.submit(lambda: self._compiler.tokenizer)

    def start(self, sequence: Sequence) -> None:
        """Hold a new sequence until its grammar is compiled and has seen the tokens generated before."""
        spec = sequence.request.grammar
        assert spec is not None, "a sequence without a grammar is not constrained"
        sequence.is_held = True
        self._constraints[sequence] = None
        generated = sequence.token_ids[sequence.num_prompt_tokens :]
        self._compiling.add(self._compile_pool.submit(self._compile, sequence, spec, generated))

    def forget(self, sequence: Sequence) -> None:
        """It has ended. Others are ignored."""
        self._constraints.pop(sequence, None)
        self._slow.discard(sequence)

    def read(self, sampled: SequenceOf[tuple[Sequence, list[int]]]) -> dict[Sequence, Ending]:
        """Show tokens that were read, before they are appended, to their grammars. Those that come to their end."""
        constrained = [
            (sequence, constraint, _text(sequence, token_ids))
            for sequence, token_ids in sampled
            if token_ids and (constraint := self._constraints.get(sequence)) is not None
        ]
        for i in range(max((len(text) for _, _, text in constrained), default=0)):
            pairs = [(constraint.matcher, text[i]) for _, constraint, text in constrained if i < len(text)]
            self._executor.consume_token_par(pairs)
        endings = {}
        for sequence, constraint, text in constrained:
            if text and constraint.matcher.is_stopped():
                endings[sequence] = _ending_of(constraint.matcher)
            elif text:
                self._to_fill.append((sequence, constraint))
        return endings

    def may_end(self, sequence: Sequence) -> bool:
        """Whether the text of a sequence is complete as it is; no mask of it is being filled."""
        constraint = self._constraints.get(sequence)
        return constraint is not None and constraint.matcher.is_accepting()

    def fill(self, max_forced: int = 0) -> None:
        """Begin to fill the masks of those that were read and have not ended, and of their drafts. A grammar may add
        max_forced drafts."""
        works = []
        for sequence, constraint in self._to_fill:
            if sequence in self._constraints:
                num_to_end = sequence.request.sampling.min_tokens - sequence.num_read_tokens
                works.append(
                    _Work(
                        sequence,
                        constraint,
                        num_to_end,
                        _text(sequence, sequence.drafts),
                        min(max_forced, sequence.max_drafts),
                    )
                )
        self._to_fill = []
        slow = [work for work in works if work.sequence in self._slow]
        if len(slow) < len(works):
            quick = [work for work in works if work.sequence not in self._slow]
            self._filling.add(self._mask_pool.submit(self._fill, quick))
        for i in range(min(NUM_SLOW_CALLS, len(slow))):
            self._late.add(self._mask_pool.submit(self._fill, slow[i::NUM_SLOW_CALLS]))
        self._filling |= self._late

    def settle(self, is_idle: bool) -> dict[Sequence, Ending]:
        """Release the sequences whose masks are there; those that have an ending are returned instead.

        Waits for masks for a while, and where there is nothing else to do, is_idle, for grammars as well.
        """
        if awaited := self._filling - self._late:
            wait(awaited, PATIENCE_S)
        if is_idle and (under_way := self._filling | self._compiling):
            wait(under_way, IDLE_WAIT_S, FIRST_COMPLETED)
        endings = {}
        for futures in (self._filling, self._compiling):
            for future in [future for future in futures if future.done()]:
                futures.remove(future)
                for result in future.result():
                    if result.sequence not in self._constraints:  # it ended meanwhile
                        continue
                    if result.ending is not None:
                        endings[result.sequence] = result.ending
                    self._constraints[result.sequence] = result.constraint
                    result.sequence.set_masks(result.masks)
                    result.sequence.drafts = result.drafts
                    result.sequence.is_held = False
                    (self._slow.add if result.is_slow else self._slow.discard)(result.sequence)
        self._late = {*self._filling}
        return endings

    @cached_property
    def _compile_pool(self) -> ThreadPoolExecutor:
        return deep_stack_pool(1, "grammar-compile")

    @cached_property
    def _mask_pool(self) -> ThreadPoolExecutor:
        return deep_stack_pool(1 + NUM_SLOW_CALLS, "grammar-mask")

    @cached_property
    def _executor(self) -> LLExecutor:
        return LLExecutor(min(MAX_THREADS, os.cpu_count() or 1))

    def _compile(self, sequence: Sequence, spec: GrammarSpec, generated: list[int]) -> list[_Result]:
        """In a thread. The sequence is a mere name there."""
        if sequence not in self._constraints:  # it ended while it waited for others
            return []
        try:
            matcher = self._compiler.matcher(spec)
            is_special = self._compiler.tokenizer.is_special_token
        except GrammarError as error:
            return [_Result(sequence, None, Ending(FinishReason.ERROR, f"the grammar is refused: {error}"))]
        sampling = sequence.request.sampling
        matcher.consume_tokens(generated)
        constraint = _Constraint(matcher, [token_id for token_id in sampling.stop_token_ids if is_special(token_id)])
        return self._fill([_Work(sequence, constraint, sampling.min_tokens - len(generated))])

    def _fill(self, works: list[_Work]) -> list[_Result]:
        """In a thread. The sequences are mere names there."""
        started_s = time.perf_counter()
        paths = [self._path(work) for work in works]
        firsts = [0, *accumulate(1 + len(path.drafts) for path in paths)]
        masks = np.zeros((firsts[-1], self._num_words), np.int32)
        jobs = [(w.constraint.matcher, i, path.drafts) for w, i, path in zip(works, firsts, paths, strict=False)]
        target = (masks.ctypes.data, masks.strides[0], len(masks))
        if plain := [(matcher, i) for matcher, i, drafts in jobs if not drafts]:
            self._executor.unsafe_compute_mask_ptr(plain, *target)
        if drafted := [job for job in jobs if job[2]]:
            self._executor.unsafe_compute_mask_ptr_with_draft_token(drafted, *target)
        is_slow = time.perf_counter() - started_s > PATIENCE_S
        return [
            self._result(work, path, masks[i : i + 1 + len(path.drafts)], is_slow)
            for work, path, i in zip(works, paths, firsts, strict=False)
        ]

    def _path(self, work: _Work) -> _Path:
        """Follow the drafts as far as the grammar takes them and does not end with them."""
        matcher, drafts = work.constraint.matcher, work.drafts
        if work.max_forced and (forced := matcher.compute_ff_tokens()[: work.max_forced]) != drafts[: len(forced)]:
            drafts = forced
        path, num_consumed = _Path([], [matcher.is_accepting()]), 0
        for token_id in drafts[: matcher.validate_tokens(drafts)] if drafts else ():
            if token_id in self._compiler.tokenizer.eos_tokens or not matcher.consume_token(token_id):
                break
            num_consumed += 1
            if matcher.is_stopped():
                break
            path.drafts.append(token_id)
            path.is_accepting.append(matcher.is_accepting())
        matcher.rollback(num_consumed)
        return path

    def _result(self, work: _Work, path: _Path, masks: npt.NDArray[np.int32], is_slow: bool) -> _Result:
        matcher = work.constraint.matcher
        if matcher.is_stopped():
            return _Result(work.sequence, work.constraint, _ending_of(matcher))
        num_masks = 0
        for mask, is_accepting in zip(masks, path.is_accepting, strict=True):
            for token_id in self._compiler.tokenizer.eos_tokens:
                _set(mask, token_id, False)
            if num_masks and not mask.any():
                break  # the grammar may have ended, which it says when it has read the draft
            for token_id in work.constraint.end_ids if num_masks >= work.num_to_end else ():
                _set(mask, token_id, is_accepting)
            if not mask.any():
                break
            num_masks += 1
        if num_masks:
            drafts = path.drafts[: num_masks - 1]
            return _Result(work.sequence, work.constraint, None, masks[:num_masks], drafts, is_slow)
        ending = Ending(FinishReason.STOP) if path.is_accepting[0] else nothing_left(("grammar",))
        return _Result(work.sequence, work.constraint, ending)


def _text(sequence: Sequence, token_ids: list[int]) -> list[int]:
    """Of these tokens what is text: one that ends its request is not the grammar's, nor is what follows it."""
    stop_ids = sequence.request.sampling.stop_token_ids
    return list(takewhile(lambda token_id: token_id not in stop_ids, token_ids))


def _ending_of(matcher: LLMatcher) -> Ending:
    """Of a matcher that is stopped: its text is complete, or it ran into a limit."""
    if not matcher.is_error() and matcher.stop_reason() in _COMPLETE:
        return Ending(FinishReason.STOP)
    message = matcher.get_error().partition("\n")[0] or matcher.stop_reason()
    return Ending(FinishReason.ERROR, f"the grammar cannot be followed any further: {message}")


def _set(mask: npt.NDArray[np.int32], token_id: int, value: bool) -> None:
    bits = mask.view(np.uint32)
    bit = np.uint32(1 << token_id % BITS)
    if value:
        bits[token_id // BITS] |= bit
    else:
        bits[token_id // BITS] &= ~bit
