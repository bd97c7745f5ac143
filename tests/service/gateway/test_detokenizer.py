"""Incremental decoding against `tokenizers`' own decode of the whole, for both families of tokenizers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import CORPUS, byte_level_tokenizer, sentencepiece_tokenizer
from tokenizers import Tokenizer, decoders, models

from nibble.service.gateway.detokenizer import UnsupportedDecoder, detokenizer_factory

BYTE_LEVEL = byte_level_tokenizer()
SENTENCEPIECE = sentencepiece_tokenizer()


def with_decoder(tokenizer: Tokenizer, decoder: object) -> Tokenizer:
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.decoder = decoder
    return copy


TOKENIZERS = {
    "byte_level": BYTE_LEVEL,
    "sentencepiece": SENTENCEPIECE,
    "sentencepiece_from_gguf": with_decoder(
        SENTENCEPIECE,
        decoders.Sequence(
            [decoders.ByteFallback(), decoders.Fuse(), decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)]
        ),
    ),
    "gemma": with_decoder(
        SENTENCEPIECE, decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    ),
    "metaspace": with_decoder(SENTENCEPIECE, decoders.Metaspace()),
    "metaspace_never": with_decoder(SENTENCEPIECE, decoders.Metaspace(prepend_scheme="never")),
}
FACTORIES = {name: detokenizer_factory(tokenizer) for name, tokenizer in TOKENIZERS.items()}

# Biased towards the bytes and the special tokens, where the difficulties are; some ids are beyond the vocabulary.
token_ids = st.lists(
    st.one_of(
        st.integers(0, 450), st.integers(0, 5), st.integers(100, 260), st.sampled_from([417, 418, 419, 420, 421])
    ),
    max_size=40,
)


def incremental(name: str, ids: Sequence[int], cuts: Sequence[int], *, skip_special: bool) -> str:
    detokenizer = FACTORIES[name](skip_special)
    bounds = [0, *sorted(min(cut, len(ids)) for cut in cuts), len(ids)]
    parts = [detokenizer.push(ids[start:end]) for start, end in pairwise(bounds)]
    return "".join(parts) + detokenizer.flush()


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=400, deadline=None)
@given(ids=token_ids, cuts=st.lists(st.integers(0, 40), max_size=10), skip_special=st.booleans())
def test_pieces_add_up_to_the_full_decode(name: str, ids: list[int], cuts: list[int], skip_special: bool) -> None:
    whole = TOKENIZERS[name].decode(ids, skip_special_tokens=skip_special)
    assert incremental(name, ids, cuts, skip_special=skip_special) == whole
    assert incremental(name, ids, range(len(ids)), skip_special=skip_special) == whole


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=12))
@pytest.mark.parametrize("name", ["byte_level", "sentencepiece"])
def test_any_bytes_decode_as_a_whole_does(name: str, data: bytes) -> None:
    ids = byte_tokens(name, data)
    whole = TOKENIZERS[name].decode(ids)
    assert incremental(name, ids, range(len(ids)), skip_special=True) == whole


@pytest.mark.parametrize("name", ["byte_level", "sentencepiece"])
@pytest.mark.parametrize("text", CORPUS)
def test_real_text_comes_back(name: str, text: str) -> None:
    ids = TOKENIZERS[name].encode(text, add_special_tokens=False).ids
    assert incremental(name, ids, range(len(ids)), skip_special=True) == text


def test_character_split_over_tokens_is_held_until_it_is_whole() -> None:
    detokenizer = FACTORIES["byte_level"](True)
    first, second, third, fourth = byte_tokens("byte_level", "😀".encode())
    assert [detokenizer.push([token]) for token in (first, second, third)] == ["", "", ""]
    assert detokenizer.push([fourth]) == "😀"


def test_incomplete_character_at_the_end_becomes_one_replacement_character() -> None:
    detokenizer = FACTORIES["byte_level"](True)
    assert detokenizer.push(byte_tokens("byte_level", "😀".encode()[:3])) == ""
    assert detokenizer.flush() == "\ufffd"


def test_run_of_byte_tokens_is_held_until_another_token_ends_it() -> None:
    detokenizer = FACTORIES["sentencepiece"](True)
    letter = SENTENCEPIECE.token_to_id("x")
    assert detokenizer.push(byte_tokens("sentencepiece", "é".encode())) == ""
    assert detokenizer.push([letter]) == "éx"


def test_leading_space_of_the_text_is_dropped_and_no_other() -> None:
    detokenizer = FACTORIES["sentencepiece"](True)
    space, letter = SENTENCEPIECE.token_to_id("▁"), SENTENCEPIECE.token_to_id("x")
    assert [detokenizer.push([token]) for token in (space, space, letter, space)] == ["", " ", "x", " "]


def test_special_tokens_are_shown_when_asked_for() -> None:
    end = BYTE_LEVEL.token_to_id("<|im_end|>")
    assert FACTORIES["byte_level"](True).push([end]) == ""
    assert FACTORIES["byte_level"](False).push([end]) == "<|im_end|>"


def test_long_output_costs_the_same_per_token() -> None:
    """The vocabulary is looked up once per token pushed, whatever came before."""

    class Counting(dict[int, bytes]):
        lookups = 0

        def __getitem__(self, token_id: int) -> bytes:
            Counting.lookups += 1
            return b"\xff"

    detokenizer = FACTORIES["byte_level"](True)
    detokenizer._bytes_of = Counting()
    for _ in range(1000):
        detokenizer.push([7])
    assert Counting.lookups == 1000


@pytest.mark.parametrize(
    "decoder",
    [
        None,
        decoders.WordPiece(),
        decoders.CTC(),
        decoders.Sequence([decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0), decoders.Fuse()]),
        decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 1, 1)]),
    ],
)
def test_unknown_decoder_is_refused_at_start(decoder: object) -> None:
    tokenizer = Tokenizer(models.BPE())
    if decoder is not None:
        tokenizer.decoder = decoder
    with pytest.raises(UnsupportedDecoder, match="decoder"):
        detokenizer_factory(tokenizer)


def byte_tokens(name: str, data: bytes) -> list[int]:
    if name == "sentencepiece":
        return [SENTENCEPIECE.token_to_id(f"<0x{byte:02X}>") for byte in data]
    from nibble.service.gateway.detokenizer import _BYTE_OF_CHAR

    char_of = {byte: char for char, byte in _BYTE_OF_CHAR.items()}
    return [BYTE_LEVEL.token_to_id(char_of[byte]) for byte in data]
