"""Writes the table of GPU memory in deploy.md from what `nibble plan` computes: `python docs/memory_table.py`
(`make docs`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nibble.engine.memory_estimate import estimate, native_description, weight_bytes
from nibble.engine.model_config import ModelConfig
from nibble.kernels.layout import KVDtype

PAGE = Path(__file__).with_name("deploy.md")
BEGIN, END = "<!-- written by memory_table.py -->\n", "<!-- end -->\n"
GIB = 1 << 30
GPUS_GIB = (16, 24, 48, 80)
GROUP_SIZE = 128


def _shape(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, **others: Any) -> ModelConfig:
    """heads of 128 numbers, as all of these have."""
    return ModelConfig(
        architecture="llama",  # the others have no more than some biases and norms
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=128,
        rms_norm_eps=1e-5,
        **{"vocab_size": 128256, "max_context_tokens": 131072, **others},
    )


_QWEN_25 = {"vocab_size": 152064, "max_context_tokens": 32768, "attention_bias": True}
_QWEN_3 = {"vocab_size": 151936, "max_context_tokens": 40960, "qk_norm": True}
MODELS = {
    "Llama 3.2 3B": _shape(3072, 8192, 28, 24, 8, tie_word_embeddings=True),
    "Mistral 7B v0.3": _shape(4096, 14336, 32, 32, 8, vocab_size=32768, max_context_tokens=32768),
    "Qwen2.5 7B": _shape(3584, 18944, 28, 28, 4, **_QWEN_25),
    "Llama 3.1 8B": _shape(4096, 14336, 32, 32, 8),
    "Qwen3 8B": _shape(4096, 12288, 36, 32, 8, **_QWEN_3),
    "Qwen2.5 14B": _shape(5120, 13824, 48, 40, 8, **_QWEN_25),
    "Qwen3 32B": _shape(5120, 25600, 64, 64, 8, **_QWEN_3),
    "Llama 3.3 70B": _shape(8192, 28672, 80, 64, 8),
}


def page() -> str:
    """The page as it should be."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    return before + BEGIN + "\n".join(_table()) + "\n" + END + rest.partition(END)[2]


def _table() -> list[str]:
    sizes = [f"{size} GiB" for size in GPUS_GIB]
    lines = [f"| model | weights | KV of a token | {' | '.join(sizes)} |", f"| --- {'| ---: ' * (2 + len(sizes))}|"]
    for name, config in MODELS.items():
        description = native_description(config, GROUP_SIZE)
        plans = [estimate(description, KVDtype.INT8, size * GIB) for size in GPUS_GIB]
        tokens = [f"{plan.num_tokens:,}" if plan.num_tokens > 0 else "" for plan in plans]
        weights, token = weight_bytes(description) / GIB, plans[0].kv_token_bytes / 1024
        lines.append(f"| {name} | {weights:.2f} GiB | {token:.1f} KiB | {' | '.join(tokens)} |")
    return lines


if __name__ == "__main__":
    PAGE.write_text(page())
