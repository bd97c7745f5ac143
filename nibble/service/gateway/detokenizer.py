"""Token ids to text, a few tokens at a time.

The concatenation of all that `push` and `flush` return equals `tokenizers.Tokenizer.decode` of all ids, whatever the
grouping of the ids; text that a later token could still change is held back. Each token is looked at once. The rules
are those of the decoders in https://github.com/huggingface/tokenizers/tree/main/tokenizers/src/decoders, of which the
two families of language models are supported:

- ByteLevel (GPT-2, Llama 3, Qwen): a token is a sequence of bytes; all bytes together are UTF-8, where an ill-formed
  part becomes U+FFFD (Rust's and Python's replacement rules are the same).
- SentencePiece (Llama 2, Mistral): a token is text with U+2581 for a space, or one byte `<0xE9>`. A run of byte tokens
  is UTF-8 as a whole or else one U+FFFD per byte, so it is held until a token ends it. A leading space is dropped.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Protocol, TypeVar

from tokenizers import Tokenizer

REPLACEMENT = "\ufffd"


class UnsupportedDecoder(ValueError):
    """tokenizer.json asks for a decoder that is not one of the two families above."""


class Detokenizer(Protocol):
    """Holds the state of one token sequence."""

    def push(self, token_ids: Sequence[int]) -> str:
        """Return the text that these tokens make certain."""
        ...

    def flush(self) -> str:
        """Return the rest; nothing is pushed afterwards."""
        ...


T = TypeVar("T")
_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")


class DetokenizerFactory(Protocol):
    def __call__(self, skip_special_tokens: bool, shown: frozenset[str] = frozenset()) -> Detokenizer:
        """One at the start of its text. shown: special tokens that are never skipped."""
        ...


def detokenizer_factory(tokenizer: Tokenizer) -> DetokenizerFactory:
    """Raises UnsupportedDecoder."""
    decoder = json.loads(tokenizer.to_str())["decoder"]
    stages = _stages(decoder)
    names = [stage["type"] for stage in stages]
    if names == ["ByteLevel"]:

        @cache
        def bytes_of(skip: bool, shown: frozenset[str]) -> _Pieces[bytes]:
            return _Pieces(tokenizer, skip, byte_level_piece, b"", shown)

        return lambda skip_special_tokens, shown=frozenset(): ByteLevelDetokenizer(bytes_of(skip_special_tokens, shown))
    rules = _piece_rules(stages)

    @cache
    def pieces_of(skip: bool, shown: frozenset[str]) -> _Pieces[str | int | None]:
        return _Pieces(tokenizer, skip, lambda token: _sentencepiece_piece(token, rules), None, shown)

    return lambda skip_special_tokens, shown=frozenset(): PieceDetokenizer(pieces_of(skip_special_tokens, shown), rules)


def token_bytes_function(tokenizer: Tokenizer) -> Callable[[int], bytes]:
    """Return `token_bytes(token_id)`: what a token stands for by itself, special ones included; b"" for no token.

    Raises UnsupportedDecoder.
    """
    stages = _stages(json.loads(tokenizer.to_str())["decoder"])
    if [stage["type"] for stage in stages] == ["ByteLevel"]:
        return _Pieces(tokenizer, False, byte_level_piece, b"", frozenset()).__getitem__
    rules = _piece_rules(stages)

    def to_bytes(token: str) -> bytes:
        piece = _sentencepiece_piece(token, rules)
        if isinstance(piece, int):
            return bytes([piece])
        for old, new in rules.text_replacements:
            piece = piece.replace(old, new)
        return piece.encode()

    return _Pieces(tokenizer, False, to_bytes, b"", frozenset()).__getitem__


class ByteLevelDetokenizer:
    """Every token is bytes of one long UTF-8 text."""

    __slots__ = ("_bytes_of", "_tail")

    def __init__(self, bytes_of: Mapping[int, bytes]) -> None:
        self._bytes_of = bytes_of
        self._tail = b""  # the beginning of a character

    def push(self, token_ids: Sequence[int]) -> str:
        bytes_of = self._bytes_of
        data = bytes_of[token_ids[0]] if len(token_ids) == 1 else b"".join([bytes_of[i] for i in token_ids])
        if self._tail:
            data = self._tail + data
        text, num_decoded = codecs.utf_8_decode(data, "replace", False)
        self._tail = data[num_decoded:]
        return text

    def flush(self) -> str:
        return codecs.utf_8_decode(self._tail, "replace", True)[0]


@dataclass(frozen=True)
class PieceRules:
    """What a SentencePiece-like decoder does, in the order in which it does it."""

    token_replacements: tuple[tuple[str, str], ...] = ()  # in each token
    has_byte_tokens: bool = False
    drop_in_first_token: str = ""  # Metaspace: this character vanishes from the first token
    text_replacements: tuple[tuple[str, str], ...] = ()  # in the whole text; each pattern is one character
    strip_char: str = ""
    strip_count: int = 0  # so many strip_char are dropped from the start of the text


class PieceDetokenizer:
    """Every token is a piece of text or a byte of a run of byte tokens."""

    def __init__(self, pieces: Mapping[int, str | int | None], rules: PieceRules) -> None:
        self._pieces = pieces
        self._rules = rules
        self._run = bytearray()
        self._is_first = True
        self._strip_left = rules.strip_count

    def push(self, token_ids: Sequence[int]) -> str:
        parts: list[str] = []
        for token_id in token_ids:
            piece = self._pieces[token_id]
            if piece is None:
                continue
            if isinstance(piece, int):
                self._run.append(piece)
                continue
            if self._run:
                parts.append(self._end_run())
            if self._is_first and self._rules.drop_in_first_token:
                piece = piece.replace(self._rules.drop_in_first_token, "")
            self._is_first = False
            parts.append(piece)
        return self._finish("".join(parts))

    def flush(self) -> str:
        return self._finish(self._end_run())

    def _end_run(self) -> str:
        run, self._run = self._run, bytearray()
        self._is_first = self._is_first and not run
        try:
            return run.decode()
        except UnicodeDecodeError:
            return REPLACEMENT * len(run)

    def _finish(self, text: str) -> str:
        for old, new in self._rules.text_replacements:
            text = text.replace(old, new)
        if self._strip_left and text:
            stripped = text.lstrip(self._rules.strip_char)
            num_stripped = min(len(text) - len(stripped), self._strip_left)
            text = text[num_stripped:]
            self._strip_left = 0 if text else self._strip_left - num_stripped
        return text


class _Pieces(dict[int, T]):
    """token id -> piece, filled on first use; `dropped` for ids that decode to nothing."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        skip_special_tokens: bool,
        to_piece: Callable[[str], T],
        dropped: T,
        shown: frozenset[str],
    ) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self._to_piece = to_piece
        self._dropped = dropped
        added = tokenizer.get_added_tokens_decoder()
        self._skipped = frozenset(
            i for i, token in added.items() if skip_special_tokens and token.special and token.content not in shown
        )

    def __missing__(self, token_id: int) -> T:
        token = None if token_id in self._skipped else self._tokenizer.id_to_token(token_id)
        piece = self._dropped if token is None else self._to_piece(token)
        self[token_id] = piece
        return piece


