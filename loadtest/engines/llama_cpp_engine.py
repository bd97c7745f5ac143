"""llama.cpp on the same GGUF file, through the C API of `llama-cpp-python` where that is installed.

It is no dependency of this project: its wheel is built from source and wants cmake and a C++ compiler.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from loadtest.engines.interface import EngineNotInstalled

_MAX_SEQUENCES = 8
_CONTEXT_TOKENS = 8192  # of all sequences together
_BATCH_TOKENS = 512


class LlamaCppEngine:
    """See SpeedEngine."""

    def __init__(self, gguf: Path, num_threads: int) -> None:
        try:
            import llama_cpp
        except ImportError as error:
            raise EngineNotInstalled(f"{error.name} is not installed") from error
        api: Any = llama_cpp
        self._api = api
        api.llama_log_set(_silent(api), None)
        api.llama_backend_init()
        self._model = api.llama_model_load_from_file(str(gguf).encode(), api.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {gguf}")
        parameters = api.llama_context_default_params()
        parameters.n_ctx, parameters.n_batch, parameters.n_ubatch = _CONTEXT_TOKENS, _BATCH_TOKENS, _BATCH_TOKENS
        parameters.n_seq_max = _MAX_SEQUENCES
        parameters.n_threads = parameters.n_threads_batch = num_threads
        self._context = api.llama_init_from_model(self._model, parameters)
        self._batch = api.llama_batch_init(_BATCH_TOKENS, 0, 1)
        self.vocab_size = int(api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model)))

    def prefill(self, prompt: list[int]) -> float:
        self._forget()
        start_s = time.perf_counter()
        self._first_tokens([prompt])
        return time.perf_counter() - start_s

    def decode(self, prompts: list[list[int]], num_tokens: int) -> float:
        self._forget()
        tokens = self._first_tokens(prompts)
        start_s = time.perf_counter()
        for step in range(num_tokens):
            entries = [(token, len(prompts[s]) + step, s, True) for s, token in enumerate(tokens)]
            tokens = self._decode(entries)
        return time.perf_counter() - start_s

    def _first_tokens(self, prompts: list[list[int]]) -> list[int]:
        tokens = []
        for sequence, prompt in enumerate(prompts):
            entries = [(token, i, sequence, i == len(prompt) - 1) for i, token in enumerate(prompt)]
            tokens += self._decode(entries)
        return tokens

    def _decode(self, entries: list[tuple[int, int, int, bool]]) -> list[int]:
        """Compute (token, position, sequence, wants logits) entries; the likeliest next token of those that want it."""
        batch = self._batch
        batch.n_tokens = len(entries)
        for index, (token, position, sequence, wants_logits) in enumerate(entries):
            batch.token[index], batch.pos[index] = token, position
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, sequence
            batch.logits[index] = wants_logits
        if self._api.llama_decode(self._context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        return [self._likeliest(index) for index, entry in enumerate(entries) if entry[3]]

    def _likeliest(self, index: int) -> int:
        import numpy as np

        logits = self._api.llama_get_logits_ith(self._context, index)
        return int(np.ctypeslib.as_array(logits, shape=(self.vocab_size,)).argmax())

    def _forget(self) -> None:
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), False)


def _silent(api: Any) -> Any:
    """A log callback that drops everything; kept alive by the module."""
    global _log_callback
    _log_callback = api.llama_log_callback(lambda *_: None)
    return _log_callback


_log_callback: Any = None
