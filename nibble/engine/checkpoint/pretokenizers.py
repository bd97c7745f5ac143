"""How text is cut into words before byte-pair merging, by the name that a GGUF file gives (`tokenizer.ggml.pre`).

The name stands for what the original model's tokenizer.json does; each entry restates that, in the form of the
`tokenizers` package's JSON. A wrong cut gives other ids for the same text, so a name that is not here is refused.

Source: llama.cpp, src/llama-vocab.cpp (names and expressions), checked against the models' own tokenizer.json.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_CASED_LETTERS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
)
_WHITESPACE = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _WHITESPACE
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _WHITESPACE
_TEKKEN = _CASED_LETTERS + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _WHITESPACE


@dataclass(frozen=True)
class PreTokenizer:
    """One way of cutting, with what else goes by its name.

    ignore_merges: a word that is a token as a whole is that token, whatever the merges say.
    adds_bos: what holds for files that do not say whether a begin-of-sequence token is added.
    normalizer: what is done to the text before; llama.cpp does nothing, the models' own tokenizers do.
    """

    json: dict[str, Any]
    ignore_merges: bool = False
    adds_bos: bool = False
    normalizer: dict[str, Any] | None = None


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


def _split(pattern: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return _sequence(split, _byte_level(use_regex=False))


_GPT2 = PreTokenizer(_byte_level(use_regex=True))
_SINGLE_DIGITS = PreTokenizer(_sequence({"type": "Digits", "individual_digits": True}, _byte_level(use_regex=True)))
_LLAMA3_PRE_TOKENIZER = PreTokenizer(_split(_LLAMA3), ignore_merges=True, adds_bos=True)
_QWEN2_PRE_TOKENIZER = PreTokenizer(_split(_QWEN2), normalizer={"type": "NFC"})

PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "default": _GPT2,
    "gpt-2": _GPT2,
    "smollm": _SINGLE_DIGITS,
    "starcoder": _SINGLE_DIGITS,
    "refact": _SINGLE_DIGITS,
    "codeshell": _SINGLE_DIGITS,
    "llama3": _LLAMA3_PRE_TOKENIZER,
    "llama-v3": _LLAMA3_PRE_TOKENIZER,
    "llama-bpe": _LLAMA3_PRE_TOKENIZER,
    "falcon3": _LLAMA3_PRE_TOKENIZER,
    "smaug-bpe": PreTokenizer(_split(_LLAMA3)),
    "qwen2": _QWEN2_PRE_TOKENIZER,
    "deepseek-r1-qwen": PreTokenizer(_split(_QWEN2)),
    "tekken": PreTokenizer(_split(_TEKKEN), ignore_merges=True, adds_bos=True),
}
