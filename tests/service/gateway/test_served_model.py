"""What is read from a model's directory, for small models and for the demo model."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path
from typing import Any

import pytest
from small_models import CHATML, CONTEXT_LENGTH, CORPUS, VOCAB_ROOM, write_model
from tokenizers import AddedToken, Tokenizer, models
from transformers import AutoTokenizer

from nibble.service.gateway.chat import to_generation_requests
from nibble.service.gateway.detokenizer import UnsupportedDecoder
from nibble.service.gateway.plan import ClientContext
from nibble.service.gateway.schema.chat import ChatCompletionRequest
from nibble.service.gateway.served_model import ModelFilesError, ServedModel, load_served_model


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.fixture
def directory(tmp_path: Path, byte_level: Tokenizer) -> Path:
    return write_model(tmp_path / "tiny-model", byte_level, "<|im_end|>")


@pytest.fixture(scope="module")
def demo(demo_checkpoint: Path) -> ServedModel:
    return load_served_model(demo_checkpoint)


def test_fields(directory: Path, byte_level: Tokenizer) -> None:
    model = load_served_model(directory)
    assert (model.name, model.context_length) == ("tiny-model", CONTEXT_LENGTH)
    assert model.vocab_size == byte_level.get_vocab_size() + VOCAB_ROOM
    assert model.eos_token_ids == {byte_level.token_to_id("<|im_end|>")}
    assert load_served_model(directory, "other").name == "other"


def test_every_way_to_end_a_turn_is_known(directory: Path, byte_level: Tokenizer) -> None:
    end_of_text = byte_level.token_to_id("<|endoftext|>")
    edit(directory / "config.json", eos_token_id=[end_of_text, 9])
    edit(directory / "tokenizer_config.json", eos_token={"content": "<|im_end|>", "lstrip": False})
    ends = load_served_model(directory).eos_token_ids
    assert ends == {end_of_text, 9, byte_level.token_to_id("<|im_end|>")}


def test_default_of_several_templates(directory: Path) -> None:
    templates = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": CHATML}]
    edit(directory / "tokenizer_config.json", chat_template=templates)
    template = load_served_model(directory).chat_template
    assert template is not None
    assert template.render([{"role": "user", "content": "x"}]).startswith("<|im_start|>user")
    edit(directory / "tokenizer_config.json", chat_template=None)
    assert load_served_model(directory).chat_template is None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, "No such file"),
        ("tokenizer_config.json", b"{", "not JSON"),
        ("tokenizer_config.json", b"[]", "should be a JSON object"),
        ("config.json", b"{}", "max_position_embeddings should be a positive integer"),
    ],
)
def test_broken_file_is_named(directory: Path, name: str, content: bytes | None, message: str) -> None:
    path = directory / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ModelFilesError, match=message) as raised:
        load_served_model(directory)
    assert str(path) in str(raised.value)


def test_tokenizer_of_another_family_is_refused(directory: Path) -> None:
    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(directory / "tokenizer.json"))
    with pytest.raises(UnsupportedDecoder):
        load_served_model(directory)


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_no_text_has_fewer_tokens_than_the_bound_says(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    model = load_served_model(write_model(tmp_path, tokenizer, tokenizer.id_to_token(2)))
    assert model.max_bytes_per_token is not None
    draw = random.Random(0)
    for _ in range(200):
        text = "".join(draw.choice(draw.choice(CORPUS)) for _ in range(60)) + " " * draw.randrange(40)
        assert len(text.encode()) <= len(model.encode(text)) * model.max_bytes_per_token


def test_token_that_swallows_spaces_leaves_no_bound(tmp_path: Path, byte_level: Tokenizer) -> None:
    tokenizer = Tokenizer.from_str(byte_level.to_str())
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True, special=True)])
    assert load_served_model(write_model(tmp_path, tokenizer, "<|im_end|>")).max_bytes_per_token is None


def test_demo_prompt_is_that_of_transformers(demo: ServedModel, demo_checkpoint: Path) -> None:
    reference = AutoTokenizer.from_pretrained(demo_checkpoint)
    messages = [{"role": "user", "content": text} for text in CORPUS]
    body = {"model": demo.name, "messages": messages}
    plan = asyncio.run(
        to_generation_requests(
            ChatCompletionRequest.model_validate_json(json.dumps(body)), demo, ClientContext("chatcmpl-1", 0.0)
        )
    )
    ids = reference.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert plan.requests[0].prompt_token_ids == ids


def test_demo_output_is_decoded_as_a_whole_would_be(demo: ServedModel) -> None:
    draw = random.Random(0)
    for _ in range(300):
        ids = [draw.randrange(demo.vocab_size) for _ in range(draw.randrange(40))]
        for skip_special_tokens in (False, True):
            detokenizer = demo.make_detokenizer(skip_special_tokens)
            text = "".join(detokenizer.push([token_id]) for token_id in ids) + detokenizer.flush()
            assert text == demo.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
