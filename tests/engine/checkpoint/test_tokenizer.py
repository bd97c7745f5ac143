"""Tokenisers against `transformers`' own reading of the same GGUF file.

Three differences are deliberate; there we follow the models' own tokenizer.json, as llama.cpp does: SmolLM puts each
digit apart, Llama 3 takes a word that is a token without merging, and an added token may contain spaces.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf_files import CHAT_TEMPLATE, TinyGGUF, write_tiny_gguf
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

from nibble.engine.checkpoint.convert import convert_checkpoint
from nibble.engine.checkpoint.errors import CheckpointError, GGUFError, UnsupportedModelError
from nibble.engine.checkpoint.gguf import GGUFFile
from nibble.engine.checkpoint.source import open_source
from nibble.engine.checkpoint.tokenizer import read_tokenizer

CORPUS = [
    "",
    " ",
    "Hello world",
    "  hello   the    world  ",
    "\n\n\thello\r\n \n",
    "I'm sure they'll say it's DON'T, he'D'VE",
    "1 12 123 1234 12345,67.89 0x1F ½ ³ ٣٤ 一二三",
    "naïve café Ünïcödé e\u0301 Straße ﬁ",
    "日本語のテキスト、中文字符。한국어",
    "🙂👩‍👩‍👧‍👦 🇩🇪 ✈️ 🤷🏽‍♀️",
    "def f(x):\n    return {'a': [x**2 for _ in range(10)]}  # done\n",
    "https://example.org/?q=a&b=%20#top <p class=\"x\">text</p>",
    "العربية עברית हिन्दी ไทย",
    "zero\u200bwidth\u00a0nbsp\u3000wide\ufeff\x00\x01\x7f",
    "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n",
    "a<|im_end|>b <|im_end|> c<think>the</think> <tool>x",
    "<|begin|><s></s><unk> <|endoftext|><file_sep>",
    "    indented\n        more    <think>",
    "▁the ▁▁world",
    "\ud7ff\U0010ffff\ufffd",
    "x" * 300 + " " * 70 + "\n" * 20,
]  # fmt: skip


def random_texts() -> list[str]:
    """Any characters in any order, where hand-written texts do not look."""
    rng = np.random.default_rng(0)
    pools = [
        range(32, 127),
        range(0xA0, 0x250),
        range(0x4E00, 0x4F00),
        range(0x1F600, 0x1F640),
        [9, 10, 13, 32, 0x3000],
    ]
    return ["".join(chr(rng.choice(pools[rng.integers(len(pools))])) for _ in range(60)) for _ in range(60)]


def assert_same(ours: Tokenizer, theirs: Tokenizer) -> None:
    """Ids with and without the template, and texts of those ids and of random ids."""
    for text in CORPUS + random_texts():
        for special in (True, False):
            ids = ours.encode(text, add_special_tokens=special).ids
            assert ids == theirs.encode(text, add_special_tokens=special).ids, text
            assert ours.decode(ids, skip_special_tokens=special) == theirs.decode(ids, skip_special_tokens=special)
    size = ours.get_vocab_size()
    assert size == theirs.get_vocab_size()
    assert ours.get_vocab() == theirs.get_vocab()
    for ids in np.random.default_rng(1).integers(0, size, (50, 30)).tolist():
        assert ours.decode(ids) == theirs.decode(ids)
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids, skip_special_tokens=False)


def native_tokenizer(path: Path, directory: Path) -> Tokenizer:
    convert_checkpoint(open_source(path), directory, lambda stage, done: None)
    return Tokenizer.from_file(str(directory / "tokenizer.json"))


@pytest.mark.parametrize("sentencepiece", [False, True])
def test_ids_and_texts_are_those_of_transformers(sentencepiece: bool, tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf", TinyGGUF(sentencepiece=sentencepiece))
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    assert_same(native_tokenizer(path, tmp_path), theirs.backend_tokenizer)


@pytest.mark.parametrize("pre", ["default", "gpt-2", "qwen2", "tekken", "llama3"])
def test_words_are_cut_as_transformers_cuts_them(pre: str, tmp_path: Path) -> None:
    def rename(writer: gguf.GGUFWriter) -> None:
        writer.kv_data[0]["tokenizer.ggml.pre"].value = pre

    path = write_tiny_gguf(tmp_path / "tiny.gguf", TinyGGUF(edit=rename))
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name).backend_tokenizer
    if pre == "qwen2":  # the file does not say it; Qwen's own tokenizer.json does
        theirs.normalizer = Qwen2Tokenizer().backend_tokenizer.normalizer
        assert theirs.normalizer.normalize_str("e\u0301") == "é"
    assert_same(native_tokenizer(path, tmp_path), theirs)


def test_the_demo_models_ids_and_texts_are_those_of_transformers(demo_gguf: Path, demo_checkpoint: Path) -> None:
    theirs = PreTrainedTokenizerFast.from_pretrained(demo_gguf.parent, gguf_file=demo_gguf.name).backend_tokenizer
    ours = Tokenizer.from_file(str(demo_checkpoint / "tokenizer.json"))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    assert_same(ours, theirs)


def test_smollm_puts_each_digit_apart(demo_checkpoint: Path) -> None:
    ours = Tokenizer.from_file(str(demo_checkpoint / "tokenizer.json"))
    assert ours.encode("in 2024").tokens == ["in", "Ġ", "2", "0", "2", "4"]


@pytest.mark.parametrize("source", ["demo", "byte level", "sentencepiece"])
def test_the_directory_loads_as_a_transformers_tokenizer(
    source: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """With the same ids as tokenizer.json, the same template as the file, and the named tokens."""
    if source == "demo":
        directory: Path = request.getfixturevalue("demo_checkpoint")
        path: Path = request.getfixturevalue("demo_gguf")
    else:
        directory = tmp_path / "native"
        directory.mkdir()
        path = write_tiny_gguf(tmp_path / "tiny.gguf", TinyGGUF(sentencepiece=source == "sentencepiece"))
        convert_checkpoint(open_source(path), directory, lambda stage, done: None)
    loaded = AutoTokenizer.from_pretrained(directory)
    ours = Tokenizer.from_file(str(directory / "tokenizer.json"))
    for text in CORPUS:
        assert loaded(text)["input_ids"] == ours.encode(text).ids
        assert loaded.decode(ours.encode(text).ids) == ours.decode(ours.encode(text).ids, skip_special_tokens=False)
    theirs = PreTrainedTokenizerFast.from_pretrained(path.parent, gguf_file=path.name)
    for name in ("bos_token", "eos_token", "unk_token", "pad_token", "chat_template"):
        assert getattr(loaded, name) == getattr(theirs, name), name
    if source != "sentencepiece":
        messages = [{"role": "user", "content": "Hi  there"}, {"role": "assistant", "content": "日本\n"}]
        for prompt in (True, False):
            rendered = loaded.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
            assert "<|im_start|>user\nHi  there<|im_end|>" in rendered
            assert rendered == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)


def test_config_json_describes_the_model(tmp_path: Path) -> None:
    def edit(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)

    path = write_tiny_gguf(tmp_path / "tiny.gguf", TinyGGUF(edit=edit))
    convert_checkpoint(open_source(path), tmp_path, lambda stage, done: None)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["rope_parameters"] == {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    assert (config["model_type"], config["max_position_embeddings"], config["head_dim"]) == ("llama", 256, 32)
    assert (config["bos_token_id"], config["eos_token_id"]) == (0, [1, 3])
    tokenizer_config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert tokenizer_config["chat_template"] == CHAT_TEMPLATE
    assert tokenizer_config["model_max_length"] == 256


def ids_of(edit: Callable[[gguf.GGUFWriter], None], tmp_path: Path, text: str, **spec: Any) -> list[int]:
    path = write_tiny_gguf(tmp_path / "tiny.gguf", TinyGGUF(**spec, edit=edit))
    return native_tokenizer(path, tmp_path).encode(text).ids


def test_files_that_do_not_say_add_the_begin_token_as_their_kind_does(tmp_path: Path) -> None:
    def forget(writer: gguf.GGUFWriter) -> None:
        writer.kv_data[0].pop("tokenizer.ggml.add_bos_token", None)

    def forget_and_rename(writer: gguf.GGUFWriter) -> None:
        forget(writer)
        writer.kv_data[0]["tokenizer.ggml.pre"].value = "gpt-2"

    def forget_and_unname(writer: gguf.GGUFWriter) -> None:
        forget(writer)
        del writer.kv_data[0]["tokenizer.ggml.bos_token_id"]

    assert ids_of(forget, tmp_path, "hello")[0] == 0  # llama-bpe
    assert ids_of(forget, tmp_path, "hello", sentencepiece=True)[0] == 1
    assert len(ids_of(forget_and_rename, tmp_path, "hello")) == 1
    assert len(ids_of(forget_and_unname, tmp_path, "hello")) == 1


def test_an_end_token_is_added_where_the_file_says_so(tmp_path: Path) -> None:
    ids = ids_of(lambda writer: writer.add_add_eos_token(True), tmp_path, "hello")
    assert (ids[0], ids[-1]) == (0, 1)


def test_a_sentencepiece_file_can_do_without_the_space_in_front(tmp_path: Path) -> None:
    def edit(writer: gguf.GGUFWriter) -> None:
        writer.add_add_space_prefix(False)

    path = write_tiny_gguf(tmp_path / "tiny.gguf", TinyGGUF(sentencepiece=True, edit=edit))
    ours = native_tokenizer(path, tmp_path)
    assert ours.encode("hello").tokens == ["<s>", "hello"]
    assert ours.decode(ours.encode(" hello").ids) == " hello"


def test_an_added_token_may_contain_spaces(tmp_path: Path) -> None:
    def edit(writer: gguf.GGUFWriter) -> None:
        writer.kv_data[0]["tokenizer.ggml.tokens"].value[261] = "    "

    path = write_tiny_gguf(tmp_path / "tiny.gguf", TinyGGUF(edit=edit))
    ours = native_tokenizer(path, tmp_path)
    assert ours.encode("the     x", add_special_tokens=False).tokens == ["the", "    ", "Ġ", "x"]
    assert ours.decode(ours.encode("the     x").ids) == "the     x"


def test_a_llama_3_word_that_is_a_token_needs_no_merges(tmp_path: Path) -> None:
    """As in Llama 3's tokenizer.json (ignore_merges); transformers' GGUF reading does not know it."""

    def edit(writer: gguf.GGUFWriter) -> None:
        merges = writer.kv_data[0]["tokenizer.ggml.merges"]
        merges.value = [merge for merge in merges.value if merge != "hell o"]

    assert len(ids_of(edit, tmp_path, "hello")) == 2  # the begin token and `hello`


def set_value(key: str, value: Any) -> Callable[[gguf.GGUFWriter], None]:
    def edit(writer: gguf.GGUFWriter) -> None:
        writer.kv_data[0][f"tokenizer.{key}"].value = value

    return edit


def drop(key: str) -> Callable[[gguf.GGUFWriter], None]:
    return lambda writer: writer.kv_data[0].pop(f"tokenizer.{key}")


def duplicate_token(writer: gguf.GGUFWriter) -> None:
    writer.kv_data[0]["tokenizer.ggml.tokens"].value[7] = "<unk>"


def long_token(writer: gguf.GGUFWriter) -> None:
    writer.kv_data[0]["tokenizer.ggml.tokens"].value[7] = "a" * 4097


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (set_value("ggml.model", "bert"), UnsupportedModelError, "tokenizer.ggml.model 'bert' is not supported"),
        (set_value("ggml.pre", "viking"), UnsupportedModelError, "tokenizer.ggml.pre 'viking' is not supported; known"),
        (drop("ggml.merges"), GGUFError, "tokenizer.ggml.merges is missing"),
        (set_value("ggml.merges", ["h e", "q zz"]), GGUFError, "merges has 'q zz', which is not made of tokens"),
        (set_value("ggml.merges", ["h"]), GGUFError, "merges has 'h', which is not made of tokens"),
        (set_value("ggml.token_type", [1, 1]), GGUFError, "token_type is an array of 2 int32 numbers, expected one"),
        (set_value("ggml.unknown_token_id", 5000), GGUFError, "unknown_token_id is 5000, expected an id below"),
        (drop("ggml.bos_token_id"), GGUFError, "said to add a bos or eos token, but none is named"),
        (long_token, GGUFError, "tokenizer.ggml.tokens has one of 4097 characters, the limit is 4096"),
        (duplicate_token, GGUFError, "tokenizer.ggml.tokens has '<unk>' twice"),
    ],
)
def test_a_tokenizer_that_cannot_be_built_is_refused_by_name(
    tmp_path: Path, edit: Callable[[gguf.GGUFWriter], None], error: type[CheckpointError], message: str
) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf", TinyGGUF(edit=edit))
    with pytest.raises(error) as caught:
        read_tokenizer(GGUFFile(path))
    assert message in str(caught.value)


def test_a_sentencepiece_file_without_scores_is_refused(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf", TinyGGUF(sentencepiece=True, edit=drop("ggml.scores")))
    with pytest.raises(GGUFError, match=r"tokenizer\.ggml\.scores is missing"):
        read_tokenizer(GGUFFile(path))
