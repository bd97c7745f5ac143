"""A GGUF file's tokenizer as the two files that `tokenizers` and `transformers` load: tokenizer.json and its config.

Two kinds: byte-level BPE (`gpt2`) and SentencePiece BPE with byte fallback (`llama`). The JSON is assembled directly
from the metadata arrays; every id and merge is checked here, so that the `tokenizers` package (which this module does
not import) accepts the result. Tokens are what they are in the original tokenizer: control tokens are special added
tokens, user-defined ones are added but not special, all others belong to the model.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from nibble.engine.checkpoint.errors import GGUFError, UnsupportedModelError
from nibble.engine.checkpoint.gguf import GGUFFile
from nibble.engine.checkpoint.hf_config import write_file, write_json
from nibble.engine.checkpoint.metadata import Metadata
from nibble.engine.checkpoint.pretokenizers import PRE_TOKENIZERS, PreTokenizer
from nibble.engine.model_config import ModelConfig

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # tokenizer.ggml.token_type
_SPACE = "▁"  # how SentencePiece spells a space
_NAMED_TOKENS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}

MAX_TOKEN_LENGTH = 4096  # characters; taking a token apart costs the square of them

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tokenizer:
    """The contents of the two files."""

    tokenizer: dict[str, Any]
    config: dict[str, Any]

    def write(self, directory: Path, config: ModelConfig) -> None:
        """Raises ConversionError where the disk does not hold it."""
        write_file(directory / "tokenizer.json", msgspec.json.encode(self.tokenizer))
        write_json(directory / "tokenizer_config.json", self.config | {"model_max_length": config.max_context_tokens})


def read_tokenizer(file: GGUFFile) -> Tokenizer:
    """Raises GGUFError for contradictory metadata, UnsupportedModelError for a kind of tokenizer not named here."""
    vocabulary = _Vocabulary(file.metadata, file.path.name)
    model = file.metadata.string("tokenizer.ggml.model")
    if model == "gpt2":
        parts, adds_bos = _byte_level_bpe(vocabulary)
    elif model == "llama":
        parts, adds_bos = _sentencepiece_bpe(vocabulary), True
    else:
        raise UnsupportedModelError(f"{file.path.name}: tokenizer.ggml.model {model!r} is not supported")
    config = _config(vocabulary, adds_bos)
    tokenizer = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": vocabulary.added_tokens()}
    tokenizer |= parts | {"post_processor": _post_processor(vocabulary, config)}
    return Tokenizer(tokenizer, config)


class _Vocabulary:
    """The token list of one file, and what each token is."""

    def __init__(self, metadata: Metadata, source: str) -> None:
        self.metadata = metadata
        self.source = source
        tokens = metadata.strings("tokenizer.ggml.tokens")
        if tokens is None:
            raise metadata.required("tokenizer.ggml.tokens")
        self.tokens = tokens
        self.ids = {token: i for i, token in enumerate(tokens)}
        if len(self.ids) != len(tokens):
            twice = next(token for i, token in enumerate(tokens) if self.ids[token] != i)
            raise GGUFError(f"{source}: tokenizer.ggml.tokens has {twice[:100]!r} twice")
        longest = max(tokens, key=len, default="")
        if len(longest) > MAX_TOKEN_LENGTH:
            raise GGUFError(
                f"{source}: tokenizer.ggml.tokens has one of {len(longest)} characters, the limit is {MAX_TOKEN_LENGTH}"
            )
        self.types = self._numbers("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
        self.named = {name: self._named_token(key) for name, key in _NAMED_TOKENS.items()}

    def scores(self) -> list[float]:
        scores = self._numbers("tokenizer.ggml.scores")
        if scores is None:
            raise self.metadata.required("tokenizer.ggml.scores")
        return scores

    def _numbers(self, key: str) -> list[Any] | None:
        """One number per token."""
        numbers = self.metadata.numbers(key)
        if numbers is None:
            return None
        if len(numbers) != len(self.tokens):
            raise self.metadata.out_of_range(key, f"one number for each of {len(self.tokens)} tokens")
        values: list[Any] = numbers.tolist()
        return values

    def _named_token(self, name: str) -> str | None:
        key = f"tokenizer.ggml.{name}_token_id"
        token_id = self.metadata.integer(key)
        if token_id is None:
            return None
        if not 0 <= token_id < len(self.tokens):
            raise self.metadata.out_of_range(key, f"an id below {len(self.tokens)}")
        return self.tokens[token_id]

    def added_tokens(self) -> list[dict[str, Any]]:
        """Tokens that are matched in the text as they are, before anything else."""
        named = set(self.named.values())
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        return [
            {"id": i, "content": token, **flags, "special": kind != USER_DEFINED or token in named}
            for i, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True))
            if token and (kind in (CONTROL, USER_DEFINED) or token in named)
        ]

    def stated_merges(self) -> list[tuple[str, str]] | None:
        key = "tokenizer.ggml.merges"
        lines = self.metadata.strings(key)
        if lines is None:
            return None
        merges = []
        for line in lines:
            left, _, right = line.partition(" ")
            if left not in self.ids or right not in self.ids or left + right not in self.ids:
                raise GGUFError(f"{self.source}: {key} has {line[:100]!r}, which is not made of tokens")
            merges.append((left, right))
        return merges


def _byte_level_bpe(vocabulary: _Vocabulary) -> tuple[dict[str, Any], bool]:
    """The model's part of tokenizer.json, and whether such tokenizers add a begin-of-sequence token."""
    pre_tokenizer = _pre_tokenizer(vocabulary)
    merges = vocabulary.stated_merges()
    if merges is None:
        raise vocabulary.metadata.required("tokenizer.ggml.merges")
    model = _bpe(vocabulary, merges) | {"ignore_merges": pre_tokenizer.ignore_merges}
    decoder = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    parts = {
        "normalizer": pre_tokenizer.normalizer,
        "pre_tokenizer": pre_tokenizer.json,
        "decoder": decoder,
        "model": model,
    }
    return parts, pre_tokenizer.adds_bos


