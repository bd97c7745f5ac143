"""Speculative decoding: guesses of a sequence's next tokens, several of which one step verifies.

A step computes the newest token and the drafts behind it. The logits behind each of them are, bit for bit, those that
one token at a time gives (`Mode.DECODE`), and a token is drawn from its logits by a random number that follows from the
seed and its index (`SamplingKernels.sample`). So a token is drawn behind the newest one and behind every draft, and is
kept as long as all drafts before it are what was drawn there: the tokens are the very ones that would come without
drafts, greedy and sampled alike. That is more than the same distribution, and why there is no rejection sampling
(Leviathan et al., 2023; Chen et al., 2023) here. It would not accept more either: a draft is one guess, which it
accepts with the probability that the model gives it, and that is the probability that it is drawn.

How many drafts a sequence gets depends on what they cost and on how often they were right, see `Speculation`. Where
drafts come from is behind `Drafter`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

from nibble.engine.batch import MAX_VERIFIED_TOKENS
from nibble.engine.sequence import INITIAL_ACCEPTANCE, Sequence

MATCH_LENGTHS = (4, 3, 2)  # tokens; a longer match is a better reason to expect the same again
LEARNING_RATE = 0.2  # of acceptance, with each draft that is verified
FORCED_ACCEPTANCE = 0.95  # of what a grammar leaves no choice about, but how it is cut into tokens
RECOVERY_RATE = 0.005  # ... towards its initial value, with each token that there was no draft for


def verify(drafts: list[int], drawn: list[int]) -> list[int]:
    """The tokens that stand, of those drawn behind the newest token and behind each of the first len(drawn) - 1 drafts.

    At least one, unless nothing could be drawn (-1) behind the newest token. Where that happens behind an accepted
    draft, the draft is left to be the newest token.
    """
    count = 0
    while count < len(drawn) - 1 and drawn[count] == drafts[count]:
        count += 1
    return drawn[: count + 1] if drawn[count] >= 0 else drawn[:count]


class Drafter(Protocol):
    """Where drafts come from. Sequences are those of one engine, and their tokens are all read but in is_promising."""

    def propose(self, wishes: Mapping[Sequence, int]) -> list[list[int]]:
        """For each sequence, in order, at most so many tokens that may come next."""

    def is_promising(self, sequence: Sequence) -> bool:
        """Whether there will probably be drafts once a token that is still unread is known."""

    def forget(self, sequence: Sequence) -> None:
        """It has ended. Others are ignored."""


class NgramDrafter:
    """What followed the newest tokens the last time that they came, in the prompt or in what was generated.

    Source: Saxena, "Prompt Lookup Decoding" (2023).
    """

    def __init__(self) -> None:
        self._texts: dict[Sequence, str] = {}  # a character for each token id: what Python searches fastest

    def propose(self, wishes: Mapping[Sequence, int]) -> list[list[int]]:
        return [self._continue(sequence, count) for sequence, count in wishes.items()]

    def is_promising(self, sequence: Sequence) -> bool:
        return bool(self._continue(sequence, 1))

    def forget(self, sequence: Sequence) -> None:
        self._texts.pop(sequence, None)

    def _continue(self, sequence: Sequence, count: int) -> list[int]:
        token_ids = sequence.token_ids
        text = self._texts.get(sequence, "")
        self._texts[sequence] = text = text + "".join(map(chr, token_ids[len(text) :]))
        for length in MATCH_LENGTHS:
            start = text.rfind(text[-length:], 0, len(text) - 1)  # where they began when they came before
            if start >= 0:
                # As if it went on from there for ever: what repeats itself often has a short period.
                period = len(token_ids) - start - length
                return [token_ids[start + length + i % period] for i in range(count)]
        return []


@dataclass(frozen=True)
class StepCost:
    """How long steps take; the unit is a step of one token."""

    token: float  # each further token of a step
    wait: float = 0.0  # the device's, where a step's results are read before the next one is launched
    wait_sequence: float = 0.0  # ... and so much more for each sequence
    draft: float = 0.0  # one more draft for each sequence, before the step

    def of(self, num_tokens: int) -> float:
        return 1 + self.token * (num_tokens - 1)


# On two cores SmolLM2-135M decodes 8 sequences in 2.3 to 2.5 times the time of one.
SYNCHRONOUS = StepCost(token=0.2)
# On an H100 a step of Llama-3-8B's shape takes 2.06 ms for one sequence, 2.25 for 8 tokens, 2.86 for 32, 3.7 for 64.
# A step that is waited for takes longer than that by the host's work: 0.39 ms for one sequence, 0.71 for 8, 1.02 for
# 16, 1.45 for 32 (docs/performance.md).
_ASYNCHRONOUS_TOKEN = 0.0135
_WAIT_S = 0.36e-3
_WAIT_SEQUENCE_S = 0.036e-3


def asynchronous_cost(step_s: float, draft_step_s: float = 0.0) -> StepCost:
    """Of a device that computes a step of one token in step_s, and in draft_step_s with the draft model, if any."""
    return StepCost(
        token=_ASYNCHRONOUS_TOKEN,
        wait=_WAIT_S / step_s,
        wait_sequence=_WAIT_SEQUENCE_S / step_s,
        draft=(draft_step_s + _WAIT_S) / step_s if draft_step_s else 0.0,
    )


class Speculation:
    """Decides who gets how many drafts; step by step, as sequences come and go and drafts turn out right or wrong.

    A draft is worth its time where it is likelier to be right than a token is to be had in that time without it. So
    the more sequences there are, the surer a draft has to be, and with MAX_VERIFIED_TOKENS of them there are none. A
    sequence whose drafts were wrong gets fewer, then none; every token without one is a small step towards another try.

    On an asynchronous device the next step can only be launched when the drafts' fate is known. Sequences without a
    grammar then keep everybody's next step waiting, which has to be paid for by their drafts together: else they get
    none, and steps overlap as they do without speculation. Sequences with a grammar are waiting for their masks anyway.
    """

    def __init__(self, drafter: Drafter, num_drafts: int, cost: StepCost) -> None:
        """num_drafts: of a sequence in one step, at most."""
        self.drafter = drafter
        self.num_draft_tokens = 0  # verified
        self.num_accepted_tokens = 0  # ... and right
        self._num_drafts = num_drafts
        self._cost = cost

    def draft(self, sequences: list[Sequence], num_running: int) -> bool:
        """Give drafts to those whose tokens are all read. Whether the others' unread tokens should be waited for,
        so that they can have some. num_running: all that share steps."""
        known: list[Sequence] = []
        unread: list[Sequence] = []
        for sequence in sequences:
            (unread if sequence.num_unread_tokens else known).append(sequence)
        wishes = self._wishes(known, num_running)
        for sequence, drafts in zip(wishes, self.drafter.propose(wishes), strict=True):
            sequence.drafts = drafts
        free = {sequence: len(sequence.drafts) for sequence in wishes if sequence.request.grammar is None}
        if not self._pays(free, num_running):
            for sequence in free:
                sequence.drafts = []
        for sequence in sequences:
            if not sequence.drafts and sequence.acceptance < INITIAL_ACCEPTANCE:
                sequence.acceptance += RECOVERY_RATE * (INITIAL_ACCEPTANCE - sequence.acceptance)
        wishes = self._wishes([sequence for sequence in unread if sequence.request.grammar is None], num_running)
        promising = {sequence: count for sequence, count in wishes.items() if self.drafter.is_promising(sequence)}
        return self._pays(promising, num_running)

    def learn(self, sampled: Iterable[tuple[Sequence, list[int]]]) -> None:
        """What became of the drafts: the tokens that were read, which are not appended yet."""
        for sequence, token_ids in sampled:
            if sequence.drafts:
                self._learn(sequence, len(sequence.drafts), max(0, len(token_ids) - 1))

    def _learn(self, sequence: Sequence, num_drafts: int, num_accepted: int) -> None:
        self.num_draft_tokens += num_drafts
        self.num_accepted_tokens += num_accepted
        sequence.num_draft_tokens += num_drafts
        sequence.num_accepted_tokens += num_accepted
        sequence.acceptance = 1 - (1 - sequence.acceptance) * (1 - LEARNING_RATE) ** num_accepted
        if num_accepted < num_drafts:
            sequence.acceptance *= 1 - LEARNING_RATE

    def max_drafts(self, acceptance: float, num_running: int) -> int:
        """Drafts worth their time, each accepted so often if the one before it was."""
        if num_running >= MAX_VERIFIED_TOKENS:
            return 0
        least = (self._cost.token * num_running + self._cost.draft) / self._cost.of(num_running)
        count = 0
        while count < self._num_drafts and acceptance ** (count + 1) >= least:
            count += 1
        return count

    def _wishes(self, sequences: Iterable[Sequence], num_running: int) -> dict[Sequence, int]:
        """What they are worth, or as many for each as a step has room for."""
        wishes = {}
        for sequence in sequences:
            count = min(self.max_drafts(sequence.acceptance, num_running), sequence.max_drafts)
            if count > 0:
                wishes[sequence] = count
        room = MAX_VERIFIED_TOKENS - num_running
        if sum(wishes.values()) <= room:
            return wishes
        share = max(1, room // len(wishes))
        return {sequence: min(count, share) for sequence, count in islice(wishes.items(), room)}

    def _pays(self, num_drafts: Mapping[Sequence, int], num_running: int) -> bool:
        """Whether a step that is waited for, with so many drafts, gives more tokens in its time than one without."""
        num_accepted = sum(
            sequence.acceptance**i for sequence, count in num_drafts.items() for i in range(1, count + 1)
        )
        alone = self._cost.of(num_running)
        together = self._cost.of(num_running + sum(num_drafts.values()))
        together += self._cost.wait + self._cost.wait_sequence * num_running
        together += self._cost.draft * max(num_drafts.values(), default=0)
        return (num_running + num_accepted) * alone > num_running * together
