"""Drafts of a second model: right ones where both models agree, the same tokens in any case."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from late_kernels import LateKernels
from tiny_models import make_tiny_llama
from tiny_tokenizer import write_tiny_tokenizer

from nibble.engine.draft_model import DraftModel
from nibble.engine.errors import DraftModelError
from nibble.engine.limits import EngineLimits, SpeculationMethod
from nibble.engine.llm_engine import LLMEngine
from nibble.engine.protocol import GenerationRequest, GrammarKind, GrammarSpec, SamplingParams
from nibble.engine.sequence import Sequence
from nibble.kernels.cpu.backend import CPUKernels

VOCAB_SIZE = 300
BLOCK_BYTES = 2 * 2 * (2 * 64 * 32 + 2 * 64 * 4)  # two layers, two KV heads of 32
PLENTY = 200 * BLOCK_BYTES


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model, and another one of half its layers, with a shorter context and a larger vocabulary."""
    large, small = tmp_path_factory.mktemp("large"), tmp_path_factory.mktemp("small")
    make_tiny_llama(large, vocab_size=VOCAB_SIZE, max_context_tokens=256)
    make_tiny_llama(small, vocab_size=VOCAB_SIZE + 8, num_layers=1, max_context_tokens=192, seed=0)
    for directory in (large, small):
        write_tiny_tokenizer(directory)
    return large, small


@pytest.fixture(params=[CPUKernels, LateKernels], ids=["synchronous", "asynchronous"])
def kernels(request: pytest.FixtureRequest) -> Iterator[CPUKernels]:
    backend = request.param(num_threads=2)
    yield backend
    backend.close()


def engine_of(
    directory: Path,
    kernels: CPUKernels,
    draft_model_dir: Path | None,
    kv_cache_bytes: int = PLENTY,
    max_sequences: int = 8,
) -> LLMEngine:
    method = SpeculationMethod.OFF if draft_model_dir is None else SpeculationMethod.DRAFT_MODEL
    limits = EngineLimits(
        kv_cache_bytes,
        max_num_sequences=max_sequences,
        max_num_batched_tokens=64,
        speculation=method,
        draft_model_dir=draft_model_dir,
    )
    engine = LLMEngine.from_checkpoint(directory, kernels, limits)
    if engine.speculation is not None:  # two models of a size: no draft would ever be worth its time
        engine.speculation._cost = type(engine.speculation._cost)(token=0.02, wait=0.0, draft=0.0)
    return engine


def requests(count: int) -> list[GenerationRequest]:
    rng = np.random.default_rng(0)
    made = []
    for i in range(count):
        sampling = SamplingParams(max_tokens=int(rng.integers(20, 80)), temperature=[0.0, 0.5, 1.0][i % 3], seed=i)
        prompt = rng.integers(0, 260, rng.integers(1, 150)).tolist()
        made.append(
            GenerationRequest(request_id=str(i), prompt_token_ids=prompt, sampling=sampling, arrival_s=float(i))
        )
    return made


def run(
    engine: LLMEngine, waiting: list[GenerationRequest], join: Callable[[], bool] = lambda: True
) -> dict[str, list[int]]:
    outputs: dict[str, list[int]] = {}
    waiting = list(waiting)
    while engine.has_unfinished or waiting:
        while waiting and join():
            outputs[waiting[0].request_id] = []
            engine.add(waiting.pop(0))
        for event in engine.step():
            outputs[event.request_id] += event.token_ids
    return outputs


def drafter_of(engine: LLMEngine) -> DraftModel:
    assert engine.speculation is not None
    assert isinstance(engine.speculation.drafter, DraftModel)
    return engine.speculation.drafter


def check_nothing_is_left(engine: LLMEngine) -> None:
    drafter = drafter_of(engine)
    assert not drafter._mirrors
    drafter._blocks.check_integrity([])


def test_a_model_foresees_all_of_its_own_tokens_sampled_or_greedy(
    models: tuple[Path, Path], kernels: CPUKernels
) -> None:
    """So mirrors have the right keys and values, positions and random numbers."""
    wanted = run(engine_of(models[0], kernels, None), requests(9))
    engine = engine_of(models[0], kernels, models[0])
    outputs: dict[str, list[int]] = {}
    for each in requests(9):
        outputs |= run(engine, [each])
    assert outputs == wanted
    stats = engine.stats
    assert stats.num_draft_tokens == stats.num_accepted_tokens > 0.7 * stats.num_generated_tokens
    check_nothing_is_left(engine)


