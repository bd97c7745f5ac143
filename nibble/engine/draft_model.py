"""Drafts from a small model of the same tokenizer, which generates ahead of the large one.

For each sequence there is a mirror: the same request to the small model, whose tokens are made those of the sequence
each time before it goes on. It draws with the sequence's own random numbers (seed and index of the token), so that two
distributions that are alike give the same token more often than two independent draws would.

The keys and values of drafts that turned out wrong are written over: a mirror counts as computed up to the first token
that it did not foresee. Mirrors have blocks of their own, as many as the large model; where they do not suffice, the
mirror that was not used for longest starts anew.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from nibble.engine.batch import Batch, Chunk
from nibble.engine.block_manager import BlockManager
from nibble.engine.errors import DraftModelError
from nibble.engine.limits import EngineLimits, SpeculationMethod
from nibble.engine.model_runner import ModelRunner
from nibble.engine.protocol import SamplingParams
from nibble.engine.scheduler import next_chunk
from nibble.engine.sequence import Sequence
from nibble.engine.speculative import SYNCHRONOUS, NgramDrafter, Speculation, StepCost, asynchronous_cost


@dataclass(slots=True)
class _Mirror:
    """num_agreed: its first tokens that are the sequence's, as far as was looked."""

    sequence: Sequence
    num_agreed: int = 0

    def follow(self, token_ids: list[int]) -> None:
        """Have these tokens, of which one at least is to be computed."""
        mine, agreed = self.sequence.token_ids, self.num_agreed
        while agreed < min(len(mine), len(token_ids)) and mine[agreed] == token_ids[agreed]:
            agreed += 1
        mine[agreed:] = token_ids[agreed:]
        self.sequence.num_computed_tokens = min(self.sequence.num_computed_tokens, agreed, len(token_ids) - 1)
        self.num_agreed = len(token_ids)


class DraftModel:
    """A `Drafter`. Sequences that are longer than the small model's context get no drafts."""

    def __init__(self, runner: ModelRunner, vocab_size: int, max_prompt_tokens: int) -> None:
        """vocab_size: the large model's. max_prompt_tokens: that are computed before drafts are due; a sequence with
        a longer prompt gets its first drafts some steps later."""
        self._runner = runner
        self._blocks = BlockManager(runner.num_blocks)
        self._num_ids = min(vocab_size, runner.model.config.vocab_size)  # either may have more, of no meaning
        self._max_context_tokens = runner.model.config.max_context_tokens
        self._max_prompt_tokens = max_prompt_tokens
        self._mirrors: OrderedDict[Sequence, _Mirror] = OrderedDict()  # the least recently used first

    def propose(self, wishes: Mapping[Sequence, int]) -> list[list[int]]:
        """Greedily where the sequence is greedy, else as it samples."""
        for sequence in wishes:
            if sequence in self._mirrors:
                self._mirrors.move_to_end(sequence)
        ready = {sequence: count for sequence, count in wishes.items() if self._prepare(sequence, count, wishes)}
        self._generate(ready)
        return [self._drafts(sequence) if sequence in ready else [] for sequence in wishes]

    def is_promising(self, sequence: Sequence) -> bool:
        return len(sequence.token_ids) < self._max_context_tokens

    def forget(self, sequence: Sequence) -> None:
        mirror = self._mirrors.pop(sequence, None)
        if mirror is not None:
            self._blocks.release(mirror.sequence.block_table)

    def _prepare(self, sequence: Sequence, count: int, wishes: Mapping[Sequence, int]) -> bool:
        """Whether the sequence's mirror can go on for so many tokens."""
        token_ids, num_tokens = sequence.token_ids, len(sequence.token_ids) + count
        if num_tokens > self._max_context_tokens:
            return False
        mirror = self._mirrors.get(sequence)
        if mirror is None:
            num_prefill_tokens = self._runner.kernels.num_prefill_tokens(sequence.num_prompt_tokens)
            mirror = _Mirror(_mirrored(sequence, self._max_context_tokens, num_prefill_tokens))
            self._mirrors[sequence] = mirror
        if max(token_ids[mirror.num_agreed :], default=0) >= self._num_ids:
            return False
        mirror.follow(token_ids)
        table = mirror.sequence.block_table
        while not self._blocks.can_grow(table, num_tokens):
            oldest = next(iter(self._mirrors))
            if oldest in wishes:
                return False
            self.forget(oldest)
        self._blocks.grow(table, num_tokens)
        return True

    def _generate(self, counts: Mapping[Sequence, int]) -> None:
        """So many tokens behind each sequence's, by its mirror; fewer where its prompt takes long."""
        stops = {self._mirrors[each].sequence: (each, len(each.token_ids) + count) for each, count in counts.items()}
        budget = self._max_prompt_tokens
        while True:
            batch = Batch(prefill=[], decode=[])
            for mirror, (_, stop) in stops.items():
                if len(mirror.token_ids) == stop or not (mirror.is_decoding or budget):
                    continue
                chunk = Chunk(mirror, 1, 1) if mirror.is_decoding else next_chunk(mirror, budget)
                budget -= 0 if mirror.is_decoding else chunk.num_tokens
                (batch.prefill if mirror.is_prefilling else batch.decode).append(chunk)
            if not batch.chunks:
                return
            for mirror, token_ids in self._runner.collect(self._runner.launch(batch)):
                if token_ids:
                    mirror.append(token_ids, 0.0)
                else:  # its logits were not finite
                    self.forget(stops.pop(mirror)[0])

    def _drafts(self, sequence: Sequence) -> list[int]:
        mirror = self._mirrors.get(sequence)
        drafts = [] if mirror is None else mirror.sequence.token_ids[len(sequence.token_ids) :]
        num_known = next((i for i, token_id in enumerate(drafts) if token_id >= self._num_ids), len(drafts))
        return drafts[:num_known]