def _byte_alphabet() -> dict[str, int]:
    """The printable stand-ins of GPT-2's byte-level BPE: printable latin-1 is itself, the others follow from U+0100."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHAR = _byte_alphabet()


def byte_level_piece(token: str) -> bytes:
    """The bytes of one ByteLevel token; a token with a character outside the alphabet stands for itself."""
    try:
        return bytes([_BYTE_OF_CHAR[char] for char in token])
    except KeyError:
        return token.encode()


def _sentencepiece_piece(token: str, rules: PieceRules) -> str | int:
    if rules.has_byte_tokens and (match := _BYTE_TOKEN.fullmatch(token)):
        return int(match[1], 16)
    for old, new in rules.token_replacements:
        token = token.replace(old, new)
    return token


def _stages(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        raise UnsupportedDecoder("tokenizer.json has no decoder")
    stages: list[dict[str, Any]] = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    return stages


def _piece_rules(stages: list[dict[str, Any]]) -> PieceRules:
    """Raises UnsupportedDecoder for every sequence of stages that PieceDetokenizer does not reproduce."""
    if [stage["type"] for stage in stages] == ["Metaspace"]:
        space = stages[0]["replacement"]
        is_first_special = stages[0].get("prepend_scheme", "always") != "never"
        return PieceRules(text_replacements=((space, " "),), drop_in_first_token=space if is_first_special else "")
    rules, is_fused = PieceRules(), False
    for stage in stages:
        match stage:
            case {"type": "ByteFallback"} if not is_fused:
                rules = replace(rules, has_byte_tokens=True)
            case {"type": "Fuse"}:
                is_fused = True
            case {"type": "Replace", "pattern": {"String": old}, "content": new} if (
                not is_fused and not rules.strip_char
            ):
                rules = replace(rules, token_replacements=(*rules.token_replacements, (old, new)))
            case {"type": "Replace", "pattern": {"String": old}, "content": new} if (
                len(old) == 1 and not rules.strip_char
            ):
                rules = replace(rules, text_replacements=(*rules.text_replacements, (old, new)))
            case {"type": "Strip", "content": char, "start": count, "stop": 0} if is_fused and not rules.strip_char:
                rules = replace(rules, strip_char=char, strip_count=count)
            case _:
                raise UnsupportedDecoder(f"tokenizer.json: decoder stage {stage} is not supported here")
    return rules
