"""How a device's memory is shared out, once, at start: weights, workspace, buffers, graphs, and the rest to KV blocks.

The workspace is what passes of every shape that a step can have were seen to use; buffers are what they take with a KV
cache of one block. The largest graphs are captured over that to see what they take, and the others get as much: to
capture all of them twice would be a tenth of a start. After that no step allocates anything. A synchronous backend
works in the machine's memory, which is not the engine's alone: there the size of the KV cache is given, and nothing is
captured.
"""

from __future__ import annotations

import gc
import logging
from dataclasses import dataclass
from functools import partial

from nibble.engine.block_manager import num_blocks_for
from nibble.engine.errors import CapacityError
from nibble.engine.limits import EngineLimits
from nibble.engine.model import DecoderModel
from nibble.engine.model_runner import ModelRunner
from nibble.engine.pass_shapes import PassShape
from nibble.kernels.interface import Kernels, Mode
from nibble.kernels.layout import BLOCK_SIZE

logger = logging.getLogger(__name__)

IDLE_BLOCKS = 1  # the runner's own, beside those that sequences get
SLACK_BYTES = 32 << 20  # allocations are rounded up, by 2 MiB each at most


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of a device's memory at the end of the start. other: the driver's, loaded kernels, other processes."""

    total_bytes: int
    weight_bytes: int
    workspace_bytes: int
    graph_bytes: int  # and the runner's buffers
    kv_cache_bytes: int
    other_bytes: int
    free_bytes: int
    num_blocks: int
    num_swap_blocks: int  # in the host's memory

    def log(self) -> None:
        logger.info(
            "event=memory_planned total_bytes=%d weight_bytes=%d workspace_bytes=%d graph_bytes=%d kv_cache_bytes=%d "
            "kv_cache_blocks=%d kv_cache_tokens=%d other_bytes=%d free_bytes=%d swap_blocks=%d",
            self.total_bytes,
            self.weight_bytes,
            self.workspace_bytes,
            self.graph_bytes,
            self.kv_cache_bytes,
            self.num_blocks,
            self.num_blocks * BLOCK_SIZE,
            self.other_bytes,
            self.free_bytes,
            self.num_swap_blocks,
        )


def make_runners(kernels: Kernels, models: list[DecoderModel], limits: EngineLimits) -> list[ModelRunner]:
    """Runners with all their memory, warm. The first model's is the engine's; another one is its draft model. Raises
    CapacityError.

    All have as many KV blocks, so that whatever the model holds its draft model can hold.
    """
    if not kernels.is_asynchronous:
        if limits.kv_cache_bytes is None:
            raise CapacityError("the size of the KV cache must be given where memory is shared with other processes")
        _, total_bytes = kernels.memory_info()
        if limits.kv_cache_bytes > total_bytes:  # the machine would promise it, and end the process later
            raise CapacityError(
                f"a KV cache of {limits.kv_cache_bytes} bytes is asked for, the machine has {total_bytes}"
            )
        return _make(kernels, models, limits, _num_blocks(limits.kv_cache_bytes, models))
    try:
        return _plan(kernels, models, limits)
    except MemoryError as error:
        weight_bytes = sum(model.weight_bytes for model in models)
        raise CapacityError(f"weights of {weight_bytes} bytes leave too little memory: {error}") from error


def _make(
    kernels: Kernels, models: list[DecoderModel], limits: EngineLimits, num_blocks: int, num_swap_blocks: int = 0
) -> list[ModelRunner]:
    """What only the engine's own needs, a draft model's has not: verified drafts, swapped blocks."""
    return [
        ModelRunner(
            kernels,
            model,
            num_blocks=num_blocks,
            max_sequences=limits.max_num_sequences,
            max_tokens=limits.max_num_batched_tokens,
            max_verified=0 if index else limits.max_verified,
            num_swap_blocks=0 if index else num_swap_blocks,
        )
        for index, model in enumerate(models)
    ]


def _plan(kernels: Kernels, models: list[DecoderModel], limits: EngineLimits) -> list[ModelRunner]:
    kernels.warm_up([model.kv_layout for model in models])
    workspace_bytes = kernels.fit_workspace(partial(_compute_every_shape, kernels, models, limits))
    free_bytes, total_bytes = kernels.memory_info()
    graph_bytes = _buffer_and_graph_bytes(kernels, models, limits, free_bytes)
    gc.collect()  # what was captured may refer to the runner that holds it
    num_blocks = _fit_kv_cache(total_bytes, total_bytes - free_bytes + graph_bytes, models, limits)
    num_swap_blocks = min(limits.swap_bytes // _block_bytes(models[:1]), num_blocks)
    runners = _make(kernels, models, limits, num_blocks, num_swap_blocks)
    for runner in runners:
        runner.capture()
        runner.reset_counters()
    _wait_for_swap_buffers(runners[0])
    weight_bytes = sum(model.weight_bytes for model in models)
    MemoryPlan(
        total_bytes=total_bytes,
        weight_bytes=weight_bytes,
        workspace_bytes=workspace_bytes,
        graph_bytes=graph_bytes,
        kv_cache_bytes=sum(int(runner.kv_cache.nbytes) for runner in runners),
        other_bytes=total_bytes - free_bytes - weight_bytes - workspace_bytes,
        free_bytes=kernels.memory_info()[0],
        num_blocks=num_blocks,
        num_swap_blocks=num_swap_blocks,
    ).log()
    return runners


def _buffer_and_graph_bytes(kernels: Kernels, models: list[DecoderModel], limits: EngineLimits, free_bytes: int) -> int:
    """At most so many, of runners without KV caches."""
    trials = _make(kernels, models, limits, num_blocks=0)
    num_bytes, kept = free_bytes - kernels.memory_info()[0], []
    for trial in trials:
        free_bytes = kernels.memory_info()[0]
        largest = trial.capture_largest()
        kept.append(largest)  # so that the next one's are measured beside it
        num_bytes += (free_bytes - kernels.memory_info()[0]) * trial.num_graphs // len(largest)
    return num_bytes


def _wait_for_swap_buffers(runner: ModelRunner) -> None:
    try:
        runner.swap_buffers.wait()
    except MemoryError as error:
        wanted = f"{runner.num_swap_blocks} blocks of the host's memory, for preempted sequences"
        raise CapacityError(f"{wanted}, cannot be page-locked: {error}") from error


def _block_bytes(models: list[DecoderModel]) -> int:
    """Of a block of each."""
    return sum(model.config.num_layers * model.kv_layout.block_bytes for model in models)


def _fit_kv_cache(total_bytes: int, used_bytes: int, models: list[DecoderModel], limits: EngineLimits) -> int:
    """Blocks that fit beside what is in use. Raises CapacityError."""
    block_bytes = _block_bytes(models)
    left_bytes = int(total_bytes * limits.memory_utilization) - used_bytes - SLACK_BYTES
    # More blocks than the sequences can fill are of no use.
    most = limits.max_num_sequences * num_blocks_for(models[0].config.max_context_tokens) + IDLE_BLOCKS
    wanted_bytes = min(left_bytes, most * block_bytes) if limits.kv_cache_bytes is None else limits.kv_cache_bytes
    if wanted_bytes > left_bytes:
        raise CapacityError(f"a KV cache of {wanted_bytes} bytes is asked for, {left_bytes} are left")
    if left_bytes < (1 + IDLE_BLOCKS) * block_bytes:
        raise CapacityError(
            f"{limits.memory_utilization:.0%} of {total_bytes} bytes of memory are to be used, {used_bytes} are "
            f"taken before the KV cache, of which one block takes {block_bytes}"
        )
    return _num_blocks(wanted_bytes, models)


def _num_blocks(kv_cache_bytes: int, models: list[DecoderModel]) -> int:
    block_bytes = _block_bytes(models)
    num_blocks = kv_cache_bytes // block_bytes - IDLE_BLOCKS
    if num_blocks < 1:
        needed_bytes = (1 + IDLE_BLOCKS) * block_bytes
        raise CapacityError(f"the least KV cache takes {needed_bytes} bytes, {kv_cache_bytes} are there for it")
    return num_blocks


def _compute_every_shape(kernels: Kernels, models: list[DecoderModel], limits: EngineLimits) -> None:
    """Passes of one layer (all layers use the same workspace) over every kind of shape that a step can have.

    What an op needs depends on shapes alone, and not always the more the longer: small numbers of tokens are split
    along the reduction. So every power of two is tried, with as few sequences as possible and with as many.
    """
    sizes = {1 << i for i in range(limits.max_num_batched_tokens.bit_length())} | {limits.max_num_batched_tokens}
    runners = _make(kernels, [model.first_layer() for model in models], limits, num_blocks=0)
    for runner, max_verified in zip(runners, (limits.max_verified, 0), strict=False):
        max_context_tokens = runner.model.config.max_context_tokens
        max_blocks = num_blocks_for(max_context_tokens)
        for num_tokens in sorted(sizes):
            fewest = -(-num_tokens // max_context_tokens)
            for num_sequences in {fewest, min(num_tokens, limits.max_num_sequences)}:
                num_samples = min(num_tokens, max(num_sequences, max_verified))
                shape = PassShape(num_tokens, num_sequences, max_blocks, num_samples, adjusts=True)
                for mode in Mode:
                    runner.compute_idle(shape, mode)