def _pre_tokenizer(vocabulary: _Vocabulary) -> PreTokenizer:
    name = vocabulary.metadata.string("tokenizer.ggml.pre") or "default"
    if name not in PRE_TOKENIZERS:
        raise UnsupportedModelError(
            f"{vocabulary.source}: tokenizer.ggml.pre {name!r} is not supported; known are {', '.join(PRE_TOKENIZERS)}"
        )
    return PRE_TOKENIZERS[name]


def _sentencepiece_bpe(vocabulary: _Vocabulary) -> dict[str, Any]:
    if "tokenizer.ggml.precompiled_charsmap" in vocabulary.metadata:
        raise UnsupportedModelError(f"{vocabulary.source}: tokenizer.ggml.precompiled_charsmap is not supported")
    merges = vocabulary.stated_merges()
    if merges is None:
        merges = _merges_from_scores(vocabulary)
    unknown = {"unk_token": vocabulary.named["unk_token"], "fuse_unk": True, "byte_fallback": True}
    prefix = vocabulary.metadata.boolean("tokenizer.ggml.add_space_prefix") is not False
    scheme = "first" if prefix else "never"
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "normalizer": None,
        "pre_tokenizer": {"type": "Metaspace", "replacement": _SPACE, "prepend_scheme": scheme, "split": False},
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _bpe(vocabulary, merges) | unknown,
    }


def _merges_from_scores(vocabulary: _Vocabulary) -> list[tuple[str, str]]:
    """SentencePiece stores no merges: a pair merges if it makes a token, pairs of a higher score first.

    The order among equals is that of `transformers`' convert_slow_tokenizer.generate_merges: ids, then longer parts.
    """
    ids = vocabulary.ids
    merges: list[tuple[str, str, float]] = []
    for token, score in zip(vocabulary.tokens, vocabulary.scores(), strict=True):
        splits = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in ids and token[i:] in ids]
        splits.sort(key=lambda pair: (ids[pair[0]], ids[pair[1]]))
        merges += [(left, right, score) for left, right in splits]
    merges.sort(key=lambda merge: (merge[2], len(merge[0]), len(merge[1])), reverse=True)
    return [(left, right) for left, right, _ in merges]


def _bpe(vocabulary: _Vocabulary, merges: list[tuple[str, str]]) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": vocabulary.ids,
        "merges": merges,
    }


def _config(vocabulary: _Vocabulary, adds_bos: bool) -> dict[str, Any]:
    metadata = vocabulary.metadata
    stated = metadata.boolean("tokenizer.ggml.add_bos_token")
    bos, eos = vocabulary.named["bos_token"], vocabulary.named["eos_token"]
    adds_eos = metadata.boolean("tokenizer.ggml.add_eos_token") is True
    if (stated and bos is None) or (adds_eos and eos is None):
        raise GGUFError(f"{vocabulary.source}: the tokenizer is said to add a bos or eos token, but none is named")
    template = metadata.string("tokenizer.chat_template")
    if "tokenizer.chat_templates" in metadata:
        logger.info("file=%s has alternative chat templates: only the default one is kept", vocabulary.source)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": (adds_bos and bos is not None) if stated is None else stated,
        "add_eos_token": adds_eos,
        "clean_up_tokenization_spaces": False,
    }
    config |= {name: token for name, token in vocabulary.named.items() if token is not None}
    return config if template is None else config | {"chat_template": template}


def _post_processor(vocabulary: _Vocabulary, config: dict[str, Any]) -> dict[str, Any]:
    """What `tokenizers` puts around the ids of one text, and of a pair of texts."""
    bos = [config["bos_token"]] if config["add_bos_token"] else []
    eos = [config["eos_token"]] if config["add_eos_token"] else []

    def template(sequence: str, type_id: int) -> list[dict[str, Any]]:
        before = [{"SpecialToken": {"id": token, "type_id": type_id}} for token in bos]
        after = [{"SpecialToken": {"id": token, "type_id": type_id}} for token in eos]
        return [*before, {"Sequence": {"id": sequence, "type_id": type_id}}, *after]

    special = {token: {"id": token, "ids": [vocabulary.ids[token]], "tokens": [token]} for token in bos + eos}
    pair = template("A", 0) + template("B", 1)
    return {"type": "TemplateProcessing", "single": template("A", 0), "pair": pair, "special_tokens": special}
