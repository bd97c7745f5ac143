"""Hugging Face transformers on the same weights: the GGUF file dequantised by transformers itself."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from loadtest.engines.interface import EngineNotInstalled


class TransformersEngine:
    """See SpeedEngine. dtype: `float32` or `bfloat16`."""

    def __init__(self, gguf: Path, dtype: str, num_threads: int) -> None:
        try:
            import torch
            from transformers import AutoModelForCausalLM
        except ImportError as error:
            raise EngineNotInstalled(f"{error.name} is not installed") from error
        torch.set_num_threads(num_threads)
        torch.set_grad_enabled(False)
        self._torch = torch
        model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=getattr(torch, dtype))
        self._model = model.eval()
        self.vocab_size = int(self._model.config.vocab_size)

    def prefill(self, prompt: list[int]) -> float:
        start_s = time.perf_counter()
        self._first_tokens([prompt])
        return time.perf_counter() - start_s

    def decode(self, prompts: list[list[int]], num_tokens: int) -> float:
        tokens, cache = self._first_tokens(prompts)
        start_s = time.perf_counter()
        for _ in range(num_tokens):
            output = self._model(input_ids=tokens, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            tokens = output.logits[:, -1:].argmax(-1)
        return time.perf_counter() - start_s

    def _first_tokens(self, prompts: list[list[int]]) -> tuple[Any, Any]:
        """The first token of each prompt (batch, 1), and the cache. Logits of the last position alone."""
        output = self._model(input_ids=self._torch.tensor(prompts), use_cache=True, logits_to_keep=1)
        return output.logits[:, -1:].argmax(-1), output.past_key_values
