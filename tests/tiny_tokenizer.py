"""A tokenizer for tiny models: every byte is a token, some JSON is too, and three special ones come first."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

EOS = 2
MERGES = ['{ "', '" :', '" ,', "} ]", "t r", "u e", "tr ue", "1 2", "Ã ©", "a b", "Ġ Ġ", ", Ġ"]


def write_tiny_tokenizer(directory: Path) -> Tokenizer:
    """`tokenizer.json` and `tokenizer_config.json` of 259 + 12 tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [tuple(merge.split(" ")) for merge in MERGES]
    tokens = ["<pad>", "<s>", "</s>", *alphabet, *("".join(merge) for merge in merges)]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in tokens[:3]])
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    return tokenizer
