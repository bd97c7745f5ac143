"""The logits of every position of a sequence, as the engine computes them: its decoder, kernels and KV cache."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from nibble.engine.block_manager import num_blocks_for
from nibble.engine.model import DecoderModel, ForwardBatch
from nibble.kernels.interface import Array, AttentionBatch, Mode

CHUNK_TOKENS = 256  # computed at a time, with their logits: few enough for these, enough that launching is not the work


class SequenceLogits:
    """One model with a KV cache for one sequence."""

    def __init__(self, model: DecoderModel, max_tokens: int) -> None:
        """max_tokens: within the model's context. Raises MemoryError where the cache does not fit."""
        context_tokens = model.config.max_context_tokens
        assert max_tokens <= context_tokens, (
            f"sequences of {max_tokens} tokens, the model's context is {context_tokens}"
        )
        self._model = model
        self._kernels = kernels = model.kernels
        layout, config = model.kv_layout, model.config
        self._max_tokens, self._num_blocks = max_tokens, num_blocks_for(max_tokens)
        shape = (config.num_layers, self._num_blocks, layout.num_kv_heads, layout.head_block_bytes)
        self._kv_cache = kernels.zeros(shape, np.uint8)

    def probe(self) -> None:
        """Compute what needs as much room for temporaries as anything that is computed."""
        self._compute(np.zeros(min(CHUNK_TOKENS, self._max_tokens), np.int32), 0)

    def __call__(self, ids: npt.NDArray[np.int32]) -> Iterator[Tensor]:
        """Float32 (tokens, V), some tokens at a time, on the GPU where PyTorch sees it. In DECODE mode: as tokens are
        generated."""
        for start in range(0, len(ids), CHUNK_TOKENS):
            yield self._compute(ids[start : start + CHUNK_TOKENS], start)

    def _compute(self, ids: npt.NDArray[np.int32], start: int) -> Tensor:
        kernels, count = self._kernels, len(ids)
        positions = np.arange(start, start + count, dtype=np.int32)
        attention = AttentionBatch(
            query_starts=kernels.to_device(np.array([0, count], np.int32)),
            context_lens=kernels.to_device(np.array([start + count], np.int32)),
            block_tables=kernels.to_device(np.arange(self._num_blocks, dtype=np.int32)[None]),
        )
        batch = ForwardBatch(
            ids=kernels.to_device(ids),
            positions=kernels.to_device(positions),
            slots=kernels.to_device(positions.astype(np.int64)),  # block i of the table is block i
            attention=attention,
            mode=Mode.DECODE,
        )
        rows = kernels.to_device(np.arange(count, dtype=np.int32))
        with kernels.temporaries():
            return self._copy(self._model.logits(self._model.forward(batch, self._kv_cache), rows))

    def _copy(self, logits: Array) -> Tensor:
        """Of a temporary array, made when this returns: 50 MB a chunk and rung are better left on the GPU."""
        if not torch.cuda.is_available():
            return torch.from_numpy(np.array(self._kernels.to_host(logits)))
        copy = from_dlpack(logits).clone()
        torch.cuda.current_stream().synchronize()
        return copy