def make_speculation(runner: ModelRunner, draft_runners: list[ModelRunner], limits: EngineLimits) -> Speculation | None:
    """As limits say; draft_runners: that of the draft model, if there is one."""
    if limits.speculation is SpeculationMethod.OFF:
        return None
    if not draft_runners:
        return Speculation(NgramDrafter(), limits.num_drafts, step_cost(runner))
    (draft_runner,) = draft_runners
    max_prompt_tokens = max(1, limits.max_num_batched_tokens - limits.max_num_sequences)
    drafter = DraftModel(draft_runner, runner.model.config.vocab_size, max_prompt_tokens)
    return Speculation(drafter, limits.num_drafts, step_cost(runner, draft_runner))


def step_cost(runner: ModelRunner, draft_runner: ModelRunner | None = None) -> StepCost:
    """Of the model's steps, and those of its draft model."""
    if runner.kernels.is_asynchronous:
        return asynchronous_cost(runner.measure_step(), draft_runner.measure_step() if draft_runner else 0.0)
    # Both read all their weights for a token of every sequence.
    draft = draft_runner.model.weight_bytes / runner.model.weight_bytes if draft_runner else 0.0
    return replace(SYNCHRONOUS, draft=draft)


def _mirrored(sequence: Sequence, max_context_tokens: int, num_prefill_tokens: int) -> Sequence:
    """The same request without what only its own model can do, and without an end."""
    sampling = sequence.request.sampling
    request = msgspec.structs.replace(
        sequence.request,
        sampling=SamplingParams(
            max_tokens=max_context_tokens,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            seed=sampling.seed,
        ),
        grammar=None,
    )
    return Sequence.start(request, [], max_context_tokens, 0.0, num_prefill_tokens)


def check_same_tokenizer(tokenizer_file: Path, draft_tokenizer_file: Path) -> None:
    """Raises DraftModelError where the same ids stand for different tokens."""
    tokens = []
    for path in (tokenizer_file, draft_tokenizer_file):
        try:
            content = json.loads(path.read_bytes())
            added = {token["content"]: token["id"] for token in content.get("added_tokens", ())}
            tokens.append((content["model"]["vocab"], added))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DraftModelError(f"{path} of the draft model's pair cannot be read: {error!r}") from error
    if tokens[0] != tokens[1]:
        raise DraftModelError(f"{draft_tokenizer_file} has other tokens than {tokenizer_file}")
