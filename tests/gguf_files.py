"""Small GGUF files, written by the `gguf` package: random Llamas with a byte-level or a SentencePiece vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFWriter, TokenType

CHAT_TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"

# Of the blocks of K types: where their fp16 scales are, and sane values
SCALES = {
    "Q2_K": {80: 1e-3, 82: 1e-3},
    "Q4_K": {0: 1.1e-4, 2: 7.3e-4},
    "Q5_K": {0: 1.1e-4, 2: 1.5e-3},
    "Q6_K": {208: 1e-4},
}


@dataclass(frozen=True)
class TinyGGUF:
    """What to write. `kinds` maps the end of a tensor's name to its type; the rest of the matrices are `kind`."""

    architecture: str = "llama"
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    hidden_size: int = 64
    intermediate_size: int = 96
    num_layers: int = 2
    tied: bool = True
    attention_bias: bool = False
    qk_norm: bool = False
    rope_freqs: bool = False
    kind: str = "Q4_1"
    kinds: dict[str, str] = field(default_factory=lambda: {"token_embd.weight": "Q8_0"})
    sentencepiece: bool = False
    edit: Callable[[GGUFWriter], None] = lambda writer: None  # to add keys and tensors


def write_tiny_gguf(path: Path, spec: TinyGGUF = TinyGGUF()) -> Path:
    writer = GGUFWriter(path, spec.architecture)
    writer.add_context_length(256)
    writer.add_embedding_length(spec.hidden_size)
    writer.add_block_count(spec.num_layers)
    writer.add_feed_forward_length(spec.intermediate_size)
    writer.add_head_count(spec.num_heads)
    writer.add_head_count_kv(spec.num_kv_heads)
    writer.add_key_length(spec.head_dim)
    writer.add_value_length(spec.head_dim)
    writer.add_rope_dimension_count(spec.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    num_tokens = add_sentencepiece_vocabulary(writer) if spec.sentencepiece else add_byte_level_vocabulary(writer)
    _add_tensors(writer, spec, num_tokens)
    spec.edit(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tensors(writer: GGUFWriter, spec: TinyGGUF, num_tokens: int) -> None:
    rng = np.random.default_rng(0)
    q, kv, hidden = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim, spec.hidden_size

    def matrix(name: str, rows: int, columns: int) -> None:
        kind = next((kind for end, kind in spec.kinds.items() if name.endswith(end)), spec.kind)
        weights = rng.normal(0, columns**-0.5, (rows, columns)).astype(np.float32)
        add_tensor(writer, name, weights, kind)

    def vector(name: str, size: int, mean: float) -> None:
        writer.add_tensor(name, rng.normal(mean, 0.1, size).astype(np.float32))

    matrix("token_embd.weight", num_tokens, hidden)
    for i in range(spec.num_layers):
        vector(f"blk.{i}.attn_norm.weight", hidden, 1.0)
        vector(f"blk.{i}.ffn_norm.weight", hidden, 1.0)
        for name, rows in (("attn_q", q), ("attn_k", kv), ("attn_v", kv)):
            matrix(f"blk.{i}.{name}.weight", rows, hidden)
            if spec.attention_bias:
                vector(f"blk.{i}.{name}.bias", rows, 0.0)
        if spec.qk_norm:
            vector(f"blk.{i}.attn_q_norm.weight", spec.head_dim, 1.0)
            vector(f"blk.{i}.attn_k_norm.weight", spec.head_dim, 1.0)
        matrix(f"blk.{i}.attn_output.weight", hidden, q)
        matrix(f"blk.{i}.ffn_gate.weight", spec.intermediate_size, hidden)
        matrix(f"blk.{i}.ffn_up.weight", spec.intermediate_size, hidden)
        matrix(f"blk.{i}.ffn_down.weight", hidden, spec.intermediate_size)
    vector("output_norm.weight", hidden, 1.0)
    if not spec.tied:
        matrix("output.weight", num_tokens, hidden)
    if spec.rope_freqs:
        writer.add_tensor("rope_freqs.weight", np.linspace(1, 8, spec.head_dim // 2, dtype=np.float32))


def add_tensor(writer: GGUFWriter, name: str, weights: npt.NDArray[np.float32], kind: str) -> None:
    """Quantised by the `gguf` package; the K types, which it cannot write, are random blocks with sane scales."""
    number = GGMLQuantizationType[kind]
    if kind in SCALES:
        block_bytes = gguf.GGML_QUANT_SIZES[number][1]
        blocks = np.random.default_rng(1).integers(0, 256, (weights.size // 256, block_bytes), dtype=np.uint8)
        for place, scale in SCALES[kind].items():
            blocks[:, place : place + 2] = np.full((len(blocks), 1), scale, np.float16).view(np.uint8)
        data = blocks.reshape(weights.shape[0], -1)
    else:
        data = gguf.quants.quantize(weights, number)
    writer.add_tensor(name, data, raw_dtype=number)


def byte_alphabet() -> list[str]:
    """GPT-2's printable spelling of the 256 bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    spelled = dict(zip(printable, map(chr, printable), strict=True)) | {b: chr(256 + i) for i, b in enumerate(others)}
    return [spelled[byte] for byte in range(256)]


def add_byte_level_vocabulary(writer: GGUFWriter, pre: str = "llama-bpe") -> int:
    """Specials, bytes, a user-defined token, and merges that reach every token of the words below."""
    specials = ["<|begin|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>"]
    alphabet = byte_alphabet()
    tokens = [*specials, *alphabet, "<think>"]
    types = [TokenType.CONTROL] * len(specials) + [TokenType.NORMAL] * 256 + [TokenType.USER_DEFINED]
    merges = []
    for word in ("the", "hello", "world", "ing", "123", "  ", "é", "日本", "一", "\n\n"):
        spelled = "".join(alphabet[byte] for byte in word.encode())
        merges += [f"{spelled[:end]} {spelled[end]}" for end in range(1, len(spelled))]
    merges += [f"Ġ {word}" for word in ("the", "hello", "world")]
    merges = list(dict.fromkeys(merges))
    tokens += [merge.replace(" ", "") for merge in merges]
    types += [TokenType.NORMAL] * len(merges)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(4)
    writer.add_add_bos_token(True)
    writer.add_chat_template(CHAT_TEMPLATE)
    return len(tokens)


def add_sentencepiece_vocabulary(writer: GGUFWriter) -> int:
    """Like Llama 2's: specials, 256 byte tokens, pieces with scores."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "<|im_start|>", "<tool>"]
    types = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, *[TokenType.BYTE] * 256]
    types += [TokenType.CONTROL, TokenType.USER_DEFINED]
    pieces = [
        "▁t",
        "he",
        "▁the",
        "in",
        "▁h",
        "er",
        "ing",
        "▁w",
        "or",
        "▁wor",
        "ld",
        "▁world",
        "ll",
        "llo",
        "▁▁",
        "▁hello",
    ]
    pieces += ["hello", "▁he", "th"]
    characters = sorted(set("".join(pieces)) | set("abcdefghijklmnopqrstuvwxyz0123456789.,!?éü日本"))
    scores = [0.0] * len(tokens) + [-float(i) for i in range(len(pieces) + len(characters))]
    tokens += pieces + characters
    types += [TokenType.NORMAL] * (len(pieces) + len(characters))
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_scores(scores)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    return len(tokens)