@pytest.mark.parametrize("seed", range(3))
def test_another_model_changes_no_token_in_any_traffic(
    models: tuple[Path, Path], kernels: CPUKernels, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    wanted = run(engine_of(models[0], kernels, None), requests(12))
    num_blocks = int(rng.integers(5, 8))
    engine = engine_of(models[0], kernels, models[1], num_blocks * BLOCK_BYTES * 3 // 2, int(rng.integers(2, 9)))
    assert run(engine, requests(12), lambda: rng.random() < 0.1) == wanted
    stats = engine.stats
    assert 0 < stats.num_accepted_tokens < stats.num_draft_tokens
    check_nothing_is_left(engine)


def test_after_wrong_drafts_a_mirror_is_what_a_new_one_would_be(models: tuple[Path, Path]) -> None:
    """Whatever was guessed in between, and with too few blocks for all mirrors."""
    rng = np.random.default_rng(1)
    large, small = models
    kernels = CPUKernels(num_threads=2)
    old = drafter_of(engine_of(large, kernels, small, 8 * BLOCK_BYTES * 3 // 2))
    new = drafter_of(engine_of(large, kernels, small))
    owners = [sequence(each) for each in requests(6)]
    for _ in range(25):
        wishes = {owner: int(rng.integers(1, 8)) for owner in owners if rng.random() < 0.4}
        drafts = last_of(old, wishes)
        for (owner, count), proposed in zip(wishes.items(), drafts, strict=True):
            (expected,) = last_of(new, {owner: count})
            new.forget(owner)
            assert proposed in (expected, [])
            owner.token_ids += proposed[: rng.integers(len(proposed) + 1)] + rng.integers(0, 260, 1).tolist()
        old._blocks.check_integrity([mirror.sequence.block_table for mirror in old._mirrors.values()])
    assert len(old._mirrors) < len(owners)
    kernels.close()


def last_of(drafter: DraftModel, wishes: dict[Sequence, int]) -> list[list[int]]:
    """Long prompts are computed piece by piece."""
    for _ in range(4):
        drafts = drafter.propose(wishes)
    return drafts


def sequence(request: GenerationRequest, num_more: int = 0) -> Sequence:
    return Sequence.start(request, [5] * num_more, 256, 0.0)


def test_what_the_small_model_cannot_hold_gets_no_drafts(models: tuple[Path, Path], kernels: CPUKernels) -> None:
    large, small = models
    drafter = drafter_of(engine_of(large, kernels, small))
    request = requests(1)[0]
    room = 192 - len(request.prompt_token_ids)
    full, fitting = sequence(request, room - 2), sequence(request, room - 3)
    for _ in range(5):
        drafts = drafter.propose({full: 3, fitting: 3})
    assert [len(each) for each in drafts] == [0, 3]
    # The other way round the small model has ids that the large one has not, and the other way round.
    drafter._num_ids = 10
    assert drafter.propose({sequence(request): 3}) == [[]]
    drafter._num_ids = max(fitting.token_ids) + 1
    drafts = drafter.propose({fitting: 3})
    assert all(token_id < drafter._num_ids for token_id in drafts[0])


def test_long_prompts_are_computed_over_several_steps(models: tuple[Path, Path], kernels: CPUKernels) -> None:
    drafter = drafter_of(engine_of(*models[:1], kernels, models[1]))
    owner = sequence(
        GenerationRequest(
            request_id="a", prompt_token_ids=[7] * 150, sampling=SamplingParams(max_tokens=9), arrival_s=0.0
        )
    )
    budget = 64 - 8
    sizes = [len(drafter.propose({owner: 2})[0]) for _ in range(4)]
    assert sizes == [0] * (150 // budget) + [2] * (4 - 150 // budget)


def test_grammars_cut_what_the_small_model_says(models: tuple[Path, Path], kernels: CPUKernels) -> None:
    grammar = GrammarSpec(GrammarKind.REGEX, "(abc|abd){3,}e?")
    sampling = SamplingParams(max_tokens=40, temperature=0.9, seed=3, stop_token_ids=(2,))
    each = GenerationRequest(request_id="a", prompt_token_ids=[3, 4], sampling=sampling, arrival_s=0.0, grammar=grammar)
    wanted = run(engine_of(models[0], kernels, None), [each])
    assert run(engine_of(models[0], kernels, models[0]), [each]) == wanted


def test_a_draft_model_of_another_tokenizer_is_refused(
    models: tuple[Path, Path], kernels: CPUKernels, tmp_path: Path
) -> None:
    make_tiny_llama(tmp_path, vocab_size=VOCAB_SIZE, num_layers=1)
    with pytest.raises(DraftModelError, match="cannot be read"):
        engine_of(models[0], kernels, tmp_path)
    write_tiny_tokenizer(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(DraftModelError, match="has other tokens than"):
        engine_of(models[0], kernels, tmp_path)


def test_the_weights_decide_what_a_draft_costs(models: tuple[Path, Path], kernels: CPUKernels) -> None:
    limits = EngineLimits(PLENTY, speculation=SpeculationMethod.DRAFT_MODEL, draft_model_dir=models[0])
    engine = LLMEngine.from_checkpoint(models[0], kernels, limits)
    assert engine.speculation is not None
    assert engine.speculation.max_drafts(0.95, 1) == 0  # guessing takes as long as computing
    engine.speculation._cost = type(engine.speculation._cost)(token=0.1, wait=0.0, draft=0.1)
    assert 0 < engine.speculation.max_drafts(0.7, 1) < 7


def test_memory_is_planned_for_both_models(models: tuple[Path, Path]) -> None:
    kernels = LateKernels(total_bytes=200 << 20, num_threads=2)
    limits = EngineLimits(
        None, max_num_sequences=100, speculation=SpeculationMethod.DRAFT_MODEL, draft_model_dir=models[1],
        memory_utilization=0.6,
    )  # fmt: skip
    engine = LLMEngine.from_checkpoint(models[0], kernels, limits)
    drafter, used_bytes = drafter_of(engine), kernels.used_bytes
    assert drafter._blocks.num_blocks == engine.scheduler.block_manager.num_blocks
    assert engine.speculation is not None
    engine.speculation._cost = type(engine.speculation._cost)(token=0.02, wait=0.0, draft=0.0)
    run(engine, requests(5))
    assert engine.stats.num_draft_tokens > 0
    assert kernels.used_bytes == used_bytes
    kernels.close()
